// Needles in a haystack, with the variants of RULER (arXiv 2404.06654): one key and value among text (single), others
// beside it (multi_key), several values of a key (multi_value), several keys that are asked for (multi_query).
#include <algorithm>
#include <array>

#include "base/error.h"
#include "base/text.h"
#include "rollout/tasks/long_context.h"
#include "rollout/tasks/long_words.h"

namespace perigee::rollout {
namespace {

constexpr std::array<std::string_view, 4> kVariants = {"single", "multi_key", "multi_value", "multi_query"};

std::string one_of(JsonReader& options, std::string_view key, std::string_view absent,
                   const std::vector<std::string>& names) {
  std::string name = options.string(key, absent);
  if (std::find(names.begin(), names.end(), name) == names.end())
    options.fail(key, fmt::format("one of {} is expected, not {}{}", join(names), quote(name),
                                  did_you_mean(name, names)));
  return name;
}

class Needle : public LongGenerator {
 public:
  Needle(JsonReader& options, const PromptTokens& tokens) : LongGenerator(options, tokens) {
    variant_ = one_of(options, "variant", "single", {kVariants.begin(), kVariants.end()});
    if (variant_ != "single") needles_ = options.integer("needles", 2, 1000, 4);
    if (const nlohmann::json* depth = options.find("depth")) {
      if (!depth->is_array() || depth->size() != 2 || !(*depth)[0].is_number() || !(*depth)[1].is_number())
        options.fail("depth", "[from, to] is expected, shares of the text such as [0, 1]");
      from_ = (*depth)[0].get<double>();
      to_ = (*depth)[1].get<double>();
      if (!(0 <= from_ && from_ <= to_ && to_ <= 1))
        options.fail("depth", "0 <= from <= to <= 1 is expected");
    }
    if (options_.noise) {
      key_count_ = words::string_count(options_.key_alphabet, options_.key_length);
      if (variant_ == "multi_value" || variant_ == "multi_query")
        LongOptions::check_recalled(options, "value_alphabet", options_.value_alphabet);
    } else {
      uuid_keys_ = one_of(options, "keys", "names", {"names", "uuids"}) == "uuids";
      values_ = one_of(options, "values", "numbers", {"numbers", "names", "uuids"});
      haystack_ = one_of(options, "haystack", "sentences", {"sentences", "repeat", "needles"});
      key_count_ = words::kNames;
    }
    if (key_count_ < keys())
      options.fail("needles", fmt::format("there are only {} different keys", key_count_));
    const double values =
        options_.noise
            ? static_cast<double>(words::string_count(options_.value_alphabet, options_.value_length))
            : 1e6;
    if (values < static_cast<double>(needles_)) options.fail("needles", "there are fewer different values");
    check_length(options_.noise ? 0 : 64);
  }

 private:
  struct Pair {
    std::string key, value;
  };

  int64_t keys() const { return variant_ == "single" || variant_ == "multi_value" ? 1 : needles_; }

  Sketch sketch(Random& random) const override {
    const words::Shuffled order(options_.noise || haystack_ == "needles" ? key_count_ : words::kShortNames,
                                random);
    std::vector<Pair> pairs;
    std::vector<std::string> asked, answers;
    for (int64_t i = 0; i < std::max<int64_t>(1, needles_); ++i) {
      Pair pair{variant_ == "multi_value" && i > 0 ? pairs[0].key : key(order, i, random), value(random)};
      while (std::any_of(pairs.begin(), pairs.end(), [&](const Pair& p) { return p.value == pair.value; }))
        pair.value = value(random);
      pairs.push_back(std::move(pair));
    }
    const size_t queries = variant_ == "multi_query" ? pairs.size() : 1;
    for (size_t i = 0; i < queries; ++i) asked.push_back(pairs[i].key);
    for (size_t i = 0; i < (variant_ == "multi_key" ? 1 : pairs.size()); ++i)
      answers.push_back(pairs[i].value);

    Sketch s;
    std::vector<std::string> canonical;
    for (const Pair& p : pairs) canonical.push_back(p.key + "=" + p.value);
    if (variant_ == "multi_key") canonical.resize(1);  // the others only distract
    std::sort(canonical.begin(), canonical.end());
    s.canonical = "needle " + join(canonical);
    s.task.answer = joined(answers);
    s.task.verifier = options_.noise && answers.size() == 1 ? "exact" : "recall";
    s.task.worked_example =
        (options_.noise || options_.chat ? "" : " ") + (options_.noise ? list(answers) : s.task.answer);
    s.write = [this, pairs = std::move(pairs), asked = std::move(asked), many = answers.size() > 1, order](
                  Task& task, int64_t tokens, Random r) {
      write(task, pairs, asked, many, order, tokens, r);
    };
    return s;
  }

  static std::string list(const std::vector<std::string>& values) { return join(values, ","); }

  std::string key(const words::Shuffled& order, int64_t i, Random& random) const {
    if (options_.noise) return words::string_at(options_.key_alphabet, options_.key_length, order.at(i));
    return uuid_keys_ ? words::random_uuid(random) : words::name(order.at(i));
  }
  std::string value(Random& random) const {
    if (options_.noise) return words::random_string(options_.value_alphabet, options_.value_length, random);
    if (values_ == "numbers") return std::to_string(random.next_int(1000000, 9999999));
    return values_ == "uuids" ? words::random_uuid(random)
                              : words::name(random.next_int(0, words::kShortNames - 1));
  }
  std::string line(const Pair& p) const {
    return options_.noise ? p.key + "=" + p.value + ";"
                          : fmt::format("The password of {} is {}.\n", p.key, p.value);
  }

