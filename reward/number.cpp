#include "reward/number.h"

#include <array>
#include <charconv>
#include <optional>

#include "base/error.h"
#include "base/text.h"
#include "reward/section.h"

namespace perigee::reward {
namespace {

constexpr int64_t kMaxExponent = 1'000'000'000'000;

bool is_digit(char c) {
  return c >= '0' && c <= '9';
}
bool is_letter(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
}

// Zeros of the decimal digits of other scripts in Unicode 15, each followed by its nine.
constexpr std::array<uint32_t, 37> kOtherZeros = {
    0x0660, 0x06F0, 0x07C0, 0x0966, 0x09E6, 0x0A66, 0x0AE6, 0x0B66, 0x0BE6, 0x0C66, 0x0CE6, 0x0D66, 0x0DE6,
    0x0E50, 0x0ED0, 0x0F20, 0x1040, 0x1090, 0x17E0, 0x1810, 0x1946, 0x19D0, 0x1A80, 0x1A90, 0x1B50, 0x1BB0,
    0x1C40, 0x1C50, 0xA620, 0xA8D0, 0xA900, 0xA9D0, 0xA9F0, 0xAA50, 0xABF0, 0xFF10, 0x104A0};

// Bytes of a digit of another script at text[i], or 0. The mathematical digits (U+1D7CE..) are digits too.
size_t other_digit(std::string_view text, size_t i) {
  if (i >= text.size() || static_cast<unsigned char>(text[i]) < 0x80) return 0;
  const size_t n = utf8_sequence_bytes(text.substr(i, 4));
  if (n < 2) return 0;
  uint32_t code = static_cast<unsigned char>(text[i]) & (0xFFu >> (n + 1));
  for (size_t k = 1; k < n; ++k) code = code << 6 | (static_cast<unsigned char>(text[i + k]) & 0x3Fu);
  if (code >= 0x1D7CE && code <= 0x1D7FF) return n;
  for (const uint32_t zero : kOtherZeros)
    if (code >= zero && code < zero + 10) return n;
  return 0;
}

size_t sign_bytes(std::string_view text, size_t i) {
  if (i < text.size() && (text[i] == '-' || text[i] == '+')) return 1;
  return text.substr(std::min(i, text.size()), 3) == "\xE2\x88\x92" ? 3 : 0;
}

// An integer or decimal, where it stands; its digits are collected when it turns out to be wanted.
struct Decimal {
  std::string_view whole, fraction;  // whole may hold commas
  int64_t exponent = 0;
};

class Reader {
 public:
  Reader(std::string_view text, Budget& budget) : text_(text), budget_(budget) {}

  // Where the number at i ends, sign included; i when there is none. Computes nothing.
  size_t skip(size_t i) {
    std::optional<Rational> ignored;
    computing_ = false;
    return read(i, ignored);
  }
  // The same; value is empty when the number is a bad one.
  size_t compute(size_t i, std::optional<Rational>& value) {
    computing_ = true;
    return read(i, value);
  }

 private:
  size_t read(size_t i, std::optional<Rational>& value) {
    bad_ = false;
    const size_t start = i;
    const size_t sign = sign_bytes(text_, i);
    const bool negative = sign > 0 && text_[i] != '+';
    i += sign;
    Rational number;
    size_t end = read_fraction_macro(i, number);
    if (end == i) {
      Decimal over, under;
      end = read_decimal(i, over);
      if (end == i) return start;
      bool under_negative = false, have_under = false;
      size_t slash = skip_space(end);
      if (slash < text_.size() && text_[slash] == '/') {
        size_t j = skip_space(slash + 1);
        const size_t under_sign = sign_bytes(text_, j);
        under_negative = under_sign > 0 && text_[j] != '+';
        j += under_sign;
        if (const size_t under_end = read_decimal(j, under); under_end > j) {
          have_under = true;
          end = under_end;
          // 1/2/3: a date or nothing.
          for (size_t again = skip_space(end); again < text_.size() && text_[again] == '/';
               again = skip_space(end)) {
            const size_t next = skip_space(again + 1);
            Decimal ignored;
            const size_t more = read_decimal(next, ignored);
            if (more == next) break;
            bad_ = true;
            end = more;
          }
        }
      }
      if (!bad_) number = make(over, have_under ? &under : nullptr);
      number.negative = under_negative;
    }
    end = read_percent(end, number);
    number.negative ^= negative;
    if (!bad_) value = std::move(number);
    return end;
  }

  size_t skip_space(size_t i) const { return i < text_.size() && text_[i] == ' ' ? i + 1 : i; }
  size_t skip_digits(size_t i) {
    const size_t start = i;
    while (i < text_.size() && is_digit(text_[i])) ++i;
    budget_.spend(i - start);
    return i;
  }

