// Counting over a whole prompt (RULER, arXiv 2404.06654): which words of a list stand there most often, where some do and
// the others seldom (common_words); which of a coded text, whose words are as frequent as those of a language
// (frequent_words: the k-th word's share is as k^-alpha).
#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "base/text.h"
#include "rollout/tasks/long_context.h"
#include "rollout/tasks/long_words.h"

namespace perigee::rollout {
namespace {

constexpr int64_t kMostWords = int64_t{1} << 20;  // of a vocabulary

template <class T>
void shuffle(std::vector<T>& list, Random& random) {
  for (size_t i = list.size(); i > 1; --i)
    std::swap(list[i - 1], list[static_cast<size_t>(random.next_int(0, static_cast<int64_t>(i) - 1))]);
}

// The words of both: coded ones, or all strings of some letters.
class Counting : public LongGenerator {
 public:
  Counting(JsonReader& options, const PromptTokens& tokens)
      : LongGenerator(options, tokens),
        padding_(options_.noise ? Padding(tokens, "", "\n", {"."})
                                : Padding(tokens, "The text is", " long.\n")),
        word_count_(options_.noise ? words::string_count(options_.key_alphabet, options_.key_length)
                                   : words::kCodedWords) {
    if (options_.noise) LongOptions::check_recalled(options, "key_alphabet", options_.key_alphabet);
  }

 protected:
  std::string word(const words::Shuffled& order, int64_t i) const {
    return options_.noise ? words::string_at(options_.key_alphabet, options_.key_length, order.at(i))
                          : words::coded_word(order.at(i));
  }
  int64_t cost(const std::string& word) const { return options_.tokens.text(" " + word); }

  void finish(Sketch& s, const std::string& kind, std::vector<std::string> asked) const {
    s.task.answer = joined(asked);
    s.task.verifier = "recall";
    s.task.worked_example =
        (options_.noise || options_.chat ? "" : " ") + (options_.noise ? join(asked, ",") : s.task.answer);
    std::sort(asked.begin(), asked.end());
    s.canonical = kind + " " + join(asked);
  }

  // left: tokens for a sentence that ends even; the words go after the introduction, in the order given.
  void put(Task& task, const std::string& introduction, const std::vector<std::string>& list, int64_t left,
           bool numbered, const std::string& question) const {
    while (!padding_.reaches(left)) --left;
    std::string text = options_.noise ? std::string() : introduction + "\n";
    text += padding_.text(left);
    if (!options_.noise) text += "\n";
    size_t bytes = text.size();
    for (const auto& w : list) bytes += w.size() + 8;
    text.reserve(bytes);
    int64_t number = 0;
    for (const std::string& w : list) {
      ++number;
      if (numbered) text += fmt::format(" {}.", number);
      text += ' ';
      text += w;
    }
    if (options_.noise)
      text += "\n?";
    else
      text += fmt::format("\n\n{}{}", question, options_.chat ? "" : "\nAnswer:");
    set_prompt(task, std::move(text));
  }

  const Padding padding_;
  const int64_t word_count_;
};

class CommonWords : public Counting {
 public:
  CommonWords(JsonReader& options, const PromptTokens& tokens) : Counting(options, tokens) {
    common_ = options.integer("common", 1, 1000, 10);
    common_repeats_ = options.integer("common_repeats", 2, 100000, 30);
    other_repeats_ = options.integer("other_repeats", 1, common_repeats_ - 1, 3);
    if (word_count_ < common_ + 1)
      options.fail("common", fmt::format("{} words, and there are only {}", common_, word_count_));
    check_at_least(static_cast<double>(common_ * common_repeats_));
    // Of the numbers with so many digits.
    int64_t power = 1;
    for (size_t digits = 1; digits <= 9; ++digits, power *= 10)
      number_costs_.push_back(options_.noise ? 0 : tokens.text(fmt::format(" {}.", power)));
    check_length(options_.noise ? 0 : 64);
  }

 private:
  Sketch sketch(Random& random) const override {
    const words::Shuffled order(word_count_, random);
    std::vector<std::string> asked;
    for (int64_t i = 0; i < common_; ++i) asked.push_back(word(order, i));
    Sketch s;
    finish(s, "common_words", asked);
    s.write = [this, order](Task& task, int64_t tokens, Random r) { write(task, order, tokens, r); };
    return s;
  }

