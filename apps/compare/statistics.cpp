#include "apps/compare/statistics.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <set>

#include "base/error.h"

namespace perigee::apps::compare {

double median(std::vector<double> values) {
  PERIGEE_CHECK(!values.empty(), "the median of nothing");
  std::sort(values.begin(), values.end());
  const size_t half = values.size() / 2;
  if (values.size() % 2 == 1) return values[half];
  return std::isinf(values[half]) ? values[half] : (values[half - 1] + values[half]) / 2;
}

std::optional<Spread> spread_of(const std::vector<double>& values) {
  if (values.empty()) return std::nullopt;
  const auto [low, high] = std::minmax_element(values.begin(), values.end());
  Spread s;
  s.n = static_cast<int64_t>(values.size());
  s.median = median(values);
  s.mean = std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
  s.min = *low;
  s.max = *high;
  return s;
}

std::vector<BandPoint> band_of(const std::vector<Curve>& curves) {
  std::set<double> all;
  for (const Curve& c : curves) all.insert(c.x.begin(), c.x.end());
  std::vector<BandPoint> out;
  for (const double x : all) {
    std::vector<double> values;
    for (const Curve& c : curves) {
      const auto after = std::upper_bound(c.x.begin(), c.x.end(), x);
      if (after == c.x.begin()) continue;                                  // it begins later
      if (after == c.x.end() && c.x.back() != x && !c.complete) continue;  // not there yet
      values.push_back(c.y[static_cast<size_t>(after - c.x.begin()) - 1]);
    }
    const Spread s = *spread_of(values);
    out.push_back({x, s.median, s.min, s.max, s.n});
  }
  return out;
}

std::optional<double> reached(const Curve& curve, double level) {
  for (size_t i = 0; i < curve.x.size(); ++i)
    if (curve.y[i] >= level) return curve.x[i];
  return std::nullopt;
}

Reached reached(const std::vector<Curve>& curves, double level) {
  Reached r;
  r.of = static_cast<int64_t>(curves.size());
  std::vector<double> all;
  for (const Curve& c : curves) {
    const std::optional<double> x = reached(c, level);
    all.push_back(x.value_or(std::numeric_limits<double>::infinity()));
    if (!x) continue;
    ++r.n;
    r.first = std::min(r.first.value_or(*x), *x);
    r.last = std::max(r.last.value_or(*x), *x);
  }
  if (all.empty()) return r;
  const double middle = median(all);
  if (std::isfinite(middle)) r.median = middle;
  return r;
}

}  // namespace perigee::apps::compare
