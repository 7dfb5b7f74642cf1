#include "policy/grammar/numbers.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>
#include <map>
#include <tuple>
#include <vector>

#include "base/error.h"

namespace perigee::policy {
namespace {

constexpr size_t kMaxDigits = 15;  // of a number that is no integer; so many always survive a double
constexpr size_t kExponentDigits = 2;

// Up to `count` digits, then `to`.
int32_t digits_up_to(Automaton& a, size_t count, int32_t to) {
  int32_t at = to;
  for (size_t i = 0; i < count; ++i) at = a.split({to, a.step('0', '9', at)});
  return at;
}

// Where numbers lead that are strictly between two bounds, equal to the lower, the higher, or both; -1: nowhere.
struct Ends {
  int32_t between = -1, low = -1, high = -1, both = -1;
};

// Numbers of as many digits as `low` and `high` have, from the one to the other.
class SameLength {
 public:
  SameLength(Automaton& a, std::string_view low, std::string_view high, const Ends& ends)
      : a_(a), low_(low), high_(high), ends_(ends) {}
  int32_t build() { return at(0, true, true); }

 private:
  // on_low, on_high: the digits so far are those of the bound.
  int32_t at(size_t i, bool on_low, bool on_high) {
    if (i == low_.size())
      return on_low ? (on_high ? ends_.both : ends_.low) : on_high ? ends_.high : ends_.between;
    const std::tuple key(i, on_low, on_high);
    if (const auto it = known_.find(key); it != known_.end()) return it->second;
    Node n;
    for (char c = on_low ? low_[i] : '0'; c <= (on_high ? high_[i] : '9'); ++c) {
      const int32_t to = at(i + 1, on_low && c == low_[i], on_high && c == high_[i]);
      const auto digit = static_cast<uint16_t>(c);
      if (to >= 0) n.edges.push_back({digit, digit, Op::kPlain, to});
    }
    return known_[key] = n.edges.empty() ? -1 : a_.add(std::move(n));
  }

  Automaton& a_;
  std::string_view low_, high_;
  Ends ends_;
  std::map<std::tuple<size_t, bool, bool>, int32_t> known_;
};

// Between two numbers of any lengths. ends_of(length, is_low, is_high): where those of that many digits lead, which may
// be the lower bound, the higher.
template <class EndsOf>
std::vector<int32_t> any_length(Automaton& a, const std::string& low, const std::string& high,
                                const EndsOf& ends_of) {
  std::vector<int32_t> out;
  for (size_t length = low.size(); length <= high.size(); ++length) {
    const bool is_low = length == low.size(), is_high = length == high.size();
    Ends ends = ends_of(length, is_low, is_high);
    const std::string least = is_low ? low : std::string(length, '0').replace(0, 1, 1, '1');
    const std::string most = is_high ? high : std::string(length, '9');
    // A bound that stands for the length only is like any number between.
    if (!is_low) ends.both = ends.high, ends.low = ends.between;
    if (!is_high) ends.both = ends.low, ends.high = ends.between;
    const int32_t entry = SameLength(a, least, most, ends).build();
    if (entry >= 0) out.push_back(entry);
  }
  return out;
}

// What follows the whole digits of a number: its fraction, within bounds where they are given, or nothing.
class Fraction {
 public:
  struct Bound {
    const std::string* digits = nullptr;  // null: none
    bool open = false;
  };
  Fraction(Automaton& a, size_t most, Bound low, Bound high) : a_(a), most_(most), low_(low), high_(high) {}
  int32_t build() {
    std::vector<int32_t> ways;
    const bool on_low = low_.digits != nullptr, on_high = high_.digits != nullptr;
    if (may_end(0, on_low, on_high)) ways.push_back(a_.pop());
    if (most_ > 0) ways.push_back(a_.step('.', '.', at(0, on_low, on_high)));
    return a_.split(std::move(ways));
  }

 private:
  static char digit(const Bound& b, size_t i) { return i < b.digits->size() ? (*b.digits)[i] : '0'; }
  bool may_end(size_t i, bool on_low, bool on_high) const {
    if (on_low && (i < low_.digits->size() || low_.open)) return false;
    return !(on_high && i >= high_.digits->size() && high_.open);
  }
  // A digit comes, after i of them.
  int32_t at(size_t i, bool on_low, bool on_high) {
    const std::tuple key(i, on_low, on_high);
    if (const auto it = known_.find(key); it != known_.end()) return it->second;
    const int32_t node = a_.add({});
    known_[key] = node;
    const char from = on_low ? digit(low_, i) : '0', to = on_high ? digit(high_, i) : '9';
    // Digits that are neither bound's are alike.
    for (char c = from; c <= to;) {
      const bool still_low = on_low && c == from, still_high = on_high && c == to;
      const char last = still_low || still_high ? c : on_high ? static_cast<char>(to - 1) : to;
      std::vector<int32_t> ways;
      if (may_end(i + 1, still_low, still_high)) ways.push_back(a_.pop());
      if (i + 1 < most_) ways.push_back(at(i + 1, still_low, still_high));
      a_.edge(node, static_cast<uint16_t>(c), static_cast<uint16_t>(last), a_.split(std::move(ways)));
      c = static_cast<char>(last + 1);
    }
    return node;
  }