  void write(Task& task, const words::Shuffled& order, int64_t tokens, Random& random) const {
    std::vector<std::string> list;
    for (int64_t i = 0; i < common_; ++i)
      list.insert(list.end(), static_cast<size_t>(common_repeats_), word(order, i));
    // As many others as there is room for, less one where what is left could not be padded.
    int64_t left = tokens;
    std::vector<int64_t> costs;
    for (int64_t next = common_; left > 0; ++next) {
      if (next >= word_count_) {
        if (left <= padding_.most()) break;
        throw_input("{}: {} tokens need more than the {} different words", options_.where, options_.length,
                    word_count_);
      }
      const std::string other = word(order, next);
      int64_t together = other_repeats_ * cost(other);
      for (int64_t i = 0; i < other_repeats_; ++i)
        together += number_cost(static_cast<int64_t>(list.size()) + i + 1);
      if (together > left) break;
      list.insert(list.end(), static_cast<size_t>(other_repeats_), other);
      costs.push_back(together);
      left -= together;
    }
    while (!padding_.reaches(left) && !costs.empty() && left + costs.back() <= padding_.most()) {
      left += costs.back();
      costs.pop_back();
      list.resize(list.size() - static_cast<size_t>(other_repeats_));
    }
    shuffle(list, random);
    put(task,
        "Below is a numbered list of words. Some of them stand there more often than the others. Keep the "
        "most frequent ones in "
        "mind.",
        list, left, !options_.noise,
        fmt::format(
            "Which {} words stand most often in the list? Answer with them alone, separated by commas.",
            common_));
  }

  int64_t number_cost(int64_t number) const {
    size_t digits = 0;
    for (; number >= 10; number /= 10) ++digits;
    return number_costs_[digits];
  }

  int64_t common_ = 0, common_repeats_ = 0, other_repeats_ = 0;
  std::vector<int64_t> number_costs_;  // by digits - 1
};

class FrequentWords : public Counting {
 public:
  FrequentWords(JsonReader& options, const PromptTokens& tokens) : Counting(options, tokens) {
    asked_ = options.integer("asked", 1, 100, 3);
    const double alpha = options.number("alpha", 1.01, 10, 2.0);
    vocabulary_ = options.integer("vocabulary", 2, std::min(word_count_, kMostWords),
                                  std::min<int64_t>(2000, word_count_));
    if (asked_ >= vocabulary_)
      options.fail("asked",
                   fmt::format("fewer than the {} words of the vocabulary are expected", vocabulary_));
    double sum = 0;
    for (int64_t k = 1; k <= vocabulary_; ++k)
      shares_.push_back(std::pow(static_cast<double>(k), -alpha)), sum += shares_.back();
    for (double& share : shares_) share /= sum;
    // So many words that rounding cannot make two of the first ones equal.
    for (int64_t k = 0; k < asked_; ++k) {
      const double apart = shares_[static_cast<size_t>(k)] - shares_[static_cast<size_t>(k) + 1];
      check_at_least(shares_[0] * (2 / apart));  // the first word alone, a token each time
      least_words_ = std::max(least_words_, static_cast<int64_t>(std::ceil(2 / apart)));
    }
    check_length(options_.noise ? 0 : 64);
  }

 private:
  Sketch sketch(Random& random) const override {
    const words::Shuffled order(word_count_, random);
    std::vector<std::string> asked;
    for (int64_t i = 0; i < asked_; ++i) asked.push_back(word(order, i));
    Sketch s;
    finish(s, "frequent_words", asked);
    s.write = [this, order](Task& task, int64_t tokens, Random r) { write(task, order, tokens, r); };
    return s;
  }

  int64_t times(int64_t total, size_t k) const {
    return static_cast<int64_t>(static_cast<double>(total) * shares_[k]);
  }

  void write(Task& task, const words::Shuffled& order, int64_t tokens, Random& random) const {
    std::vector<std::string> all;
    std::vector<int64_t> costs;
    for (int64_t k = 0; k < vocabulary_; ++k) {
      all.push_back(word(order, k));
      costs.push_back(cost(all.back()));
    }
    const auto tokens_of = [&](int64_t total) {
      int64_t sum = 0;
      for (size_t k = 0; k < costs.size(); ++k) sum += times(total, k) * costs[k];
      return sum;
    };
    // The most words that fit beside the least ones, which the problem is never without.
    const int64_t room = tokens_of(least_words_) + tokens;
    int64_t low = least_words_, high = 2 * least_words_;
    while (tokens_of(high) <= room) high *= 2;
    while (high - low > 1) {
      const int64_t middle = low + (high - low) / 2;
      (tokens_of(middle) <= room ? low : high) = middle;
    }
    while (low > least_words_ && !padding_.reaches(room - tokens_of(low))) --low;
    std::vector<std::string> list;
    for (size_t k = 0; k < all.size(); ++k)
      list.insert(list.end(), static_cast<size_t>(times(low, k)), all[k]);
    shuffle(list, random);
    put(task, "Below is a coded text. Keep in mind how often each of its words is used.", list,
        room - tokens_of(low), false,
        fmt::format("Which {} words are used most often in the coded text? Answer with them alone, separated "
                    "by commas.",
                    asked_));
  }

  int64_t asked_ = 0, vocabulary_ = 0, least_words_ = 1;
  std::vector<double> shares_;
};

}  // namespace

std::unique_ptr<Generator> make_common_words(JsonReader& options, const PromptTokens& tokens) {
  return std::make_unique<CommonWords>(options, tokens);
}
std::unique_ptr<Generator> make_frequent_words(JsonReader& options, const PromptTokens& tokens) {
  return std::make_unique<FrequentWords>(options, tokens);
}

}  // namespace perigee::rollout
