// Advantages: what a group's rewards say about each of its samples. Pure functions in double.
#pragma once
#include <cstdint>
#include <span>
#include <string_view>

namespace perigee::kernels {

enum class AdvantageKind { kGrpo, kMean, kRloo };
std::string_view name(AdvantageKind kind);  // "grpo", "mean", "rloo"
bool parse(std::string_view text, AdvantageKind& out);

// out may be rewards. A group whose rewards are all equal (one sample included) gives exact zeros.
//  grpo  (R - mean) / (std + 1e-6), std with n - 1
//  mean  R - mean
//  rloo  R_i - mean of the others
void grpo_advantage(std::span<const double> rewards, std::span<double> out);
void mean_advantage(std::span<const double> rewards, std::span<double> out);
void rloo_advantage(std::span<const double> rewards, std::span<double> out);
// The one that kind names.
void advantage(AdvantageKind kind, std::span<const double> rewards, std::span<double> out);

// True when a group teaches nothing: dynamic sampling (DAPO) replaces it.
bool all_equal(std::span<const double> rewards);

}  // namespace perigee::kernels
