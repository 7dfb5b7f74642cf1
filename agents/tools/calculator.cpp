#include "agents/tools/calculator.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdint>

#include "agents/tools/big_integer.h"
#include "base/text.h"

namespace perigee::agents {
namespace {

constexpr size_t kMaxText = 4096;
constexpr int kMaxDepth = 100;
constexpr size_t kMaxBits = 10000;
// Steps on 32-bit limbs that one expression may take; about 50 ms.
constexpr int64_t kMaxWork = 30'000'000;
constexpr int kAboutDigits = 12;

// What ends the evaluation: caught in calculate(). At a position in the text, or of the whole when npos.
struct Refused {
  std::string what;
  size_t position = std::string_view::npos;
};

struct Rational {
  BigInteger numerator = 0;
  BigInteger denominator = 1;  // > 0, in lowest terms
  bool whole() const { return denominator == BigInteger(1); }
};

BigInteger power_of(const BigInteger& base, int64_t exponent) {
  BigInteger out = 1, square = base;
  for (; exponent > 0; exponent >>= 1) {
    if ((exponent & 1) != 0) out = out * square;
    if (exponent > 1) square = square * square;
  }
  return out;
}

class Parser {
 public:
  explicit Parser(std::string_view text) : text_(text) {}

  Rational parse() {
    Rational value = expression();
    skip_space();
    if (at_ < text_.size()) {
      if (peek() == ')') fail("this ')' closes nothing");
      if (peek() == ',') fail("a number is written without commas");
      if (peek() == '=') fail("an expression is expected, without '='");
      fail(fmt::format("an operator is expected, not {}", here()));
    }
    return value;
  }

 private:
  [[noreturn]] void fail(std::string what) { throw Refused{std::move(what), at_}; }
  char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }
  void skip_space() {
    while (at_ < text_.size() &&
           (text_[at_] == ' ' || text_[at_] == '\t' || text_[at_] == '\n' || text_[at_] == '\r'))
      ++at_;
  }
  // The character at the position, for messages.
  std::string here() const {
    if (at_ >= text_.size()) return "the end";
    return quote(text_.substr(at_, std::max<size_t>(1, utf8_sequence_bytes(text_.substr(at_)))));
  }

  void work(size_t limbs_a, size_t limbs_b) {
    work_ += static_cast<int64_t>((limbs_a + 1) * (limbs_b + 1));
    if (work_ > kMaxWork) throw Refused{"this takes too long to calculate"};
  }
  void check_size(const BigInteger& value) {
    if (value.bits() > kMaxBits) throw Refused{"a value on the way has more than 3,000 digits"};
  }

  Rational reduced(BigInteger numerator, BigInteger denominator) {
    if (denominator.negative()) {
      numerator = -numerator;
      denominator = -denominator;
    }
    if (denominator != BigInteger(1)) {
      BigInteger a = numerator.negative() ? -numerator : numerator, b = denominator;
      while (!b.zero()) {
        work(a.limbs() - std::min(a.limbs(), b.limbs()) + 4, b.limbs());
        BigInteger rest = BigInteger::divide(a, b).remainder;
        a = std::move(b);
        b = std::move(rest);
      }
      if (a != BigInteger(1)) {
        numerator = BigInteger::divide(numerator, a).quotient;
        denominator = BigInteger::divide(denominator, a).quotient;
      }
    }
    check_size(numerator);
    check_size(denominator);
    return {std::move(numerator), std::move(denominator)};
  }
  BigInteger times(const BigInteger& a, const BigInteger& b) {
    work(a.limbs(), b.limbs());
    return a * b;
  }

  Rational add(const Rational& a, const Rational& b, bool minus) {
    const BigInteger left = times(a.numerator, b.denominator), right = times(b.numerator, a.denominator);
    return reduced(minus ? left - right : left + right, times(a.denominator, b.denominator));
  }
  Rational multiply(const Rational& a, const Rational& b) {
    return reduced(times(a.numerator, b.numerator), times(a.denominator, b.denominator));
  }
  Rational divide(const Rational& a, const Rational& b, size_t position) {
    if (b.numerator.zero()) throw Refused{"division by zero", position};
    return reduced(times(a.numerator, b.denominator), times(a.denominator, b.numerator));
  }
  Rational modulo(const Rational& a, const Rational& b, size_t position) {
    if (b.numerator.zero()) throw Refused{"the remainder of a division by zero", position};
    const Rational ratio = divide(a, b, position);
    work(ratio.numerator.limbs(), ratio.denominator.limbs());
    const BigInteger::Division d = BigInteger::divide(ratio.numerator, ratio.denominator);
    BigInteger floor = d.quotient;
    if (d.remainder.negative()) floor = floor - BigInteger(1);
    return add(a, multiply(b, {floor, 1}), true);
  }
  Rational power(const Rational& base, const Rational& exponent, size_t position) {
    if (!exponent.whole()) throw Refused{"the exponent is not a whole number", position};
    const bool inverse = exponent.numerator.negative();
    if (base.numerator.zero()) {
      if (inverse) throw Refused{"division by zero: zero to a negative power", position};
      return {exponent.numerator.zero() ? 1 : 0, 1};
    }
    // A magnitude of one has powers of one bit however large the exponent is.
    const size_t bits = std::max(base.numerator.bits(), base.denominator.bits());
    const bool unit = bits == 1;
    if (unit) return {base.numerator.negative() && exponent.numerator.odd() ? -1 : 1, 1};
    const BigInteger limit = static_cast<int64_t>(kMaxBits + 1);
    const BigInteger magnitude = inverse ? -exponent.numerator : exponent.numerator;
    if (BigInteger::compare(magnitude, limit) > 0 ||
        static_cast<size_t>(magnitude.small()) * (bits - 1) > kMaxBits)
      throw Refused{"this power has more than 3,000 digits", position};
    const size_t limbs = static_cast<size_t>(magnitude.small()) * bits / 32 + 1;
    work(2 * limbs, limbs);
    BigInteger up = power_of(base.numerator, magnitude.small()),
               down = power_of(base.denominator, magnitude.small());
    check_size(up);
    check_size(down);
    if (!inverse) return {std::move(up), std::move(down)};
    if (up.negative()) return {-down, -up};
    return {std::move(down), std::move(up)};
  }