  Automaton& a_;
  size_t most_;
  Bound low_, high_;
  std::map<std::tuple<size_t, bool, bool>, int32_t> known_;
};

// Numbers without a sign between two bounds.
int32_t magnitude(Automaton& a, const Decimal& low, bool open_low, const Decimal* high, bool open_high) {
  const std::string most = high != nullptr ? high->whole : std::string(kMaxDigits, '9');
  return a.split(any_length(a, low.whole, most, [&](size_t length, bool is_low, bool is_high) {
    const size_t left = kMaxDigits - length;
    const Fraction::Bound none, l{&low.fraction, open_low},
        h = high != nullptr ? Fraction::Bound{&high->fraction, open_high} : none;
    Ends ends;
    ends.between = Fraction(a, left, none, none).build();
    if (is_low) ends.low = Fraction(a, left, l, none).build();
    if (is_high) ends.high = Fraction(a, left, none, h).build();
    if (is_low && is_high) ends.both = Fraction(a, left, l, h).build();
    return ends;
  }));
}

bool above(const Decimal& a, const Decimal& b) {
  if (a.whole.size() != b.whole.size()) return a.whole.size() > b.whole.size();
  return a.whole != b.whole ? a.whole > b.whole : a.fraction > b.fraction;
}

}  // namespace

int32_t integer_rule(Automaton& a, int64_t low, int64_t high) {
  PERIGEE_CHECK(low <= high, "{} to {}", low, high);
  const auto between = [&](uint64_t from, uint64_t to) {
    const int32_t end = a.pop();
    return a.split(any_length(a, std::to_string(from), std::to_string(to), [&](size_t, bool, bool) {
      return Ends{end, end, end, end};
    }));
  };
  const auto size = [](int64_t v) {
    return v < 0 ? ~static_cast<uint64_t>(v) + 1 : static_cast<uint64_t>(v);
  };
  std::vector<int32_t> ways;
  if (high >= 0) ways.push_back(between(low > 0 ? size(low) : 0, size(high)));
  if (low < 0) ways.push_back(a.step('-', '-', between(high < 0 ? size(high) : 1, size(low))));
  return a.split(std::move(ways));
}

int32_t number_rule(Automaton& a) {
  const int32_t end = a.pop();
  const int32_t exponent_digits = a.step('0', '9', digits_up_to(a, kExponentDigits - 1, end));
  const int32_t signs =
      a.split({exponent_digits, a.step('+', '+', exponent_digits), a.step('-', '-', exponent_digits)});
  const int32_t exponent = a.split({end, a.step('e', 'e', signs), a.step('E', 'E', signs)});
  const int32_t fraction =
      a.split({exponent, a.step('.', '.', a.step('0', '9', digits_up_to(a, kMaxDigits - 1, exponent)))});
  const int32_t whole =
      a.split({a.step('0', '0', fraction), a.step('1', '9', digits_up_to(a, kMaxDigits - 1, fraction))});
  return a.split({whole, a.step('-', '-', whole)});
}

std::optional<Decimal> decimal(double value) {
  PERIGEE_CHECK(std::isfinite(value) && value >= 0, "{}", value);
  if (value >= 1e15) return std::nullopt;
  char text[64];
  const auto end = std::to_chars(text, text + sizeof text, value, std::chars_format::fixed);
  if (end.ec != std::errc()) return std::nullopt;
  const std::string_view all(text, static_cast<size_t>(end.ptr - text));
  const size_t point = std::min(all.find('.'), all.size());
  Decimal d{std::string(all.substr(0, point)), point < all.size() ? std::string(all.substr(point + 1)) : ""};
  while (!d.fraction.empty() && d.fraction.back() == '0') d.fraction.pop_back();
  if (d.whole.size() + d.fraction.size() > kMaxDigits) return std::nullopt;
  return d;
}

int32_t bounded_number_rule(Automaton& a, const NumberBounds& b) {
  const auto of = [](double v) {
    const auto d = decimal(std::fabs(v));
    if (!d) throw_input("the bound {} has more than {} digits", v, kMaxDigits);
    return *d;
  };
  const Decimal zero{"0", ""};
  std::vector<int32_t> ways;
  if (!b.high || *b.high > 0 || (*b.high == 0 && !b.open_high)) {
    const bool positive = b.low && *b.low >= 0;
    const Decimal low = positive ? of(*b.low) : zero, high = b.high ? of(*b.high) : zero;
    if (!b.high || !above(low, high))
      ways.push_back(magnitude(a, low, positive && b.open_low, b.high ? &high : nullptr, b.open_high));
  }
  if (!b.low || *b.low < 0) {
    const bool negative = b.high && *b.high <= 0;
    const Decimal low = negative ? of(*b.high) : zero, high = b.low ? of(*b.low) : zero;
    if (!b.low || !above(low, high))
      ways.push_back(
          a.step('-', '-', magnitude(a, low, negative && b.open_high, b.low ? &high : nullptr, b.open_low)));
  }
  return a.split(std::move(ways));
}

}  // namespace perigee::policy
