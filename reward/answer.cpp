// Verifiers that compare a section of the response with the reference answer: exact, numeric, regex.
#include <re2/re2.h>

#include <algorithm>
#include <array>
#include <stdexcept>

#include "base/error.h"
#include "base/text.h"
#include "reward/number.h"
#include "reward/section.h"
#include "reward/verifiers.h"

namespace perigee::reward {
namespace {

char lower(char c) {
  return c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
}

// Verdict 0 that shows what stood in place of the answer.
Verdict wrong(std::string_view found) {
  return {0, fmt::format("found {}", quote(found, 80))};
}

class Exact : public Verifier {
 public:
  explicit Exact(JsonReader& options)
      : section_(options),
        ignore_case_(options.boolean("ignore_case", false)),
        collapse_(options.boolean("collapse_whitespace", true)) {}

  bool judges() const override { return true; }
  Verdict verify(const RewardInput& input, const GroupContext*, Budget& budget) const override {
    Verdict verdict;
    const auto found = section_.find(input, verdict.detail);
    if (!found) return verdict;
    return same(*found, trim(input.answer), budget) ? Verdict{1, {}} : wrong(*found);
  }

 private:
  // Compares without copying: a megabyte of response is given up on at its first difference.
  bool same(std::string_view a, std::string_view b, Budget& budget) const {
    size_t i = 0, j = 0;
    while (i < a.size() && j < b.size()) {
      budget.spend();
      if (collapse_ && is_space(a[i]) && is_space(b[j])) {
        while (i < a.size() && is_space(a[i])) ++i, budget.spend();
        while (j < b.size() && is_space(b[j])) ++j;
        continue;
      }
      if (a[i] != b[j] && !(ignore_case_ && lower(a[i]) == lower(b[j]))) return false;
      ++i, ++j;
    }
    return i == a.size() && j == b.size();
  }
  Section section_;
  bool ignore_case_, collapse_;
};

// What the last \boxed{...} holds, braces matched; nullopt when it is never closed.
std::optional<std::string_view> boxed(std::string_view text, size_t macro, Budget& budget) {
  const size_t open = text.find('{', macro);
  int64_t depth = 0;
  for (size_t i = open; i < text.size(); ++i) {
    budget.spend();
    if (text[i] == '{') ++depth;
    if (text[i] == '}' && --depth == 0) return text.substr(open + 1, i - open - 1);
  }
  return std::nullopt;
}

class Numeric : public Verifier {
 public:
  explicit Numeric(JsonReader& options)
      : section_(options),
        absolute_(options.number("tolerance", 0, 1e300, 0)),
        relative_(options.number("relative_tolerance", 0, 1, 0)) {
    const std::string take = options.string("take", "auto");
    const std::array<std::string, 4> names = {"auto", "boxed", "last", "whole"};
    const auto at = std::find(names.begin(), names.end(), take);
    if (at == names.end())
      options.fail("take", "one of auto, boxed, last, whole is expected, not " + quote(take) +
                               did_you_mean(take, names));
    take_ = static_cast<Take>(at - names.begin());
  }

  bool judges() const override { return true; }
  Verdict verify(const RewardInput& input, const GroupContext*, Budget& budget) const override {
    const FoundNumber reference = read_reference(input.answer, budget);
    Verdict verdict;
    const auto section = section_.find(input, verdict.detail);
    if (!section) return verdict;
    const FoundNumber found = read(*section, budget, verdict.detail);
    if (found.state == FoundNumber::State::kNone) {
      if (verdict.detail.empty()) verdict.detail = "no number";
      return verdict;
    }
    if (found.state == FoundNumber::State::kBad) return {0, "not a number: " + quote(found.text, 80)};
    return within(found.value, reference.value, absolute_, relative_) ? Verdict{1, {}} : wrong(found.text);
  }

 private:
  enum class Take { kAuto, kBoxed, kLast, kWhole };

