// What the generators of long prompts have in common: a problem is sketched without the text that it is hidden in, and
// the text is written when somebody wants the prompt, to a number of tokens that the run's own tokenizer counts.
//
//   tokens of the prompt + answer = length         PromptTokens::answer, rollout.max_new_tokens
//
// INVARIANTS
//  L1  With a byte a token the sum is exact. With another tokenizer it is never above, and below by at most
//      max(32, length / 200); where lines begin tokens of their own, as in Kimi's vocabulary, mostly exact too.
//  L2  The time is proportional to the length: each piece of text is counted once by itself, and the whole
//      once or a few times.
#pragma once
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "rollout/tasks/detail.h"
#include "rollout/tasks/prompt_tokens.h"

namespace perigee::rollout {

// The options that all of them take.
struct LongOptions {
  explicit LongOptions(JsonReader& options, const PromptTokens& tokens);
  // Of answers in letters of this alphabet, for the verifier "recall". ERRORS (input): letters that it takes
  // for one, or that make no words.
  static void check_recalled(JsonReader& options, std::string_view key, std::string_view alphabet);

  const PromptTokens tokens;
  int64_t length = 0, min_length = 0;  // a task's is drawn between them
  bool chat = false;                   // the prompt is a conversation for the chat template
  bool noise = false;                  // "style": letters instead of sentences
  std::string noise_alphabet, key_alphabet, value_alphabet;
  int64_t key_length = 0, value_length = 0;  // in letters
  std::string where;                         // of "length", for messages
};

// The text that things are hidden in.
class Filler {
 public:
  enum class Kind { kSentences, kRepeat, kNoise };
  Filler(Kind kind, const LongOptions& options);

  struct Text {
    std::string text;
    std::vector<size_t> cuts;  // where a line may be put in between, ascending; empty: anywhere
    // Uniform over the share [from, to] of the text.
    size_t cut(double from, double to, Random& random) const;
  };
  // Of so many tokens, as near as can be and never more: each line by itself, so that putting lines in between adds theirs.
  Text make(int64_t tokens, Random& random) const;

 private:
  Text make_noise(int64_t tokens, Random& random) const;
  Text make_lines(int64_t tokens, Random& random) const;

  Kind kind_;
  const LongOptions& options_;
};

// A sentence of exactly so many tokens, "The day was so very ... long.\n". Measured once.
class Padding {
 public:
  // before and after: what stands around the words in between.
  Padding(const PromptTokens& tokens, std::string before, std::string after,
          std::vector<std::string> between = {" so", " too", " very", " most", " rather"});
  bool reaches(int64_t tokens) const;                                      // 0 always: by nothing
  std::string text(int64_t tokens) const;                                  // REQUIRES reaches
  int64_t most() const { return static_cast<int64_t>(last_.size()) - 1; }  // beyond it, nothing is reached

 private:
  static constexpr int kUnreached = -1, kNone = -2;
  std::string before_, after_;
  std::vector<std::string> between_;
  std::vector<int64_t> costs_;  // of those
  std::vector<int> last_;       // last_[n]: the word to end n tokens with; kNone: it takes none
};

// Lines in a text: each goes in at its cut; those at the same cut in their order. REQUIRES ascending cuts.
std::string put_in(const Filler::Text& text, const std::vector<size_t>& cuts,
                   const std::vector<std::string>& lines);

class LongGenerator : public Generator {
 public:
  LongGenerator(JsonReader& options, const PromptTokens& tokens) : options_(options, tokens) {}
  Problem draw(Random& random) const final;

 protected:
  struct Sketch {
    std::string canonical;
    Task task;  // all but the prompt
    // Writes the prompt with so many tokens of what it is hidden in (0: without any), at most.
    std::function<void(Task&, int64_t tokens, Random random)> write;
  };
  virtual Sketch sketch(Random& random) const = 0;
  // For the end of a constructor. ERRORS (input): a length that the problem alone leaves no room in, for so many tokens
  // of text with which it comes out even; in one line.
  void check_length(int64_t least_filler) const;
  // The same before anything is written, of a problem that takes as many tokens or more.
  void check_at_least(double tokens) const;
  // Of a prompt in one piece.
  void set_prompt(Task& task, std::string text) const;

  const LongOptions options_;

 private:
  int64_t least(const Sketch& sketch) const;
  [[noreturn]] void refuse(int64_t length, int64_t least) const;
};

// The answer of several strings, for the verifier "recall", and how a response gives it.
std::string joined(const std::vector<std::string>& values);

// Read their options; the caller finishes the reader.
std::unique_ptr<Generator> make_needle(JsonReader& options, const PromptTokens& tokens);
std::unique_ptr<Generator> make_variable_tracking(JsonReader& options, const PromptTokens& tokens);
std::unique_ptr<Generator> make_common_words(JsonReader& options, const PromptTokens& tokens);
std::unique_ptr<Generator> make_frequent_words(JsonReader& options, const PromptTokens& tokens);
std::unique_ptr<Generator> make_mrcr(JsonReader& options, const PromptTokens& tokens);

}  // namespace perigee::rollout