  size_t read_decimal(size_t i, Decimal& out) {
    const size_t start = i;
    i = skip_digits(i);
    if (i > start && i - start <= 3 && text_[start] != '0')  // 1,234,567
      while (i + 3 < text_.size() && text_[i] == ',' && skip_digits(i + 1) == i + 4) i += 4;
    out.whole = text_.substr(start, i - start);
    if (i + 1 < text_.size() && text_[i] == '.' && is_digit(text_[i + 1])) {
      const size_t end = skip_digits(i + 1);
      out.fraction = text_.substr(i + 1, end - i - 1);
      i = end;
    }
    if (i == start) {
      while (const size_t n = other_digit(text_, i)) i += n, bad_ = true;
      return bad_ ? skip_digits(i) : start;
    }
    if (i < text_.size() && (text_[i] == 'e' || text_[i] == 'E')) {
      size_t j = i + 1;
      const bool down = j < text_.size() && text_[j] == '-';
      if (j < text_.size() && (text_[j] == '-' || text_[j] == '+')) ++j;
      const size_t end = skip_digits(j);
      for (size_t k = j; k < end && out.exponent <= kMaxExponent; ++k)
        out.exponent = 10 * out.exponent + (text_[k] - '0');
      if (end > j) i = end;
      if (out.exponent > kMaxExponent) bad_ = true;
      if (down) out.exponent = -out.exponent;
    }
    // What goes on like a number and cannot be one: 1.2.3, 1_000, digits of two scripts.
    for (;;) {
      const size_t other = other_digit(text_, i);
      const bool joined =
          i + 1 < text_.size() && (text_[i] == '.' || text_[i] == '_') && is_digit(text_[i + 1]);
      if (other == 0 && !joined) break;
      bad_ = true;
      i = skip_digits(i + (other > 0 ? other : 1));
    }
    return i;
  }

  size_t read_fraction_macro(size_t i, Rational& out) {
    const std::string_view rest = text_.substr(std::min(i, text_.size()));
    size_t name = 0;
    for (const std::string_view macro : {"\\frac", "\\dfrac", "\\tfrac"})
      if (rest.starts_with(macro)) name = macro.size();
    if (name == 0) return i;
    size_t j = i + name;
    std::array<Decimal, 2> part;
    std::array<bool, 2> negative{};
    for (int k = 0; k < 2; ++k) {
      if (j < text_.size() && is_digit(text_[j])) {
        part[k].whole = text_.substr(j++, 1);
        continue;
      }
      if (j >= text_.size() || text_[j] != '{') return i;
      size_t inner = skip_space(j + 1);
      const size_t sign = sign_bytes(text_, inner);
      negative[k] = sign > 0 && text_[inner] != '+';
      const size_t end = read_decimal(inner + sign, part[k]), close = skip_space(end);
      if (end == inner + sign || close >= text_.size() || text_[close] != '}') {
        bad_ = false;
        return i;
      }
      j = close + 1;
    }
    if (!bad_) out = make(part[0], &part[1]);
    out.negative = negative[0] != negative[1];
    return j;
  }

  size_t read_percent(size_t i, Rational& number) const {
    for (const std::string_view mark : {"%", "\\%", " %", " \\%", " percent"})
      if (text_.substr(std::min(i, text_.size())).starts_with(mark)) {
        number.exponent -= 2;
        return i + mark.size();
      }
    return i;
  }

  Rational make(const Decimal& over, const Decimal* under) {
    Rational r;
    if (!computing_) return r;
    int64_t exponent = 0;
    r.numerator = digits(over, exponent);
    r.exponent = exponent;
    if (under != nullptr && !bad_) {
      r.denominator = digits(*under, exponent);
      r.exponent -= exponent;
      if (r.denominator.zero()) bad_ = true;
    }
    return r;
  }

  Big digits(const Decimal& d, int64_t& exponent) {
    std::string all;
    for (const std::string_view part : {d.whole, d.fraction}) {
      // Zeros in front and commas do not count as length.
      for (const char c : part)
        if (is_digit(c) && (c != '0' || !all.empty())) {
          all += c;
          if (static_cast<int64_t>(all.size()) > kMaxDigits) {
            bad_ = true;
            return {};
          }
        }
      budget_.spend(part.size());
    }
    exponent = d.exponent - static_cast<int64_t>(d.fraction.size());
    return Big(all);
  }