  static FoundNumber read_reference(std::string_view answer, Budget& budget) {
    FoundNumber reference = last_number(answer, budget);
    if (reference.state != FoundNumber::State::kGood || reference.count != 1)
      throw std::runtime_error(fmt::format("the reference answer {} is not one number", quote(answer)));
    return reference;
  }

  FoundNumber read(std::string_view text, Budget& budget, std::string& why) const {
    if (take_ == Take::kWhole) return whole_number(text, budget);
    if (take_ == Take::kLast) return last_number(text, budget);
    const size_t macro = text.rfind("\\boxed{");
    if (macro == text.npos) {
      if (take_ == Take::kAuto) return last_number(text, budget);
      why = "no \\boxed{...}";
      return {};
    }
    const auto content = boxed(text, macro, budget);
    if (!content) {
      why = "\\boxed{ is never closed";
      return {};
    }
    FoundNumber found = last_number(*content, budget);
    if (found.count <= 1) return found;
    why = "several numbers in \\boxed{...}";  // a list of guesses is no answer
    return {};
  }

  Section section_;
  double absolute_, relative_;
  Take take_ = Take::kAuto;
};

class Regex : public Verifier {
 public:
  explicit Regex(JsonReader& options) : section_(options), full_(options.boolean("full", false)) {
    const std::string pattern = options.string("pattern");
    group_ = static_cast<int>(options.integer("group", -1, 100, -1));
    if (pattern.size() > kMaxPatternBytes)
      options.fail("pattern",
                   fmt::format("{} bytes; at most {} are accepted", pattern.size(), kMaxPatternBytes));
    RE2::Options re_options;
    re_options.set_log_errors(false);
    re_options.set_max_mem(kMaxMemoryBytes);
    re_ = std::make_unique<RE2>(pattern, re_options);
    if (!re_->ok()) options.fail("pattern", fmt::format("{}: {}", quote(pattern), re_->error()));
    if (group_ > re_->NumberOfCapturingGroups())
      options.fail("group",
                   fmt::format("{}, but the pattern has {}", group_, re_->NumberOfCapturingGroups()));
  }

  bool judges() const override { return true; }
  Verdict verify(const RewardInput& input, const GroupContext*, Budget& budget) const override {
    Verdict verdict;
    const auto section = section_.find(input, verdict.detail);
    if (!section) return verdict;
    // RE2 cannot be interrupted, but its work is at most (instructions) * (bytes).
    const auto work = static_cast<uint64_t>(re_->ProgramSize()) * section->size();
    if (work > kMaxWork)
      throw std::runtime_error(
          fmt::format("a pattern of {} instructions on {} bytes is more work than allowed",
                      re_->ProgramSize(), section->size()));
    std::vector<re2::StringPiece> groups(static_cast<size_t>(std::max(group_, 0)) + 1);
    const bool found = re_->Match(*section, 0, section->size(), full_ ? RE2::ANCHOR_BOTH : RE2::UNANCHORED,
                                  groups.data(), static_cast<int>(groups.size()));
    budget.spend(section->size());
    if (!found) return {0, "no match"};
    if (group_ < 0) return {1, {}};
    const re2::StringPiece& capture = groups[static_cast<size_t>(group_)];
    const std::string_view text(capture.data() ? capture.data() : "", capture.size());
    return trim(text) == trim(input.answer) ? Verdict{1, {}} : wrong(text);
  }

 private:
  static constexpr size_t kMaxPatternBytes = 4096;
  static constexpr int64_t kMaxMemoryBytes = 1 << 20;
  static constexpr uint64_t kMaxWork = 1'000'000'000;  // a few seconds in RE2's slowest mode
  Section section_;
  bool full_;
  int group_ = -1;
  std::unique_ptr<RE2> re_;
};

}  // namespace

std::unique_ptr<Verifier> make_exact(JsonReader& options) {
  return std::make_unique<Exact>(options);
}
std::unique_ptr<Verifier> make_numeric(JsonReader& options) {
  return std::make_unique<Numeric>(options);
}
std::unique_ptr<Verifier> make_regex(JsonReader& options) {
  return std::make_unique<Regex>(options);
}

}  // namespace perigee::reward
