#include "kernels/loss/advantage.h"

#include <gtest/gtest.h>

#include <cmath>

#include "base/random.h"

namespace perigee {
namespace {
using kernels::AdvantageKind;
constexpr AdvantageKind kKinds[] = {AdvantageKind::kGrpo, AdvantageKind::kMean, AdvantageKind::kRloo};

TEST(Advantage, SumToZero) {
  Random random(1);
  for (int round = 0; round < 200; ++round)
    for (const auto kind : kKinds) {
      std::vector<double> rewards(static_cast<size_t>(random.next_int(2, 33)));
      for (double& r : rewards) r = random.next_normal();
      std::vector<double> out(rewards.size());
      kernels::advantage(kind, rewards, out);
      double sum = 0;
      for (const double a : out) sum += a;
      EXPECT_NEAR(sum, 0, 1e-12) << name(kind) << " round " << round;
    }
}

TEST(Advantage, EqualRewardsGiveExactZeros) {
  for (const auto kind : kKinds)
    for (const double reward : {0.1, 1.0 / 3, 0.0, 1e300})
      for (const size_t n : {1, 3, 7, 10}) {
        const std::vector<double> rewards(n, reward);
        std::vector<double> out(n, 5);
        kernels::advantage(kind, rewards, out);
        EXPECT_EQ(out, std::vector<double>(n, 0.0)) << name(kind) << " " << reward << " x " << n;
      }
}

TEST(Advantage, ByHand) {
  const std::vector<double> rewards = {1, 0, 0};
  std::vector<double> out(3);
  kernels::mean_advantage(rewards, out);
  EXPECT_DOUBLE_EQ(out[0], 2.0 / 3);
  kernels::rloo_advantage(rewards, out);
  EXPECT_DOUBLE_EQ(out[0], 1);
  EXPECT_DOUBLE_EQ(out[1], -0.5);
  kernels::grpo_advantage(rewards, out);
  EXPECT_DOUBLE_EQ(out[0], (2.0 / 3) / (std::sqrt(1.0 / 3) + 1e-6));
}

TEST(Advantage, MayOverwriteItsRewards) {
  for (const auto kind : kKinds) {
    std::vector<double> rewards = {1, 0, 0.25, 0.5}, out(4);
    kernels::advantage(kind, rewards, out);
    kernels::advantage(kind, rewards, rewards);
    EXPECT_EQ(rewards, out);
  }
}

}  // namespace
}  // namespace perigee
