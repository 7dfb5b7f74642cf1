// Steps that cannot be: where it is said to come from, and that nothing changed.
#include <gtest/gtest.h>

#include <cstring>
#include <limits>

#include "base/error.h"
#include "tests/policy/learn/random_batch.h"

namespace perigee::policy {
namespace {

using testing::Arena;
using testing::config_of;
using testing::random_batch;
using testing::SmallModel;

TEST(TrainerFailures, NanIsLocatedAndLeavesTheStateAsItWas) {
  SmallModel model(6);
  kernels::Context ctx(2);
  Trainer trainer(ctx, model.layout, config_of(kernels::LossKind::kGrpo));
  const auto batch = random_batch(8, 6, false);
  Arena a(model.layout), b(model.layout);
  trainer.step(model.weights(), a.data(), batch);
  std::vector<std::byte> before(static_cast<size_t>(trainer.state_bytes())), after(before);
  trainer.save_state(before.data());
  auto* o = reinterpret_cast<float*>(a.data() + model.layout.tensor(model.layout.layer(3).o).byte_offset);
  o[5] = std::numeric_limits<float>::quiet_NaN();
  try {
    trainer.step(a.data(), b.data(), batch);
    FAIL() << "a NaN weight passed";
  } catch (const Error& e) {
    EXPECT_NE(std::string(e.what()).find("layer 3"), std::string::npos) << e.what();
  }
  trainer.save_state(after.data());
  EXPECT_EQ(before, after);
}

// The loss is a number, and what it is the gradient of overflows.
TEST(TrainerFailures, AGradientThatIsNoNumberIsNamedAndLeavesTheStateAsItWas) {
  SmallModel model(23);
  kernels::Context ctx(2);
  Trainer trainer(ctx, model.layout, config_of(kernels::LossKind::kDapo));
  auto batch = random_batch(24, 6, false);
  Arena a(model.layout), b(model.layout);
  trainer.step(model.weights(), a.data(), batch);
  std::vector<std::byte> before(static_cast<size_t>(trainer.state_bytes())), after(before);
  trainer.save_state(before.data());
  for (TrainSequence& q : batch) q.advantage = std::numeric_limits<float>::max();
  try {
    trainer.step(a.data(), b.data(), batch);
    FAIL() << "an infinite gradient passed";
  } catch (const Error& e) {
    EXPECT_NE(std::string(e.what()).find("in the gradient of "), std::string::npos) << e.what();
  }
  trainer.save_state(after.data());
  EXPECT_EQ(before, after);
}

// The first of two optimiser steps on a batch was done when the second failed.
TEST(TrainerFailures, AFailureInTheSecondMinibatchUndoesTheFirst) {
  for (const Dtype dtype : {Dtype::kF32, Dtype::kBf16})
    for (const auto moments : {kernels::MomentForm::kFloat32, kernels::MomentForm::kByte})
      for (const bool begun : {false, true}) {
        SmallModel model(20, dtype);
        kernels::Context ctx(2);
        TrainerConfig config = config_of(kernels::LossKind::kGrpo);
        config.minibatches = 2;
        config.moments = moments;
        Trainer failing(ctx, model.layout, config), spared(ctx, model.layout, config);
        const auto bytes = static_cast<size_t>(model.layout.weight_bytes());
        Arena start(model.layout), a(model.layout), b(model.layout);
        std::memcpy(start.data(), model.weights(), bytes);
        if (begun)
          for (Trainer* t : {&failing, &spared}) t->step(model.weights(), start.data(), random_batch(21, 4, false));
        auto batch = random_batch(22, 4, false);
        batch[3].mu.back() = std::numeric_limits<float>::quiet_NaN();
        std::vector<std::byte> before(static_cast<size_t>(failing.state_bytes())), after(before);
        failing.save_state(before.data());
        EXPECT_THROW(failing.step(start.data(), a.data(), batch), Error);
        EXPECT_NE(std::memcmp(start.data(), a.data(), bytes), 0) << "the first half was done";
        failing.save_state(after.data());
        EXPECT_EQ(before, after);
        // And goes on as one that never failed.
        batch[3].mu.back() = -2;
        failing.step(start.data(), a.data(), batch);
        spared.step(start.data(), b.data(), batch);
        EXPECT_EQ(std::memcmp(a.data(), b.data(), bytes), 0);
        failing.save_state(after.data());
        spared.save_state(before.data());
        EXPECT_EQ(before, after);
      }
}

TEST(TrainerFailures, NanIsFoundInTheSequenceAndAtTheTokenThatSawIt) {
  SmallModel model(28);
  kernels::Context ctx(2);
  Trainer trainer(ctx, model.layout, config_of(kernels::LossKind::kGrpo));
  Arena a(model.layout), b(model.layout);
  std::memcpy(a.data(), model.weights(), static_cast<size_t>(model.layout.weight_bytes()));
  // The embedding of a token that one sequence has once.
  auto batch = random_batch(29, 5, false);
  for (TrainSequence& q : batch) {
    q.tokens.resize(12, 3);
    q.mask.assign(12, 1);
    q.mask[0] = 0;
    q.mu.resize(12, -3);
    for (int32_t& t : q.tokens)
      if (t == 50) t = 51;
  }
  auto* embedding = reinterpret_cast<float*>(a.data() + model.layout.tensor(model.layout.embed()).byte_offset);
  embedding[50 * model.layout.config().hidden_size + 7] = std::numeric_limits<float>::quiet_NaN();
  for (const auto& [sequence, token] : {std::pair{0, 0}, {0, 10}, {3, 4}, {4, 0}}) {
    auto spoilt = batch;
    spoilt[static_cast<size_t>(sequence)].tokens[static_cast<size_t>(token)] = 50;
    try {
      trainer.step(a.data(), b.data(), spoilt);
      FAIL() << "a NaN weight passed";
    } catch (const Error& e) {
      const std::string want = fmt::format("layer 0 (sequence {} of the micro-batch, token {})", sequence, token + 1);
      EXPECT_NE(std::string(e.what()).find(want), std::string::npos) << e.what();
    }
  }
}

// A log-probability that is none must not pass for a token that a correction drops.
TEST(TrainerFailures, RecordedLogprobsHaveToBeNumbers) {
  SmallModel model(18);
  kernels::Context ctx(1);
  Arena out(model.layout);
  for (const auto correction : {kernels::Correction::kNone, kernels::Correction::kIcepop, kernels::Correction::kSeqMis})
    for (const float bad : {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity()}) {
      TrainerConfig config = config_of(kernels::LossKind::kGrpo);
      config.loss.correction = correction;
      Trainer trainer(ctx, model.layout, config);
      auto batch = random_batch(19, 3, false);
      batch[1].mu[0] = bad;  // of the prompt: nobody looks
      EXPECT_NO_THROW(trainer.step(model.weights(), out.data(), batch));
      std::vector<std::byte> before(static_cast<size_t>(trainer.state_bytes())), after(before);
      trainer.save_state(before.data());
      batch[1].mu.back() = bad;
      try {
        trainer.step(model.weights(), out.data(), batch);
        ADD_FAILURE() << "a recorded log-probability of " << bad << " passed";
      } catch (const Error& e) {
        EXPECT_NE(std::string(e.what()).find("log-probability"), std::string::npos) << e.what();
        EXPECT_NE(std::string(e.what()).find(fmt::format("token {}", batch[1].mu.size() - 1)), std::string::npos) << e.what();
      }
      trainer.save_state(after.data());
      EXPECT_EQ(before, after);
    }
}

}  // namespace
}  // namespace perigee::policy
