#include "policy/grammar/bounds.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "policy/grammar/keywords.h"

namespace perigee::policy {

using nlohmann::ordered_json;

std::pair<int64_t, int64_t> integer_bounds(const ordered_json& s, const std::string& path,
                                           const std::string& where) {
  const auto fail = [&](const std::string& at, std::string_view what) { refuse_schema(where, at, what); };
  int64_t low = -kLargestInteger, high = kLargestInteger;
  constexpr int64_t kMin = std::numeric_limits<int64_t>::min(), kMax = std::numeric_limits<int64_t>::max();
  bool has_low = false, has_high = false;
  const auto bound = [&](const char* key, bool lower, bool open) {
    if (!s.contains(key)) return;
    const ordered_json& v = s[key];
    int64_t b = 0;
    if (v.is_number_unsigned() && v.get<uint64_t>() > static_cast<uint64_t>(kMax)) {
      fail(pointer(path, key), "too large");
    } else if (v.is_number_integer()) {
      b = v.get<int64_t>();
      if (open && b == (lower ? kMax : kMin)) fail(pointer(path, key), "no integer is beyond it");
      if (open) b += lower ? 1 : -1;
    } else {
      const double x = v.get<double>(), whole = lower ? std::ceil(x) : std::floor(x);
      if (!(std::fabs(whole) < 9e18)) fail(pointer(path, key), "too large");
      b = static_cast<int64_t>(whole);
      if (open && whole == x) b += lower ? 1 : -1;
    }
    if (lower)
      low = has_low ? std::max(low, b) : b, has_low = true;
    else
      high = has_high ? std::min(high, b) : b, has_high = true;
  };
  bound("minimum", true, false);
  bound("exclusiveMinimum", true, true);
  bound("maximum", false, false);
  bound("exclusiveMaximum", false, true);
  if (!has_high && low > high) high = kMax;
  if (!has_low && low > high) low = kMin;
  if (low > high) fail(path, "no integer is within the bounds");
  return {low, high};
}

NumberBounds number_bounds(const ordered_json& s, const std::string& path, const std::string& where) {
  NumberBounds b;
  const auto bound = [&](const char* key, bool lower, bool open) {
    if (!s.contains(key)) return;
    const double v = s[key].get<double>();
    auto& mine = lower ? b.low : b.high;
    bool& mine_open = lower ? b.open_low : b.open_high;
    if (!mine || (lower ? v > *mine : v < *mine)) {
      mine = v;
      mine_open = open;
    } else if (v == *mine) {
      mine_open |= open;
    }
  };
  bound("minimum", true, false);
  bound("exclusiveMinimum", true, true);
  bound("maximum", false, false);
  bound("exclusiveMaximum", false, true);
  if (b.low && b.high && (*b.low > *b.high || (*b.low == *b.high && (b.open_low || b.open_high))))
    refuse_schema(where, path, "no number is within the bounds");
  return b;
}

}  // namespace perigee::policy
