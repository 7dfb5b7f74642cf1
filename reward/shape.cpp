// Verifiers that look at the shape of a response, not at its answer: format, length, length_k15, repetition.
#include <algorithm>
#include <array>
#include <stdexcept>

#include "base/error.h"
#include "base/hash.h"
#include "base/text.h"
#include "reward/section.h"
#include "reward/verifiers.h"

namespace perigee::reward {
namespace {

class Format : public Verifier {
 public:
  explicit Format(JsonReader& options)
      : think_open_(options.string("think_open", "<think>")),
        think_close_(options.string("think_close", "</think>")),
        answer_open_(options.string("answer_open", "")),
        answer_close_(options.string("answer_close", "")),
        opened_by_prompt_(options.boolean("opened_by_prompt", false)) {
    if (think_open_.empty()) options.fail("think_open", "must not be empty");
    if (think_close_.empty()) options.fail("think_close", "must not be empty");
    if (answer_open_.empty() != answer_close_.empty())
      options.fail("answer_open", "answer_open and answer_close stand together or not at all");
  }

  Verdict verify(const RewardInput& input, const GroupContext*, Budget&) const override {
    if (input.finish == FinishReason::kLength) return {0, "cut off at the token limit"};
    std::string_view text = trim(input.response);
    if (!opened_by_prompt_) {
      if (!text.starts_with(think_open_)) return {0, "it does not begin with " + think_open_};
      text.remove_prefix(think_open_.size());
    }
    const size_t close = text.find(think_close_);
    if (close == text.npos) return {0, "no " + think_close_};
    if (text.substr(0, close).find(think_open_) != text.npos) return {0, "a second " + think_open_};
    std::string_view answer = trim(text.substr(close + think_close_.size()));
    for (const std::string& tag : {think_open_, think_close_})
      if (answer.find(tag) != answer.npos) return {0, tag + " after the thinking block"};
    if (!answer_open_.empty()) {
      if (!answer.starts_with(answer_open_)) return {0, "the answer does not begin with " + answer_open_};
      answer.remove_prefix(answer_open_.size());
      if (!answer.ends_with(answer_close_)) return {0, "the answer does not end with " + answer_close_};
      answer.remove_suffix(answer_close_.size());
      for (const std::string& tag : {answer_open_, answer_close_})
        if (answer.find(tag) != answer.npos) return {0, "a second " + tag};
    }
    if (trim(answer).empty()) return {0, "the answer is empty"};
    return {1, {}};
  }

 private:
  std::string think_open_, think_close_, answer_open_, answer_close_;
  bool opened_by_prompt_;
};

class Length : public Verifier {
 public:
  explicit Length(JsonReader& options)
      : limit_(options.integer("limit", 0, int64_t{1} << 40, 0)),
        cache_(options.integer("cache", 1, int64_t{1} << 40)) {
    if (limit_ > 0 && cache_ > limit_)
      options.fail("cache", fmt::format("{} is above limit {}", cache_, limit_));
  }
  double lowest() const override { return -1; }
  double highest() const override { return 0; }
  Verdict verify(const RewardInput& input, const GroupContext*, Budget&) const override {
    const int64_t limit = limit_ > 0 ? limit_ : input.max_tokens;
    if (limit < cache_)
      throw std::runtime_error(
          fmt::format("cache {} is above the sample's limit of {} tokens", cache_, limit));
    const int64_t free = limit - cache_, length = input.response_tokens;
    if (length <= free) return {0, {}};
    if (length > limit) return {-1, fmt::format("{} tokens", length)};
    return {static_cast<double>(free - length) / static_cast<double>(cache_),
            fmt::format("{} tokens", length)};
  }

