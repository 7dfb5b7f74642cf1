// Arithmetic with its written-out steps.
#include <algorithm>
#include <cstdlib>

#include "base/error.h"
#include "base/text.h"
#include "rollout/tasks/detail.h"

namespace perigee::rollout {
namespace {

constexpr int kMaxTries = 20000;

int64_t power_of_10(int64_t n) {
  int64_t p = 1;
  while (n-- > 0) p *= 10;
  return p;
}

// The digits of a >= 0, least significant first; at least one.
std::vector<int> digits_of(int64_t a) {
  std::vector<int> digits;
  do {
    digits.push_back(static_cast<int>(a % 10));
    a /= 10;
  } while (a > 0);
  return digits;
}

int digit(const std::vector<int>& digits, size_t i) {
  return i < digits.size() ? digits[i] : 0;
}

void step(std::string& out, const std::string& text) {
  if (!out.empty()) out += ' ';
  out += text;
}

std::string add_steps(int64_t a, int64_t b) {
  const auto x = digits_of(a), y = digits_of(b);
  std::string out;
  int carry = 0;
  const size_t n = std::max(x.size(), y.size());
  for (size_t i = 0; i < n; ++i) {
    const int sum = digit(x, i) + digit(y, i) + carry;
    std::string text = fmt::format("{}+{}", digit(x, i), digit(y, i));
    if (carry > 0) text += fmt::format("+{}", carry);
    text += fmt::format("={}", sum);
    carry = sum / 10;
    if (carry > 0 && i + 1 < n) text += fmt::format("c{}", carry);
    step(out, text);
  }
  return out;
}

// a >= b
std::string subtract_steps(int64_t a, int64_t b) {
  const auto x = digits_of(a), y = digits_of(b);
  std::string out;
  int borrow = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    const int difference = x[i] - digit(y, i) - borrow;
    std::string text = fmt::format("{}-{}", x[i], digit(y, i));
    if (borrow > 0) text += fmt::format("-{}", borrow);
    borrow = difference < 0;
    text += fmt::format("={}", difference + 10 * borrow);
    if (borrow > 0) text += fmt::format("b{}", borrow);
    step(out, text);
  }
  return out;
}

std::string multiply_steps_by_digit(int64_t a, int b) {
  const auto x = digits_of(a);
  std::string out;
  int carry = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    const int product = x[i] * b + carry;
    std::string text = fmt::format("{}*{}", x[i], b);
    if (carry > 0) text += fmt::format("+{}", carry);
    text += fmt::format("={}", product);
    carry = product / 10;
    if (carry > 0 && i + 1 < x.size()) text += fmt::format("c{}", carry);
    step(out, text);
  }
  return out;
}

struct Section {
  std::string steps;
  int64_t value = 0;
};

// x + y of any signs: a sum or a difference of magnitudes.
Section add_signed(int64_t x, int64_t y) {
  const int64_t value = x + y, a = std::abs(x), b = std::abs(y);
  if (x >= 0 && y >= 0) return {add_steps(a, b), value};
  if (x < 0 && y < 0) return {"n" + add_steps(a, b), value};
  return {(value < 0 ? "n" : "") + subtract_steps(std::max(a, b), std::min(a, b)), value};
}

void multiply(int64_t a, int64_t b, std::vector<Section>& sections) {
  const bool negative = (a < 0) != (b < 0);
  a = std::abs(a);
  const auto y = digits_of(std::abs(b));
  int64_t total = 0;
  for (size_t i = 0; i < y.size(); ++i) {
    const int64_t part = a * y[i] * power_of_10(static_cast<int64_t>(i));
    sections.push_back({multiply_steps_by_digit(a, y[i]), part});
    if (i > 0) sections.push_back({add_steps(total, part), total + part});
    total += part;
  }
  if (negative) {
    sections.back().steps = "n" + sections.back().steps;
    sections.back().value = -sections.back().value;
  }
}

// Products first, then sums from left to right.
std::vector<Section> work_out(std::span<const int64_t> operands, std::string_view operators) {
  PERIGEE_CHECK(!operands.empty() && operands.size() == operators.size() + 1, "{} operands, {} operators",
                operands.size(), operators.size());
  std::vector<Section> sections;
  std::vector<int64_t> terms = {operands[0]};
  std::string signs;
  for (size_t i = 0; i < operators.size(); ++i) {
    if (operators[i] == '*') {
      multiply(terms.back(), operands[i + 1], sections);
      terms.back() = sections.back().value;
    } else {
      signs += operators[i];
      terms.push_back(operands[i + 1]);
    }
  }
  int64_t value = terms[0];
  for (size_t i = 0; i < signs.size(); ++i) {
    sections.push_back(add_signed(value, signs[i] == '+' ? terms[i + 1] : -terms[i + 1]));
    value = sections.back().value;
  }
  return sections;
}

