#include "kernels/loss/advantage.h"

#include <cmath>

#include "base/error.h"

namespace perigee::kernels {
namespace {

double sum_of(std::span<const double> x) {
  double sum = 0;
  for (const double v : x) sum += v;
  return sum;
}

// Zeros for a group of equal rewards; their computed mean may differ from them in the last bit.
bool zeros_if_equal(std::span<const double> rewards, std::span<double> out) {
  PERIGEE_CHECK(rewards.size() == out.size(), "rewards {} out {}", rewards.size(), out.size());
  if (!all_equal(rewards)) return false;
  for (double& v : out) v = 0;
  return true;
}

}  // namespace

std::string_view name(AdvantageKind kind) {
  switch (kind) {
    case AdvantageKind::kGrpo:
      return "grpo";
    case AdvantageKind::kMean:
      return "mean";
    case AdvantageKind::kRloo:
      return "rloo";
  }
  return "?";
}

bool parse(std::string_view text, AdvantageKind& out) {
  for (const auto kind : {AdvantageKind::kGrpo, AdvantageKind::kMean, AdvantageKind::kRloo})
    if (text == name(kind)) {
      out = kind;
      return true;
    }
  return false;
}

bool all_equal(std::span<const double> rewards) {
  for (const double r : rewards)
    if (r != rewards[0]) return false;
  return true;
}

void grpo_advantage(std::span<const double> rewards, std::span<double> out) {
  if (zeros_if_equal(rewards, out)) return;
  const double n = static_cast<double>(rewards.size()), mean = sum_of(rewards) / n;
  double squares = 0;
  for (const double r : rewards) squares += (r - mean) * (r - mean);
  const double deviation = std::sqrt(squares / (n - 1)) + 1e-6;
  for (size_t i = 0; i < out.size(); ++i) out[i] = (rewards[i] - mean) / deviation;
}

void mean_advantage(std::span<const double> rewards, std::span<double> out) {
  if (zeros_if_equal(rewards, out)) return;
  const double mean = sum_of(rewards) / static_cast<double>(rewards.size());
  for (size_t i = 0; i < out.size(); ++i) out[i] = rewards[i] - mean;
}

void rloo_advantage(std::span<const double> rewards, std::span<double> out) {
  if (zeros_if_equal(rewards, out)) return;
  const double sum = sum_of(rewards), others = static_cast<double>(rewards.size() - 1);
  for (size_t i = 0; i < out.size(); ++i) out[i] = rewards[i] - (sum - rewards[i]) / others;
}

void advantage(AdvantageKind kind, std::span<const double> rewards, std::span<double> out) {
  switch (kind) {
    case AdvantageKind::kGrpo:
      return grpo_advantage(rewards, out);
    case AdvantageKind::kMean:
      return mean_advantage(rewards, out);
    case AdvantageKind::kRloo:
      return rloo_advantage(rewards, out);
  }
}

}  // namespace perigee::kernels