  Rational expression() {
    Rational value = term();
    for (;;) {
      skip_space();
      if (peek() != '+' && peek() != '-') return value;
      const bool minus = text_[at_++] == '-';
      value = add(value, term(), minus);
    }
  }

  Rational term() {
    Rational value = factor();
    for (;;) {
      skip_space();
      const char op = peek();
      if (op != '*' && op != '/' && op != '%') return value;
      const size_t position = at_++;
      if (op == '/' && peek() == '/') fail("'//' is unknown: (a - a % b) / b divides to a whole number");
      const Rational right = factor();
      value = op == '*'   ? multiply(value, right)
              : op == '/' ? divide(value, right, position)
                          : modulo(value, right, position);
    }
  }

  Rational factor() {
    skip_space();
    int signs = 0;
    bool negate = false;
    for (; peek() == '+' || peek() == '-'; ++at_, skip_space()) {
      negate ^= peek() == '-';
      if (++signs > kMaxDepth) fail("too many signs");
    }
    Rational value = powers();
    if (negate) value.numerator = -value.numerator;
    return value;
  }

  Rational powers() {
    const Rational base = atom();
    skip_space();
    const size_t position = at_;
    if (peek() == '^')
      ++at_;
    else if (text_.substr(at_, 2) == "**")
      at_ += 2;
    else
      return base;
    deeper();
    const Rational exponent = factor();
    --depth_;
    return power(base, exponent, position);
  }

  Rational atom() {
    skip_space();
    if (peek() != '(') return number();
    const size_t open = at_++;
    deeper();
    const Rational value = expression();
    --depth_;
    skip_space();
    if (at_ >= text_.size()) throw Refused{"this '(' is never closed", open};
    if (peek() == ',') fail("a number is written without commas");
    if (peek() != ')') fail(fmt::format("an operator or ')' is expected, not {}", here()));
    ++at_;
    return value;
  }

  void deeper() {
    if (++depth_ > kMaxDepth) fail(fmt::format("nested deeper than {}", kMaxDepth));
  }

