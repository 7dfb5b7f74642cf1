// Routing and combination as their definition says, in double and with sorts instead of scans.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <set>
#include <vector>

namespace perigee::reference {

struct Router {
  int64_t experts, top_k, groups, top_groups;
  bool renormalize;
  double scale;
};

inline double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// Indices of the `count` largest, ties to the lower index, ascending.
inline std::vector<int64_t> largest(const std::vector<double>& v, int64_t count) {
  std::vector<int64_t> order(v.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return v[static_cast<size_t>(a)] > v[static_cast<size_t>(b)]; });
  order.resize(static_cast<size_t>(count));
  std::sort(order.begin(), order.end());
  return order;
}

inline std::vector<int64_t> choose(const Router& r, const std::vector<double>& logits, const std::vector<double>& bias) {
  std::vector<double> choice(logits.size());
  for (size_t e = 0; e < choice.size(); ++e) choice[e] = sigmoid(logits[e]) + bias[e];
  if (r.groups > 1) {
    const int64_t size = r.experts / r.groups;
    std::vector<double> sums;
    for (int64_t g = 0; g < r.groups; ++g) {
      std::vector<double> v(choice.begin() + g * size, choice.begin() + (g + 1) * size);
      std::sort(v.rbegin(), v.rend());
      sums.push_back(v[0] + (size > 1 ? v[1] : 0));
    }
    const auto kept = largest(sums, r.top_groups);
    for (int64_t e = 0; e < r.experts; ++e)
      if (std::find(kept.begin(), kept.end(), e / size) == kept.end()) choice[static_cast<size_t>(e)] = 0;
  }
  return largest(choice, r.top_k);
}

inline std::vector<double> weights(const Router& r, const std::vector<double>& logits, const std::vector<int64_t>& chosen) {
  std::vector<double> w;
  double sum = 0;
  for (const int64_t e : chosen) {
    w.push_back(sigmoid(logits[static_cast<size_t>(e)]));
    sum += w.back();
  }
  for (double& x : w) x = (r.renormalize ? x / (sum + 1e-20) : x) * r.scale;
  return w;
}

}  // namespace perigee::reference