  std::string_view text_;
  Budget& budget_;
  bool bad_ = false, computing_ = false;
};

// a * 10^ea against b * 10^eb.
int compare_scaled(const Big& a, int64_t ea, const Big& b, int64_t eb) {
  if (a.zero() || b.zero()) return static_cast<int>(!a.zero()) - static_cast<int>(!b.zero());
  const int64_t top_a = a.decimal_digits() + ea, top_b = b.decimal_digits() + eb;
  if (top_a != top_b) return top_a < top_b ? -1 : 1;
  // Equally long when written out, so the exponents differ by no more than the digits at hand.
  if (ea > eb) return compare(a * Big::power_of_10(ea - eb), b);
  return compare(a, b * Big::power_of_10(eb - ea));
}

Rational from_double(double x) {
  std::array<char, 64> buffer{};
  const auto end = std::to_chars(buffer.data(), buffer.data() + buffer.size(), x).ptr;
  Budget budget(std::chrono::hours(1));
  const FoundNumber found =
      whole_number(std::string_view(buffer.data(), static_cast<size_t>(end - buffer.data())), budget);
  PERIGEE_CHECK(found.state == FoundNumber::State::kGood, "{}", x);
  return found.value;
}

}  // namespace

bool equal(const Rational& a, const Rational& b) {
  if (a.numerator.zero() || b.numerator.zero()) return a.numerator.zero() && b.numerator.zero();
  return a.negative == b.negative && compare_scaled(a.numerator * b.denominator, a.exponent,
                                                    b.numerator * a.denominator, b.exponent) == 0;
}

bool within(const Rational& a, const Rational& reference, double absolute, double relative) {
  if (equal(a, reference)) return true;
  if (absolute == 0 && relative == 0) return false;
  // |a - reference| = gap * 10^exponent / (da * dr)
  const Big x = a.numerator * reference.denominator, y = reference.numerator * a.denominator;
  Big gap;
  int64_t exponent = 0;
  const int64_t apart = a.exponent - reference.exponent;
  if (x.zero() || y.zero() || std::abs(apart) > 3 * kMaxDigits) {
    // So far apart that the larger is the difference, to a relative error below 10^-kMaxDigits.
    const bool first = compare_scaled(x, a.exponent, y, reference.exponent) > 0;
    gap = first ? x : y;
    exponent = first ? a.exponent : reference.exponent;
  } else {
    const Big xs = apart > 0 ? x * Big::power_of_10(apart) : x,
              ys = apart < 0 ? y * Big::power_of_10(-apart) : y;
    gap = a.negative == reference.negative ? difference(xs, ys) : xs + ys;
    exponent = std::min(a.exponent, reference.exponent);
  }
  if (absolute > 0) {
    const Rational t = from_double(absolute);
    if (compare_scaled(gap, exponent, t.numerator * a.denominator * reference.denominator, t.exponent) <= 0)
      return true;
  }
  if (relative > 0) {
    const Rational t = from_double(relative);
    return compare_scaled(gap, exponent, t.numerator * y, t.exponent + reference.exponent) <= 0;
  }
  return false;
}

FoundNumber last_number(std::string_view text, Budget& budget) {
  FoundNumber found;
  Reader reader(text, budget);
  size_t last = text.npos;
  for (size_t i = 0; i < text.size();) {
    budget.spend();
    const char c = text[i];
    const bool begins = is_digit(c) || c == '.' || c == '\\' || static_cast<unsigned char>(c) >= 0x80 ||
                        sign_bytes(text, i) > 0;
    if (!begins) {
      ++i;
      continue;
    }
    const char before = i > 0 ? text[i - 1] : ' ';
    const bool after_operand =
        is_digit(before) || is_letter(before) || before == ')' || before == ']' || before == '}';
    if (sign_bytes(text, i) > 0 && after_operand) {
      i += sign_bytes(text, i);
      continue;
    }
    if (is_digit(c) && (is_letter(before) || before == '_')) {  // x2
      while (i < text.size() && is_digit(text[i])) ++i, budget.spend();
      continue;
    }
    const size_t end = reader.skip(i);
    if (end == i) {
      ++i;
      continue;
    }
    ++found.count;
    last = i;
    i = end;
  }
  if (last == text.npos) return found;
  std::optional<Rational> value;
  found.text = text.substr(last, reader.compute(last, value) - last);
  found.state = value ? FoundNumber::State::kGood : FoundNumber::State::kBad;
  if (value) found.value = std::move(*value);
  return found;
}

FoundNumber whole_number(std::string_view text, Budget& budget) {
  FoundNumber found;
  text = trim(text);
  Reader reader(text, budget);
  std::optional<Rational> value;
  if (text.empty() || reader.compute(0, value) != text.size()) return found;
  found.count = 1;
  found.text = text;
  found.state = value ? FoundNumber::State::kGood : FoundNumber::State::kBad;
  if (value) found.value = std::move(*value);
  return found;
}

}  // namespace perigee::reward