  void write(Task& task, const std::vector<Pair>& pairs, const std::vector<std::string>& asked, bool many,
             const words::Shuffled& order, int64_t tokens, Random& random) const {
    std::string text;
    if (haystack_ == "needles")
      text = among_needles(pairs, order, tokens, random);
    else
      text = among_text(pairs, tokens, random);
    if (options_.noise) {
      set_prompt(task, fmt::format("{}\n?{}=", text, list(asked)));
      return;
    }
    std::string who = asked[0];
    for (size_t i = 1; i < asked.size(); ++i) who += (i + 1 == asked.size() ? " and " : ", ") + asked[i];
    const std::string question =
        asked.size() > 1
            ? fmt::format("What are the passwords of {}? Answer with them alone, separated by commas.", who)
        : many ? fmt::format("What are all the passwords of {}? Answer with them alone, separated by commas.",
                             who)
               : fmt::format("What is the password of {}? Answer with it alone.", who);
    set_prompt(
        task,
        fmt::format(
            "Passwords are hidden in the following text. Keep them in mind, you will be asked about them.\n\n"
            "{}\n{}{}",
            text, question, options_.chat ? "" : "\nAnswer:"));
  }

  std::string among_text(const std::vector<Pair>& pairs, int64_t tokens, Random& random) const {
    const auto kind = options_.noise          ? Filler::Kind::kNoise
                      : haystack_ == "repeat" ? Filler::Kind::kRepeat
                                              : Filler::Kind::kSentences;
    const Filler::Text text = Filler(kind, options_).make(tokens, random);
    std::vector<std::pair<size_t, size_t>> places;  // cut and pair
    for (size_t i = 0; i < pairs.size(); ++i) places.emplace_back(text.cut(from_, to_, random), i);
    // At one cut the order is that of the pairs, which means nothing.
    std::sort(places.begin(), places.end());
    std::vector<size_t> cuts;
    std::vector<std::string> lines;
    for (const auto& [cut, i] : places) {
      cuts.push_back(cut);
      lines.push_back(line(pairs[i]));
    }
    return put_in(text, cuts, lines);
  }

  // The haystack is needles too, of other keys.
  std::string among_needles(const std::vector<Pair>& pairs, const words::Shuffled& order, int64_t tokens,
                            Random& random) const {
    const Padding padding(options_.tokens, "The list is", " long.\n");
    Filler::Text text;
    text.cuts.push_back(0);
    // Lines are counted together, in blocks of half of what is left; the last ones by themselves.
    int64_t left = tokens, next = static_cast<int64_t>(pairs.size());
    int refused = 0;
    Random sample(0);
    int64_t line_tokens =
        std::max<int64_t>(1, options_.tokens.text(line({key(order, 0, sample), value(sample)})));
    while (left > 0 && refused < 16) {
      const int64_t lines = std::max<int64_t>(1, left / line_tokens / 4), first = next;
      std::string block;
      std::vector<size_t> ends;
      for (int64_t i = 0; i < lines; ++i, ++next) {
        if (!uuid_keys_ && next >= key_count_)
          throw_input(
              "{}: {} tokens of needles need more than the {} different names; give \"keys\": \"uuids\"",
              options_.where, tokens, key_count_);
        Pair other{key(order, uuid_keys_ ? 0 : next, random), value(random)};
        while (std::any_of(pairs.begin(), pairs.end(), [&](const Pair& p) { return p.value == other.value; }))
          other.value = value(random);
        block += line(other);
        ends.push_back(text.text.size() + block.size());
      }
      const int64_t cost = options_.tokens.text(block), rest = left - cost;
      if (rest < 0 || (rest <= padding.most() && !padding.reaches(rest))) {
        ++refused;
        line_tokens = std::max(line_tokens * 2, cost / lines);
        if (lines > 1)
          next = first;  // names are for lines that stand there; one line by itself is tried with another
        continue;
      }
      refused = 0;
      line_tokens = std::max<int64_t>(1, cost / lines);
      text.text += block;
      text.cuts.insert(text.cuts.end(), ends.begin(), ends.end());
      left = rest;
    }
    while (!padding.reaches(left)) --left;
    std::vector<size_t> cuts;
    std::vector<std::string> lines;
    for (const Pair& p : pairs) {
      cuts.push_back(text.cut(from_, to_, random));
      lines.push_back(line(p));
    }
    std::sort(cuts.begin(), cuts.end());
    for (size_t i = lines.size(); i > 1; --i)
      std::swap(lines[i - 1], lines[static_cast<size_t>(random.next_int(0, static_cast<int64_t>(i) - 1))]);
    return padding.text(left) + put_in(text, cuts, lines);
  }

  std::string variant_, values_, haystack_;
  int64_t needles_ = 0, key_count_ = 0;
  double from_ = 0, to_ = 1;
  bool uuid_keys_ = false;
};

}  // namespace

std::unique_ptr<Generator> make_needle(JsonReader& options, const PromptTokens& tokens) {
  return std::make_unique<Needle>(options, tokens);
}

}  // namespace perigee::rollout
