// The countdown game: an expression that reaches a target.
#include <algorithm>
#include <charconv>
#include <map>
#include <numeric>
#include <stdexcept>

#include "base/error.h"
#include "base/text.h"
#include "reward/expression.h"
#include "reward/section.h"
#include "reward/verifiers.h"

namespace perigee::reward {
namespace {

constexpr size_t kMaxBytes = 4096;
constexpr int kMaxDepth = 64;

struct Fraction {
  int64_t over = 0, under = 1;
};

struct Problem {
  std::string text;
};

Fraction lowest_terms(__int128 over, __int128 under) {
  if (under == 0) throw Problem{"division by zero"};
  if (under < 0) over = -over, under = -under;
  __int128 a = over < 0 ? -over : over, b = under;
  while (b != 0) {
    const __int128 rest = a % b;
    a = b;
    b = rest;
  }
  if (a > 1) over /= a, under /= a;
  if (over > INT64_MAX || over < -INT64_MAX || under > INT64_MAX) throw Problem{"a value beyond 64 bits"};
  return {static_cast<int64_t>(over), static_cast<int64_t>(under)};
}

class Parser {
 public:
  Parser(std::string_view text, std::vector<int64_t>& numbers) : text_(text), numbers_(numbers) {}
  Fraction parse() {
    const Fraction value = sum(0);
    if (peek() != '\0') unexpected();
    return value;
  }

 private:
  // The operator at hand in ASCII, '\0' at the end; bytes_ is its length.
  char peek() {
    while (at_ < text_.size() && is_space(text_[at_])) ++at_;
    bytes_ = 1;
    if (at_ == text_.size()) return '\0';
    const std::string_view rest = text_.substr(at_);
    for (const auto& [sign, ascii] : {std::pair{"\xC3\x97", '*'}, {"\xC3\xB7", '/'}, {"\xE2\x88\x92", '-'}})
      if (rest.starts_with(sign)) {
        bytes_ = std::string_view(sign).size();
        return ascii;
      }
    return text_[at_] == '\0' ? '?' : text_[at_];
  }
  bool take(char c) {
    if (peek() != c) return false;
    at_ += bytes_;
    return true;
  }
  [[noreturn]] void unexpected() {
    if (at_ == text_.size()) throw Problem{"it ends too early"};
    throw Problem{fmt::format("unexpected {} at byte {}", quote(text_.substr(at_, 1)), at_)};
  }

  Fraction sum(int depth) {
    Fraction a = product(depth);
    for (;;) {
      const bool plus = take('+');
      if (!plus && !take('-')) return a;
      const Fraction b = product(depth);
      const __int128 left = static_cast<__int128>(a.over) * b.under,
                     right = static_cast<__int128>(b.over) * a.under;
      a = lowest_terms(plus ? left + right : left - right, static_cast<__int128>(a.under) * b.under);
    }
  }
  Fraction product(int depth) {
    Fraction a = factor(depth);
    for (;;) {
      const bool times = take('*');
      if (!times && !take('/')) return a;
      const Fraction b = factor(depth);
      a = times
              ? lowest_terms(static_cast<__int128>(a.over) * b.over, static_cast<__int128>(a.under) * b.under)
              : lowest_terms(static_cast<__int128>(a.over) * b.under,
                             static_cast<__int128>(a.under) * b.over);
    }
  }
  Fraction factor(int depth) {
    if (depth > kMaxDepth) throw Problem{fmt::format("nested deeper than {} levels", kMaxDepth)};
    if (take('-')) {
      const Fraction a = factor(depth + 1);
      return {-a.over, a.under};
    }
    if (take('(')) {
      const Fraction a = sum(depth + 1);
      if (!take(')')) unexpected();
      return a;
    }
    const char c = peek();
    if (c < '0' || c > '9') unexpected();
    int64_t value = 0;
    const auto [end, error] = std::from_chars(text_.data() + at_, text_.data() + text_.size(), value);
    if (error != std::errc()) throw Problem{"a number beyond 64 bits"};
    at_ = static_cast<size_t>(end - text_.data());
    numbers_.push_back(value);
    return {value, 1};
  }

  std::string_view text_;
  std::vector<int64_t>& numbers_;
  size_t at_ = 0, bytes_ = 1;
};

class Countdown : public Verifier {
 public:
  explicit Countdown(JsonReader& options)
      : section_(options),
        use_all_(options.boolean("use_all", false)),
        partial_(options.number("partial", 0, 1, 0)) {}

  bool judges() const override { return true; }
  Verdict verify(const RewardInput& input, const GroupContext*, Budget&) const override {
    int64_t target = 0;
    std::map<int64_t, int> supply = read_answer(input.answer, target);
    Verdict verdict;
    const auto section = section_.find(input, verdict.detail);
    if (!section) return verdict;
    std::string_view text = *section;
    if (const size_t equals = text.rfind('='); equals != text.npos) {  // "3*8 = 24" claims what it computes
      if (trim(text.substr(equals + 1)) != std::to_string(target))
        return {0, "it says it equals something else"};
      text = trim(text.substr(0, equals));
    }
    const Expression e = evaluate(text);
    if (!e.ok) return {0, e.problem};
    for (const int64_t n : e.numbers) {
      const auto it = supply.find(n);
      if (it == supply.end() || it->second == 0) return {0, fmt::format("{} is not there to be used", n)};
      --it->second;
    }
    if (use_all_ && std::any_of(supply.begin(), supply.end(), [](const auto& s) { return s.second > 0; }))
      return {0, "not all numbers are used"};
    if (e.numerator == target && e.denominator == 1) return {1, {}};
    return {partial_, e.denominator == 1 ? fmt::format("it equals {}", e.numerator)
                                         : fmt::format("it equals {}/{}", e.numerator, e.denominator)};
  }

 private:
  // "24 from 3 5 8"
  static std::map<int64_t, int> read_answer(std::string_view answer, int64_t& target) {
    const auto bad = [&] {
      return std::runtime_error(
          fmt::format("the answer {} is not of the form \"24 from 3 5 8\"", quote(answer)));
    };
    const size_t from = answer.find("from");
    if (from == answer.npos) throw bad();
    const auto integer = [&](std::string_view word) {
      int64_t value = 0;
      const auto [end, error] = std::from_chars(word.data(), word.data() + word.size(), value);
      if (word.empty() || error != std::errc() || end != word.data() + word.size()) throw bad();
      return value;
    };
    target = integer(trim(answer.substr(0, from)));
    std::map<int64_t, int> supply;
    for (std::string_view rest = trim(answer.substr(from + 4)); !rest.empty();) {
      size_t end = 0;
      while (end < rest.size() && !is_space(rest[end])) ++end;
      ++supply[integer(rest.substr(0, end))];
      rest = trim(rest.substr(end));
    }
    return supply;
  }

  Section section_;
  bool use_all_;
  double partial_;
};

}  // namespace

Expression evaluate(std::string_view text) {
  Expression result;
  try {
    if (text.size() > kMaxBytes) throw Problem{fmt::format("longer than {} bytes", kMaxBytes)};
    const Fraction value = Parser(text, result.numbers).parse();
    result.numerator = value.over;
    result.denominator = value.under;
    result.ok = true;
  } catch (const Problem& problem) {
    result.problem = problem.text;
  }
  return result;
}

std::unique_ptr<Verifier> make_countdown(JsonReader& options) {
  return std::make_unique<Countdown>(options);
}

}  // namespace perigee::reward
