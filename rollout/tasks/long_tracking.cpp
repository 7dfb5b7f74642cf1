// Variable tracking (RULER, arXiv 2404.06654): chains of assignments in a text, X = 12345, Y = X, Z = Y, ...; which
// variables hold the value? One chain is asked for, the others only distract.
#include <algorithm>

#include "base/error.h"
#include "base/text.h"
#include "rollout/tasks/long_context.h"
#include "rollout/tasks/long_words.h"

namespace perigee::rollout {
namespace {

constexpr std::string_view kLetters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ";
constexpr int64_t kNameLetters = 5;

class VariableTracking : public LongGenerator {
 public:
  VariableTracking(JsonReader& options, const PromptTokens& tokens) : LongGenerator(options, tokens) {
    chains_ = options.integer("chains", 1, 1000, 1);
    hops_ = options.integer("hops", 0, 100, 4);
    if (!options_.noise) {
      const std::string haystack = options.string("haystack", "repeat");
      if (haystack != "repeat" && haystack != "sentences")
        options.fail("haystack",
                     fmt::format("\"repeat\" or \"sentences\" is expected, not {}", quote(haystack)));
      kind_ = haystack == "repeat" ? Filler::Kind::kRepeat : Filler::Kind::kSentences;
    }
    alphabet_ = options_.noise ? options_.key_alphabet : std::string(kLetters);
    letters_ = options_.noise ? options_.key_length : kNameLetters;
    names_ = words::string_count(alphabet_, letters_);
    if (names_ < chains_ * (hops_ + 1))
      options.fail("hops", fmt::format("{} chains of {} variables, and there are only {} names", chains_,
                                       hops_ + 1, names_));
    if (options_.noise && words::string_count(options_.value_alphabet, options_.value_length) < chains_)
      options.fail("chains", "there are fewer different values");
    if (options_.noise) LongOptions::check_recalled(options, "key_alphabet", options_.key_alphabet);
    // LB=KW; would assign a variable or a value.
    if (options_.noise && options_.value_length == options_.key_length &&
        options_.value_alphabet.find_first_of(options_.key_alphabet) != std::string::npos)
      options.fail("value_length",
                   "a value may be the name of a variable: another length than key_length, or letters that "
                   "key_alphabet has not, are expected");
    check_length(options_.noise ? 0 : 64);
  }

 private:
  struct Chain {
    std::string value;
    std::vector<std::string> names;  // each but the first assigned from the one before
  };

  Sketch sketch(Random& random) const override {
    const words::Shuffled order(names_, random);
    std::vector<Chain> chains(static_cast<size_t>(chains_));
    int64_t next = 0;
    for (Chain& chain : chains) {
      do
        chain.value = options_.noise
                          ? words::random_string(options_.value_alphabet, options_.value_length, random)
                          : std::to_string(random.next_int(10000, 99999));
      while (std::count_if(chains.begin(), chains.end(),
                           [&](const Chain& c) { return c.value == chain.value; }) > 1);
      for (int64_t i = 0; i <= hops_; ++i)
        chain.names.push_back(words::string_at(alphabet_, letters_, order.at(next++)));
    }
    Sketch s;
    s.canonical = fmt::format("variables {}={}", join(chains[0].names, "="), chains[0].value);
    s.task.answer = joined(chains[0].names);
    s.task.verifier = "recall";
    s.task.worked_example = (options_.noise || options_.chat ? "" : " ") +
                            (options_.noise ? join(chains[0].names, ",") : s.task.answer);
    s.write = [this, chains = std::move(chains)](Task& task, int64_t tokens, Random r) {
      write(task, chains, tokens, r);
    };
    return s;
  }

  void write(Task& task, const std::vector<Chain>& chains, int64_t tokens, Random& random) const {
    const Filler::Text text = Filler(kind(), options_).make(tokens, random);
    // The places of a chain's lines are drawn, then taken in order: each variable is assigned before it is read.
    std::vector<std::pair<size_t, size_t>> places;  // cut and chain
    for (size_t c = 0; c < chains.size(); ++c)
      for (size_t i = 0; i < chains[c].names.size(); ++i) places.emplace_back(text.cut(0, 1, random), c);
    std::sort(places.begin(), places.end());
    std::vector<size_t> cuts, done(chains.size());
    std::vector<std::string> lines;
    for (const auto& [cut, c] : places) {
      const Chain& chain = chains[c];
      const size_t i = done[c]++;
      cuts.push_back(cut);
      if (options_.noise)
        lines.push_back(chain.names[i] + "=" + (i == 0 ? chain.value : chain.names[i - 1]) + ";");
      else
        lines.push_back(i == 0 ? fmt::format("VAR {} = {}\n", chain.names[0], chain.value)
                               : fmt::format("VAR {} = VAR {}\n", chain.names[i], chain.names[i - 1]));
    }
    const std::string body = put_in(text, cuts, lines);
    if (options_.noise)
      set_prompt(task, fmt::format("{}\n?{}=", body, chains[0].value));
    else
      set_prompt(
          task,
          fmt::format(
              "Variables are assigned in the following text. Keep track of what each of them holds.\n\n{}\n"
              "Which variables hold the value {}? Answer with their names alone, separated by commas.{}",
              body, chains[0].value, options_.chat ? "" : "\nAnswer:"));
  }

  Filler::Kind kind() const { return options_.noise ? Filler::Kind::kNoise : kind_; }

  int64_t chains_ = 0, hops_ = 0, letters_ = 0, names_ = 0;
  Filler::Kind kind_ = Filler::Kind::kRepeat;
  std::string alphabet_;
};

}  // namespace

std::unique_ptr<Generator> make_variable_tracking(JsonReader& options, const PromptTokens& tokens) {
  return std::make_unique<VariableTracking>(options, tokens);
}

}  // namespace perigee::rollout
