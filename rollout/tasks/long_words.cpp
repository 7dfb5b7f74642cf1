#include "rollout/tasks/long_words.h"

#include <fmt/format.h>

#include <array>
#include <numeric>

#include "base/error.h"

namespace perigee::rollout::words {
namespace {

template <size_t N>
using List = std::array<std::string_view, N>;

constexpr List<48> kAdjectives = {
    "amber",  "ample",   "bitter", "blunt",   "brave",  "bright",  "brisk", "calm",  "careful", "clever",
    "crisp",  "curious", "damp",   "distant", "dusty",  "eager",   "early", "faded", "famous",  "gentle",
    "golden", "grave",   "hasty",  "hidden",  "humble", "idle",    "jolly", "keen",  "lively",  "lonely",
    "lucky",  "mellow",  "modest", "narrow",  "noble",  "patient", "plain", "proud", "quiet",   "rapid",
    "rusty",  "shy",     "silent", "sober",   "stern",  "sturdy",  "tidy",  "weary"};
constexpr List<16> kSecondAdjectives = {"ashen", "blue",  "coral",  "dim",  "ebony", "frosty",
                                        "green", "hazel", "ivory",  "jade", "muddy", "pale",
                                        "rosy",  "sandy", "violet", "windy"};
constexpr List<60> kAnimals = {
    "adder",     "badger", "beaver",  "bison",   "bittern", "buzzard",  "camel",  "cicada",  "cobra",
    "cormorant", "crane",  "cricket", "curlew",  "dingo",   "dormouse", "eagle",  "eel",     "falcon",
    "ferret",    "finch",  "gecko",   "gopher",  "grouse",  "hare",     "heron",  "hornet",  "ibex",
    "ibis",      "jackal", "jay",     "kestrel", "lark",    "lemming",  "lizard", "lynx",    "magpie",
    "marmot",    "marten", "mole",    "moth",    "newt",    "osprey",   "otter",  "oyster",  "perch",
    "pike",      "plover", "puffin",  "quail",   "raven",   "salmon",   "shrew",  "sparrow", "stoat",
    "swift",     "tapir",  "toad",    "vole",    "weasel",  "wren"};
constexpr List<40> kPeople = {
    "actor",   "archivist", "baker",    "barber",   "brewer",    "captain", "carpenter", "carter",
    "clerk",   "cobbler",   "cook",     "cooper",   "dancer",    "doctor",  "farmer",    "ferryman",
    "fiddler", "gardener",  "glazier",  "guard",    "innkeeper", "judge",   "librarian", "mason",
    "mayor",   "merchant",  "miller",   "nurse",    "painter",   "pilot",   "potter",    "printer",
    "sailor",  "saddler",   "shepherd", "surveyor", "tailor",    "teacher", "watchman",  "weaver"};
constexpr List<48> kThings = {
    "anchor",  "apron",  "barrel",  "basket", "bell",   "bench",  "blanket", "bottle",  "bridle", "bucket",
    "candle",  "carpet", "chair",   "chest",  "clock",  "cloak",  "crate",   "curtain", "drum",   "flute",
    "garment", "hammer", "harness", "jar",    "kettle", "ladder", "lamp",    "letter",  "map",    "mirror",
    "needle",  "oar",    "parcel",  "pillow", "plough", "purse",  "quilt",   "rope",    "saddle", "sail",
    "scarf",   "shovel", "spade",   "spoon",  "stool",  "table",  "trunk",   "wheel"};
constexpr List<32> kPlaces = {"attic",   "bakery",   "barn",   "bridge", "cellar",  "chapel",  "courtyard",
                              "dairy",   "garden",   "garret", "hall",   "harbour", "inn",     "kitchen",
                              "library", "market",   "meadow", "mill",   "orchard", "pantry",  "porch",
                              "quarry",  "school",   "shed",   "smithy", "stable",  "station", "tower",
                              "tunnel",  "vineyard", "wharf",  "yard"};
constexpr List<32> kVerbs = {
    "admired", "borrowed", "bought",   "carried", "cleaned", "counted",  "covered",   "described",
    "dropped", "emptied",  "examined", "fetched", "found",   "guarded",  "inherited", "kept",
    "lifted",  "lost",     "mended",   "moved",   "ordered", "packed",   "painted",   "polished",
    "praised", "repaired", "returned", "sold",    "stored",  "unpacked", "wanted",    "weighed"};
constexpr List<20> kActions = {"arrived", "coughed",   "fell asleep", "went home", "laughed",
                               "left",    "paused",    "returned",    "sat down",  "smiled",
                               "sneezed", "stood up",  "waited",      "waved",     "whistled",
                               "yawned",  "hesitated", "looked up",   "nodded",    "changed the subject"};
constexpr List<10> kPrepositions = {"behind", "beside",  "from",     "in",    "inside",
                                    "near",   "outside", "opposite", "under", "above"};
constexpr List<16> kTimes = {"After supper",    "At dawn",      "At noon",         "Before the storm",
                             "By candlelight",  "During lunch", "Early that day",  "In the autumn",
                             "In the evening",  "Last winter",  "Late at night",   "On market day",
                             "On the way back", "One morning",  "Some time later", "The week after"};

constexpr List<15> kConsonants = {"b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "w", "z"};
constexpr List<5> kVowels = {"a", "e", "i", "o", "u"};
constexpr int64_t kSyllables = kConsonants.size() * kVowels.size();

constexpr List<10> kFormList = {"diary entry", "fable",  "letter", "news item", "poem",
                                "prayer",      "riddle", "song",   "speech",    "story"};
constexpr List<40> kTopicList = {
    "anchors", "apples",    "badgers", "beacons",  "bees",     "bells",     "bridges",  "canals",
    "candles", "clouds",    "comets",  "ferries",  "forests",  "gardens",   "glaciers", "harbours",
    "herons",  "hedges",    "islands", "kites",    "lanterns", "libraries", "maps",     "mills",
    "mirrors", "mountains", "oceans",  "orchards", "otters",   "owls",      "rivers",   "roofs",
    "sails",   "shadows",   "storms",  "tapirs",   "trains",   "tunnels",   "violins",  "wells"};
constexpr List<20> kVerdicts = {"are older than anyone can tell",
                                "keep their own counsel",
                                "come back when they are needed",
                                "teach us to wait",
                                "belong to nobody",
                                "look different after rain",
                                "are best seen from far away",
                                "make no promises",
                                "outlast those who own them",
                                "ask for nothing in return",
                                "are never where we left them",
                                "turn strangers into friends",
                                "know the way without a map",
                                "grow quiet towards the evening",
                                "are worth a long walk",
                                "hide more than they show",
                                "deserve a better name",
                                "were here before the road",
                                "do not care for our plans",
                                "follow us into our dreams"};
constexpr List<12> kOpenings = {
    "They say that",        "My grandmother held that", "I have learnt that",    "It is no secret that",
    "Let it be known that", "We often forget that",     "In this valley",        "On some evenings",
    "Nobody denies that",   "I still believe that",     "Once more we saw that", "The sailors told us that"};

template <size_t N>
std::string_view pick(const List<N>& list, Random& random) {
  return list[static_cast<size_t>(random.next_int(0, static_cast<int64_t>(N) - 1))];
}

void append(std::string& out, std::initializer_list<std::string_view> parts) {
  for (const std::string_view part : parts) out += part;
}

}  // namespace

Shuffled::Shuffled(int64_t size, Random& random) : size_(size), factor_(1), offset_(0) {
  PERIGEE_CHECK(size > 0, "size {}", size);
  offset_ = random.next_int(0, size - 1);
  do factor_ = random.next_int(1, size);
  while (std::gcd(factor_, size) != 1);
}

int64_t Shuffled::at(int64_t i) const {
  PERIGEE_CHECK(i >= 0 && i < size_, "{} of {}", i, size_);
  return static_cast<int64_t>(
      (static_cast<unsigned __int128>(i) * static_cast<uint64_t>(factor_) + static_cast<uint64_t>(offset_)) %
      static_cast<uint64_t>(size_));
}

void append_sentence(Random& random, std::string& out) {
  switch (random.next_int(0, 4)) {
    case 0:
      append(out, {"The ", pick(kAdjectives, random), " ", pick(kPeople, random), " ", pick(kVerbs, random),
                   " the ", pick(kThings, random), " ", pick(kPrepositions, random), " the ",
                   pick(kPlaces, random), ".\n"});
      return;
    case 1:
      append(out, {pick(kTimes, random), ", the ", pick(kPeople, random), " ", pick(kVerbs, random), " the ",
                   pick(kAdjectives, random), " ", pick(kThings, random), ".\n"});
      return;
    case 2:
      append(out, {"Nobody ", pick(kPrepositions, random), " the ", pick(kPlaces, random), " ",
                   pick(kVerbs, random), " the ", pick(kThings, random), " of the ", pick(kPeople, random),
                   ".\n"});
      return;
    case 3:
      append(out, {"The ", pick(kThings, random), " ", pick(kPrepositions, random), " the ",
                   pick(kPlaces, random), " was ", pick(kSecondAdjectives, random), " and the ",
                   pick(kPeople, random), " ", pick(kActions, random), ".\n"});
      return;
    default:
      append(out, {"When the ", pick(kPeople, random), " ", pick(kActions, random), ", the ",
                   pick(kAdjectives, random), " ", pick(kPeople, random), " ", pick(kVerbs, random), " the ",
                   pick(kThings, random), ".\n"});
  }
}

const int64_t kShortNames = kAdjectives.size() * kAnimals.size();
const int64_t kNames = kShortNames * (1 + static_cast<int64_t>(kSecondAdjectives.size()));

std::string name(int64_t i) {
  PERIGEE_CHECK(i >= 0 && i < kNames, "name {}", i);
  const auto pair = static_cast<size_t>(i % kShortNames), third = static_cast<size_t>(i / kShortNames);
  const std::string_view adjective = kAdjectives[pair / kAnimals.size()],
                         animal = kAnimals[pair % kAnimals.size()];
  if (third == 0) return fmt::format("{}-{}", adjective, animal);
  return fmt::format("{}-{}-{}", adjective, kSecondAdjectives[third - 1], animal);
}

const int64_t kCodedWords = kSyllables * kSyllables * kSyllables;

std::string coded_word(int64_t i) {
  PERIGEE_CHECK(i >= 0 && i < kCodedWords, "word {}", i);
  std::string word;
  for (int s = 0; s < 3; ++s, i /= kSyllables) {
    const auto syllable = static_cast<size_t>(i % kSyllables);
    append(word, {kConsonants[syllable / kVowels.size()], kVowels[syllable % kVowels.size()]});
  }
  return word;
}

int64_t string_count(std::string_view alphabet, int64_t length) {
  constexpr int64_t kMost = int64_t{1} << 62;
  int64_t count = 1;
  for (int64_t i = 0; i < length; ++i) {
    if (count > kMost / static_cast<int64_t>(alphabet.size())) return kMost;
    count *= static_cast<int64_t>(alphabet.size());
  }
  return count;
}

std::string string_at(std::string_view alphabet, int64_t length, int64_t i) {
  std::string text(static_cast<size_t>(length), alphabet[0]);
  for (size_t p = text.size(); p-- > 0; i /= static_cast<int64_t>(alphabet.size()))
    text[p] = alphabet[static_cast<size_t>(i % static_cast<int64_t>(alphabet.size()))];
  return text;
}

std::string random_string(std::string_view alphabet, int64_t length, Random& random) {
  std::string text(static_cast<size_t>(length), ' ');
  for (char& c : text)
    c = alphabet[static_cast<size_t>(random.next_int(0, static_cast<int64_t>(alphabet.size()) - 1))];
  return text;
}

std::string random_uuid(Random& random) {
  const std::string hex = random_string("0123456789abcdef", 32, random);
  const std::string_view h = hex;
  return fmt::format("{}-{}-{}-{}-{}", h.substr(0, 8), h.substr(8, 4), h.substr(12, 4), h.substr(16, 4),
                     h.substr(20));
}

const int64_t kForms = kFormList.size();
const int64_t kTopics = kTopicList.size();
std::string_view form(int64_t i) {
  return kFormList.at(static_cast<size_t>(i));
}
std::string_view topic(int64_t i) {
  return kTopicList.at(static_cast<size_t>(i));
}

std::string topic_sentence(std::string_view topic, Random& random) {
  switch (random.next_int(0, 2)) {
    case 0:
      return fmt::format("{} {} {}.", pick(kOpenings, random), topic, pick(kVerdicts, random));
    case 1:
      return fmt::format("{}, the {} {} spoke of {}, which {}.", pick(kTimes, random),
                         pick(kAdjectives, random), pick(kPeople, random), topic, pick(kVerdicts, random));
    default:
      return fmt::format("The {} {} the {} and said that {} {}.", pick(kPeople, random), pick(kVerbs, random),
                         pick(kThings, random), topic, pick(kVerdicts, random));
  }
}

}  // namespace perigee::rollout::words