  std::string_view digits() {
    const size_t begin = at_;
    while (at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9') ++at_;
    return text_.substr(begin, at_ - begin);
  }

  Rational number() {
    const size_t begin = at_;
    const std::string_view before = digits();
    std::string_view after;
    if (peek() == '.') {
      ++at_;
      after = digits();
    }
    if (before.empty() && after.empty()) {
      at_ = begin;
      const char c = peek();
      const bool letter = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
      fail(letter ? fmt::format("a number is expected, not {}; names and functions are unknown here", here())
                  : fmt::format("a number is expected, not {}", here()));
    }
    int64_t exponent = -static_cast<int64_t>(after.size());
    if (peek() == 'e' || peek() == 'E') {
      ++at_;
      const bool minus = peek() == '-';
      if (peek() == '-' || peek() == '+') ++at_;
      const std::string_view power = digits();
      if (power.empty()) fail("the digits of the exponent are missing");
      if (power.size() > 6) fail("this exponent is too large");
      const int64_t value = std::stoll(std::string(power));
      exponent += minus ? -value : value;
    }
    const BigInteger mantissa = BigInteger::from_digits(std::string(before) + std::string(after));
    if (mantissa.zero()) return {};
    if (exponent > 3100 || exponent < -3100 - static_cast<int64_t>(kMaxText))
      throw Refused{"this number has more than 3,000 digits", begin};
    const BigInteger scale = power_of(10, exponent < 0 ? -exponent : exponent);
    if (exponent >= 0) {
      BigInteger value = times(mantissa, scale);
      check_size(value);
      return {std::move(value), 1};
    }
    return reduced(mantissa, scale);
  }

  std::string_view text_;
  size_t at_ = 0;
  int depth_ = 0;
  int64_t work_ = 0;
};

// digits with a point before the last `places`.
std::string with_point(const std::string& number, int places) {
  const bool minus = number.front() == '-';
  std::string digits = number.substr(minus ? 1 : 0);
  const size_t after = static_cast<size_t>(places);
  if (digits.size() <= after) digits = std::string(after + 1 - digits.size(), '0') + digits;
  std::string out = minus ? "-" : "";
  out.append(digits, 0, digits.size() - after);
  if (places > 0) out.append(1, '.').append(digits, digits.size() - after);
  return out;
}

// Places after the point when the decimal ends within kDecimals, else -1.
int decimal_places(BigInteger denominator) {
  int twos = 0, fives = 0;
  for (const auto& [prime, count] : {std::pair{2, &twos}, std::pair{5, &fives}}) {
    for (; *count <= kDecimals; ++*count) {
      BigInteger::Division d = BigInteger::divide(denominator, prime);
      if (!d.remainder.zero()) break;
      denominator = std::move(d.quotient);
    }
  }
  const int places = std::max(twos, fives);
  return denominator == BigInteger(1) && places <= kDecimals ? places : -1;
}

// kAboutDigits significant digits, rounded half away from zero.
std::string about(const Rational& value) {
  const BigInteger top = value.numerator.negative() ? -value.numerator : value.numerator;
  const BigInteger low = power_of(10, kAboutDigits - 1), high = power_of(10, kAboutDigits);
  // value = mantissa * 10^-scale with low <= mantissa < high; the guess from the sizes is at most one off.
  const double digits =
      0.30103 * (static_cast<double>(top.bits()) - static_cast<double>(value.denominator.bits()));
  int64_t scale = kAboutDigits - 1 - static_cast<int64_t>(digits);
  BigInteger mantissa;
  for (int tries = 0; tries < 5; ++tries) {
    const BigInteger up = scale >= 0 ? top * power_of(10, scale) : top;
    const BigInteger down = scale >= 0 ? value.denominator : value.denominator * power_of(10, -scale);
    mantissa = BigInteger::divide(up * 2 + down, down * 2).quotient;
    if (BigInteger::compare(mantissa, low) < 0)
      ++scale;
    else if (BigInteger::compare(mantissa, high) >= 0)
      --scale;
    else
      break;
  }
  const std::string sign = value.numerator.negative() ? "-" : "";
  if (scale >= 0 && scale <= kAboutDigits + 5)
    return sign + with_point(mantissa.text(), static_cast<int>(scale));
  return fmt::format("{}{}e{}", sign, with_point(mantissa.text(), kAboutDigits - 1),
                     kAboutDigits - 1 - scale);
}

std::string value_text(const Rational& value) {
  if (value.whole()) return value.numerator.text();
  const int places = decimal_places(value.denominator);
  if (places >= 0) {
    const BigInteger scaled =
        BigInteger::divide(value.numerator * power_of(10, places), value.denominator).quotient;
    return with_point(scaled.text(), places);
  }
  return fmt::format("{}/{} (about {})", value.numerator.text(), value.denominator.text(), about(value));
}

class Calculator final : public Tool {
 public:
  const std::string& name() const override { return name_; }
  nlohmann::ordered_json declaration() const override {
    using Json = nlohmann::ordered_json;
    return Json{
        {"type", "function"},
        {"function",
         Json{{"name", name_},
              {"description",
               "Exact arithmetic with + - * / % ^ and parentheses on whole numbers, decimals and fractions."},
              {"parameters",
               Json{{"type", "object"},
                    {"properties", Json{{"expression", Json{{"type", "string"},
                                                            {"description", "for example 12.5 * (3 + 4)"},
                                                            {"maxLength", kMaxText}}}}},
                    {"required", Json::array({"expression"})},
                    {"additionalProperties", false}}}}}};
  }
  ToolResult call(const nlohmann::json& arguments, const ToolContext& context) override {
    Calculation c = calculate(arguments.at("expression").get_ref<const std::string&>());
    if (static_cast<int64_t>(c.text.size()) > context.output_bytes) {
      const std::string all = fmt::format("the value is {} characters long and does not fit", c.text.size());
      return {all.substr(0, static_cast<size_t>(context.output_bytes)), "limit"};
    }
    return {std::move(c.text), c.ok ? "ok" : "error"};
  }

 private:
  const std::string name_ = "calculator";
};

}  // namespace

Calculation calculate(std::string_view expression) {
  if (expression.size() > kMaxText)
    return {false, fmt::format("the expression is longer than {} characters", kMaxText)};
  if (expression.find_first_not_of(" \t\r\n") == std::string_view::npos)
    return {false, "the expression is empty; write one such as 2 + 3 * 4"};
  try {
    return {true, value_text(Parser(expression).parse())};
  } catch (const Refused& r) {
    if (r.position == std::string_view::npos) return {false, r.what};
    return {false, fmt::format("at character {}: {}", r.position + 1, r.what)};
  }
}

std::unique_ptr<Tool> make_calculator() {
  return std::make_unique<Calculator>();
}

}  // namespace perigee::agents