class Arithmetic : public Generator {
 public:
  Arithmetic(JsonReader& options, WorkedStyle style) : style_(std::move(style)) {
    max_digits_ = options.integer("max_digits", 1, 9, 2);
    min_digits_ = options.integer("min_digits", 1, max_digits_, 1);
    max_operands_ = options.integer("max_operands", 2, 8, 2);
    min_operands_ = options.integer("min_operands", 2, max_operands_, 2);
    operators_ = options.string("operators", "+-");
    negative_ = options.boolean("negative", false);
    if (operators_.empty() || operators_.find_first_not_of("+-*") != operators_.npos)
      options.fail("operators", fmt::format("some of + - * are expected, not {}", quote(operators_)));
    if (operators_.find('*') != operators_.npos && max_digits_ * max_operands_ > 17)
      options.fail("max_digits", "products of so many digits are beyond 64 bits");
  }

  Problem draw(Random& random) const override {
    std::vector<int64_t> operands;
    std::string operators;
    for (int tries = 0;; ++tries) {
      if (tries == kMaxTries)
        throw_input(
            "tasks: hardly any arithmetic problem of these options stays at 0 or above; set negative to "
            "true");
      operands.clear();
      operators.clear();
      for (int64_t n = random.next_int(min_operands_, max_operands_); n > 0; --n)
        operands.push_back(draw_operand(random));
      while (operators.size() + 1 < operands.size())
        operators +=
            operators_[static_cast<size_t>(random.next_int(0, static_cast<int64_t>(operators_.size()) - 1))];
      if (operators == "-" && !negative_ && operands[0] < operands[1]) std::swap(operands[0], operands[1]);
      if (negative_ || !goes_below_zero(operands, operators)) break;
    }

    Problem problem;
    problem.task.prompt = std::to_string(operands[0]);
    for (size_t i = 0; i < operators.size(); ++i)
      problem.task.prompt += operators[i] + std::to_string(operands[i + 1]);
    problem.task.prompt += '=';
    problem.task.answer = std::to_string(arithmetic_value(operands, operators));
    problem.task.verifier = "numeric";
    problem.task.worked_example =
        style_.think_open + arithmetic_steps(operands, operators) + style_.think_close + problem.task.answer;
    problem.canonical = canonical_arithmetic(operands, operators);
    return problem;
  }

 private:
  int64_t draw_operand(Random& random) const {
    const int64_t n = random.next_int(min_digits_, max_digits_);
    return random.next_int(n == 1 ? 0 : power_of_10(n - 1), power_of_10(n) - 1);
  }
  static bool goes_below_zero(const std::vector<int64_t>& operands, const std::string& operators) {
    for (const auto& section : work_out(operands, operators))
      if (section.value < 0) return true;
    return false;
  }

  WorkedStyle style_;
  int64_t min_digits_, max_digits_, min_operands_, max_operands_;
  std::string operators_;
  bool negative_ = false;
};

}  // namespace

// The operands in order, and the operators: the same for 47+38 and 38+47, and coarser than need be for longer problems,
// which only makes the two sides differ more.
std::string canonical_arithmetic(std::span<const int64_t> operands, std::string_view operators) {
  std::vector<int64_t> sorted_operands(operands.begin(), operands.end());
  std::string sorted_operators(operators);
  std::sort(sorted_operands.begin(), sorted_operands.end());
  std::sort(sorted_operators.begin(), sorted_operators.end());
  return fmt::format("arithmetic {} {}", sorted_operators, fmt::join(sorted_operands, " "));
}

std::string arithmetic_steps(std::span<const int64_t> operands, std::string_view operators) {
  const auto sections = work_out(operands, operators);
  if (sections.size() == 1) return sections[0].steps;
  std::string out;
  for (const auto& s : sections) out += fmt::format("{}{}={}", out.empty() ? "" : ";", s.steps, s.value);
  return out;
}

int64_t arithmetic_value(std::span<const int64_t> operands, std::string_view operators) {
  const auto sections = work_out(operands, operators);
  return sections.empty() ? operands[0] : sections.back().value;
}

std::unique_ptr<Generator> make_arithmetic(JsonReader& options, const WorkedStyle& style) {
  return std::make_unique<Arithmetic>(options, style);
}

}  // namespace perigee::rollout