 private:
  int64_t limit_, cache_;
};

class LengthK15 : public Verifier {
 public:
  double lowest() const override { return -0.5; }
  double highest() const override { return 0.5; }
  bool needs_group() const override { return true; }
  Verdict verify(const RewardInput& input, const GroupContext* group, Budget&) const override {
    if (group == nullptr) throw std::runtime_error("no group to compare with");
    const int64_t range = group->max_tokens - group->min_tokens;
    if (range <= 0) return {0, "all of one length"};
    const double place =
        static_cast<double>(input.response_tokens - group->min_tokens) / static_cast<double>(range);
    const double lambda = 0.5 - place;
    return {group->correct ? lambda : std::min(0.0, lambda), {}};
  }
};

class Repetition : public Verifier {
 public:
  explicit Repetition(JsonReader& options) : n_(static_cast<size_t>(options.integer("n", 1, 1000, 4))) {
    const std::string unit = options.string("unit", "word");
    const std::array<std::string, 2> names = {"word", "byte"};
    if (unit != "word" && unit != "byte")
      options.fail("unit", "word or byte is expected, not " + quote(unit) + did_you_mean(unit, names));
    by_word_ = unit == "word";
  }
  double lowest() const override { return -1; }
  double highest() const override { return 0; }
  Verdict verify(const RewardInput& input, const GroupContext*, Budget& budget) const override {
    std::vector<uint64_t> units = split(input.response, budget);
    if (units.size() < n_) return {0, {}};
    std::vector<uint64_t> grams = hash_grams(units, budget);
    const auto total = static_cast<double>(grams.size());
    std::sort(grams.begin(), grams.end());
    budget.spend(grams.size());
    const auto distinct = static_cast<double>(std::unique(grams.begin(), grams.end()) - grams.begin());
    return {distinct / total - 1, fmt::format("{} of {} {}-grams are distinct", distinct, total, n_)};
  }

 private:
  std::vector<uint64_t> split(std::string_view text, Budget& budget) const {
    std::vector<uint64_t> units;
    if (!by_word_) {
      for (const char c : text) units.push_back(static_cast<unsigned char>(c) + 1u);
      budget.spend(text.size());
      return units;
    }
    for (size_t i = 0; i < text.size();) {
      const size_t begin = i;
      while (i < text.size() && !is_space(text[i])) ++i;
      if (i > begin) units.push_back(hash128(text.substr(begin, i - begin)).low);
      budget.spend(i - begin + 1);
      while (i < text.size() && is_space(text[i])) ++i, budget.spend();
    }
    return units;
  }
  // A polynomial over each window of n units, modulo 2^64, then mixed: equal windows have equal hashes.
  std::vector<uint64_t> hash_grams(const std::vector<uint64_t>& units, Budget& budget) const {
    constexpr uint64_t base = 0x9E3779B97F4A7C15ull;
    uint64_t hash = 0, oldest = 1;
    for (size_t i = 1; i < n_; ++i) oldest *= base;
    std::vector<uint64_t> grams;
    grams.reserve(units.size() - n_ + 1);
    for (size_t i = 0; i < units.size(); ++i) {
      if (i >= n_) hash -= mix(units[i - n_]) * oldest;
      hash = hash * base + mix(units[i]);
      if (i + 1 >= n_) grams.push_back(hash);
      budget.spend();
    }
    return grams;
  }
  static uint64_t mix(uint64_t x) {
    x = (x ^ (x >> 33)) * 0xff51afd7ed558ccdull;
    x = (x ^ (x >> 33)) * 0xc4ceb9fe1a85ec53ull;
    return x ^ (x >> 33);
  }

  size_t n_;
  bool by_word_ = true;
};

}  // namespace

std::unique_ptr<Verifier> make_format(JsonReader& options) {
  return std::make_unique<Format>(options);
}
std::unique_ptr<Verifier> make_length(JsonReader& options) {
  return std::make_unique<Length>(options);
}
std::unique_ptr<Verifier> make_length_k15(JsonReader&) {
  return std::make_unique<LengthK15>();
}
std::unique_ptr<Verifier> make_repetition(JsonReader& options) {
  return std::make_unique<Repetition>(options);
}

}  // namespace perigee::reward
