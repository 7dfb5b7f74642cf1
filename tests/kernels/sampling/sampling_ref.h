// The distribution that sampling should draw from, step by step in double with sorted lists.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <map>
#include <numeric>
#include <set>
#include <span>
#include <vector>

#include "kernels/sampling/sampling.h"

namespace perigee::reference {

// Probability of each token; greedy gives a single one.
inline std::vector<double> distribution(std::vector<double> z, const kernels::SamplingParams& p,
                                        std::span<const int32_t> prompt, std::span<const int32_t> generated) {
  for (const auto& [token, bias] : p.logit_bias) z[static_cast<size_t>(token)] += bias;
  std::set<int32_t> seen(prompt.begin(), prompt.end());
  std::map<int32_t, int> count;
  for (const int32_t t : generated) {
    seen.insert(t);
    ++count[t];
  }
  for (const int32_t t : seen) {
    double& v = z[static_cast<size_t>(t)];
    v = v > 0 ? v / static_cast<double>(p.repetition_penalty) : v * static_cast<double>(p.repetition_penalty);
  }
  for (const auto& [t, n] : count)
    z[static_cast<size_t>(t)] -= static_cast<double>(p.presence_penalty) + n * static_cast<double>(p.frequency_penalty);

  std::vector<double> out(z.size());
  std::vector<size_t> order(z.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return z[a] > z[b]; });
  if (p.temperature == 0) {
    out[order[0]] = 1;
    return out;
  }
  const auto weight = [&](size_t i) { return std::exp((z[i] - z[order[0]]) / static_cast<double>(p.temperature)); };
  if (p.top_k > 0 && static_cast<size_t>(p.top_k) < order.size()) order.resize(static_cast<size_t>(p.top_k));
  double total = 0;
  for (const size_t i : order) total += weight(i);
  if (p.top_p < 1) {
    double sum = 0;
    size_t kept = 0;
    while (kept < order.size() && (kept == 0 || sum < static_cast<double>(p.top_p) * total)) sum += weight(order[kept++]);
    order.resize(kept);
  }
  std::erase_if(order, [&](size_t i) { return weight(i) < static_cast<double>(p.min_p); });
  total = 0;
  for (const size_t i : order) total += weight(i);
  for (const size_t i : order) out[i] = weight(i) / total;
  return out;
}

}  // namespace perigee::reference
