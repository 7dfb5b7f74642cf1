#include "policy/learn/trainer.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "policy/model/forward.h"
#include "tests/policy/learn/random_batch.h"

namespace perigee::policy {
namespace {

using testing::Arena;
using testing::config_of;
using testing::random_batch;
using testing::SmallModel;

TEST(Trainer, ThreadsRecomputationAndAccumulationOfOneSequenceDoNotChangeTheStep) {
  SmallModel model(1);
  Arena a(model.layout), b(model.layout);
  kernels::Context one(1), two(2);
  TrainerConfig keep = config_of(kernels::LossKind::kGrpo), recompute = keep;
  recompute.recompute = true;
  Trainer first(one, model.layout, keep), second(two, model.layout, recompute);
  const auto batch = random_batch(3, 12, false);
  const StepMetrics m = first.step(model.weights(), a.data(), batch);
  second.step(model.weights(), b.data(), batch);
  EXPECT_EQ(std::memcmp(a.data(), b.data(), static_cast<size_t>(model.layout.weight_bytes())), 0);
  EXPECT_NE(std::memcmp(a.data(), model.weights(), static_cast<size_t>(model.layout.weight_bytes())), 0);
  EXPECT_GT(m.grad_norm, 0);
}

// Micro-batches only change the order in which gradients are summed.
TEST(Trainer, MicroBatchesGiveTheGradientOfTheWhole) {
  SmallModel model(2);
  kernels::Context ctx(2);
  for (auto kind : {kernels::LossKind::kGrpo, kernels::LossKind::kDapo, kernels::LossKind::kGspo, kernels::LossKind::kK15}) {
    TrainerConfig whole = config_of(kind), cut = whole;
    cut.micro_batch_tokens = 60;
    Trainer t1(ctx, model.layout, whole), t2(ctx, model.layout, cut);
    const auto batch = random_batch(4, 12, false, &t1, model.weights());
    std::vector<float> g1(static_cast<size_t>(model.layout.elements())), g2(g1);
    const StepMetrics m1 = t1.gradients(model.weights(), batch, g1.data()), m2 = t2.gradients(model.weights(), batch, g2.data());
    double difference = 0, norm = 0;
    for (size_t i = 0; i < g1.size(); ++i) {
      difference += (static_cast<double>(g1[i]) - g2[i]) * (static_cast<double>(g1[i]) - g2[i]);
      norm += static_cast<double>(g1[i]) * g1[i];
    }
    EXPECT_LT(std::sqrt(difference / norm), 1e-5) << static_cast<int>(kind);
    EXPECT_NEAR(m1.loss, m2.loss, 1e-9 + 1e-6 * std::abs(m1.loss));
    EXPECT_EQ(m1.mismatch_share, 0) << "on-policy: the learner's log-probabilities are the recorded ones";
    EXPECT_EQ(m1.ratio_mean, 1);
  }
}

// Along a random direction, the loss changes as the gradient says.
TEST(Trainer, GradientMatchesFiniteDifferencesOfTheLoss) {
  SmallModel model(3);
  kernels::Context ctx(2);
  Trainer trainer(ctx, model.layout, config_of(kernels::LossKind::kDapo));
  const auto batch = random_batch(5, 8, true);
  const auto n = static_cast<size_t>(model.layout.elements());
  std::vector<float> gradient(n), flat(n), moved(n), scratch(n);
  trainer.gradients(model.weights(), batch, gradient.data());
  model.layout.weights_to_flat(model.weights(), flat.data());
  double slope = 0;
  for (size_t i = 0; i < n; ++i) slope += static_cast<double>(gradient[i]) * gradient[i];
  // Small: a router that changes its mind between the two sides would not be a derivative.
  const double step = 1e-4 / std::sqrt(slope);
  Arena arena(model.layout);
  double loss[2];
  for (int side : {0, 1}) {
    for (size_t i = 0; i < n; ++i) moved[i] = static_cast<float>(flat[i] + (side == 0 ? -step : step) * gradient[i]);
    model.layout.flat_to_weights(moved.data(), arena.data());
    loss[side] = trainer.gradients(arena.data(), batch, scratch.data()).loss;
  }
  EXPECT_NEAR((loss[1] - loss[0]) / (2 * step), slope, 0.02 * slope);
}

TEST(Trainer, SupervisedStepsLowerTheLossInBothDtypes) {
  for (Dtype dtype : {Dtype::kF32, Dtype::kBf16}) {
    SmallModel model(4, dtype);
    kernels::Context ctx(2);
    TrainerConfig config = config_of(kernels::LossKind::kGrpo);
    config.router_bias_rate = 1e-3;
    Trainer trainer(ctx, model.layout, config);
    const auto batch = random_batch(6, 8, true);
    Arena a(model.layout), b(model.layout);
    std::memcpy(a.data(), model.weights(), static_cast<size_t>(model.layout.weight_bytes()));
    double first = 0, last = 0;
    for (int i = 0; i < 40; ++i) {
      const double loss = trainer.step(a.data(), b.data(), batch).loss;
      if (i == 0) first = loss;
      last = loss;
      std::swap(a, b);
    }
    EXPECT_LT(last, 0.4 * first);
    EXPECT_EQ(trainer.steps_done(), 40);
  }
}

TEST(Trainer, SavedStateContinuesWithTheSameBits) {
  for (Dtype dtype : {Dtype::kF32, Dtype::kBf16}) {
    SmallModel model(5, dtype);
    const auto bytes = static_cast<size_t>(model.layout.weight_bytes());
    kernels::Context ctx(2);
    TrainerConfig config = config_of(kernels::LossKind::kGrpo);
    config.minibatches = 2;
    Trainer whole(ctx, model.layout, config), resumed(ctx, model.layout, config);
    const auto batch = random_batch(7, 8, false);
    Arena a(model.layout), b(model.layout), c(model.layout);
    whole.step(model.weights(), a.data(), batch);
    std::vector<std::byte> state(static_cast<size_t>(whole.state_bytes()));
    whole.save_state(state.data());
    whole.step(a.data(), b.data(), batch);
    resumed.load_state(state.data());
    resumed.step(a.data(), c.data(), batch);
    EXPECT_EQ(std::memcmp(b.data(), c.data(), bytes), 0);
    EXPECT_EQ(resumed.steps_done(), whole.steps_done());
  }
}

class Gradients : public StepObserver {
 public:
  void on_gradient(int64_t, std::span<const float> gradient, const StepMetrics& m, double scale) override {
    flat.assign(gradient.begin(), gradient.end());
    norm = m.grad_norm;
    grad_scale = scale;
  }
  std::vector<float> flat;
  double norm = 0, grad_scale = 0;
};

// Three steps against AdamW as it is published, in double: of the gradient cut to its norm, with decay, at the schedule's
// learning rates. eps is large, as without it the size of a first gradient would make no difference.
TEST(Trainer, AStepIsAdamWOfTheClippedGradient) {
  for (const Dtype dtype : {Dtype::kF32, Dtype::kBf16})
    for (const double clip : {0.0, 0.5, 2.0, 1e9}) {
      SmallModel model(27, dtype);
      kernels::Context ctx(2);
      TrainerConfig config = config_of(kernels::LossKind::kRloo);
      config.grad_clip = clip;
      config.weight_decay = 0.1;
      config.beta1 = 0.8;
      config.beta2 = 0.9;
      config.eps = 1e-3;
      config.schedule.warmup_steps = 2;
      config.schedule.lr = 0.02;
      Trainer trainer(ctx, model.layout, config);
      Gradients seen;
      trainer.observe(&seen);
      const auto n = static_cast<size_t>(model.layout.elements());
      std::vector<float> start(n), flat(n);
      model.layout.weights_to_flat(model.weights(), start.data());
      std::vector<double> w(start.begin(), start.end()), m(n, 0), v(n, 0);
      Arena a(model.layout), b(model.layout);
      std::memcpy(a.data(), model.weights(), static_cast<size_t>(model.layout.weight_bytes()));
      bool clipped = false;
      for (int step = 1; step <= 3; ++step) {
        auto batch = random_batch(27 + static_cast<uint64_t>(step), 6, false);
        for (TrainSequence& q : batch) q.advantage *= 8;
        const double lr = trainer.step(a.data(), b.data(), batch).lr;
        EXPECT_DOUBLE_EQ(lr, step == 1 ? 0.01 : 0.02);
        double squares = 0;
        for (const float g : seen.flat) squares += static_cast<double>(g) * g;
        const double norm = std::sqrt(squares), scale = clip > 0 && norm > clip ? clip / norm : 1;
        EXPECT_NEAR(seen.norm, norm, 1e-9 * norm);
        EXPECT_NEAR(seen.grad_scale, scale, 1e-9);
        clipped |= scale < 1;
        for (const ParamSpec& t : model.layout.tensors())
          for (int64_t i = t.element_offset; t.trained && i < t.element_offset + t.elements; ++i) {
            const auto e = static_cast<size_t>(i);
            const double g = scale * seen.flat[e];
            m[e] = config.beta1 * m[e] + (1 - config.beta1) * g;
            v[e] = config.beta2 * v[e] + (1 - config.beta2) * g * g;
            const double direction = m[e] / (1 - std::pow(config.beta1, step)) /
                                     (std::sqrt(v[e] / (1 - std::pow(config.beta2, step))) + config.eps);
            w[e] -= lr * (direction + config.weight_decay * w[e]);
          }
        std::swap(a, b);
      }
      EXPECT_EQ(clipped, clip == 0.5 || clip == 2.0) << clip;
      // float32 keeps each of them to a few parts in 1e7; bfloat16 rounds the result to 8 bits.
      const double part = dtype == Dtype::kF32 ? 0 : 1.0 / 256;
      model.layout.weights_to_flat(a.data(), flat.data());
      for (size_t i = 0; i < n; ++i) ASSERT_NEAR(flat[i], w[i], 1e-6 * (std::abs(w[i]) + 0.05) + part * std::abs(w[i])) << i;
    }
}

// What precedes a sequence's first token nobody knows.
TEST(Trainer, LogprobsOfFirstTokensAreZero) {
  SmallModel model(25);
  kernels::Context ctx(2);
  TrainerConfig config = config_of(kernels::LossKind::kGrpo);
  config.micro_batch_tokens = 60;
  Trainer trainer(ctx, model.layout, config);
  const auto batch = random_batch(26, 5, false);
  std::vector<float> entropy(3, 7);
  const std::vector<float> logprob = trainer.logprobs(model.weights(), batch, &entropy);
  size_t at = 0;
  for (const TrainSequence& q : batch)
    for (size_t t = 0; t < q.tokens.size(); ++t, ++at) {
      ASSERT_LT(at, logprob.size());
      EXPECT_EQ(logprob[at] == 0, t == 0);
      EXPECT_EQ(entropy[at] == 0, t == 0);
    }
  EXPECT_EQ(at, logprob.size());
  EXPECT_EQ(at, entropy.size());
}

TEST(Trainer, KlTermNeedsAndUsesTheReference) {
  SmallModel model(7), other(8);
  kernels::Context ctx(2);
  TrainerConfig config = config_of(kernels::LossKind::kGrpo);
  config.loss.kl_coef = 0.1;
  Trainer trainer(ctx, model.layout, config);
  const auto batch = random_batch(9, 6, false, &trainer, model.weights());
  Arena out(model.layout);
  EXPECT_THROW(trainer.step(model.weights(), out.data(), batch), std::logic_error);
  EXPECT_EQ(trainer.step(model.weights(), out.data(), batch, model.weights()).kl, 0);
  EXPECT_GT(trainer.step(model.weights(), out.data(), batch, other.weights()).kl, 0);
}

// More minibatches than episodes: those that hold worked examples alone keep the weight of worked examples.
TEST(Trainer, WorkedExamplesBesideEpisodesKeepTheirCoefficientInEveryMinibatch) {
  SmallModel model(11);
  kernels::Context ctx(2);
  TrainerConfig config = config_of(kernels::LossKind::kGrpo);
  config.ptx_coef = 0.01;
  config.minibatches = 4;
  config.schedule.lr = 0;
  Trainer trainer(ctx, model.layout, config);
  auto batch = random_batch(12, 1, false);
  const auto curated = random_batch(13, 8, true);
  batch.insert(batch.end(), curated.begin(), curated.end());
  Arena out(model.layout);
  const double mixed = trainer.step(model.weights(), out.data(), batch).ptx_loss;
  const double alone = trainer.step(model.weights(), out.data(), curated).ptx_loss;
  EXPECT_GT(alone, 1);
  EXPECT_NEAR(mixed, 0.01 * alone, 1e-3 * alone);
}

// A group of equal rewards, episodes that wrote nothing, one of a single token: nothing to learn, and nothing is learnt.
TEST(Trainer, WhereThereIsNothingToLearnNothingChanges) {
  for (const Dtype dtype : {Dtype::kF32, Dtype::kBf16})
    for (const auto moments : {kernels::MomentForm::kFloat32, kernels::MomentForm::kByte}) {
      SmallModel model(14, dtype);
      kernels::Context ctx(2);
      TrainerConfig config = config_of(kernels::LossKind::kDapo);
      config.moments = moments;
      config.micro_batch_tokens = 40;
      Trainer trainer(ctx, model.layout, config);
      auto equal = random_batch(15, 6, false);
      for (TrainSequence& q : equal) q.advantage = 0;
      auto silent = random_batch(16, 3, false);
      for (TrainSequence& q : silent) std::fill(q.mask.begin(), q.mask.end(), uint8_t{0});
      silent[1].tokens.resize(1);
      silent[1].mask.resize(1);
      silent[1].mu.resize(1);
      Arena a(model.layout), b(model.layout);
      const auto bytes = static_cast<size_t>(model.layout.weight_bytes());
      StepMetrics m = trainer.step(model.weights(), a.data(), equal);
      EXPECT_EQ(std::memcmp(a.data(), model.weights(), bytes), 0);
      EXPECT_EQ(m.grad_norm, 0);
      EXPECT_GT(m.trained_tokens, 0);
      m = trainer.step(a.data(), b.data(), silent);
      EXPECT_EQ(std::memcmp(b.data(), model.weights(), bytes), 0);
      EXPECT_EQ(m.loss, 0);
      EXPECT_EQ(m.trained_tokens, 0);
      EXPECT_EQ(m.mismatch_max, 0);
      EXPECT_EQ(m.ratio_mean, 1);
      EXPECT_EQ(trainer.steps_done(), 2);
      // Beside others they change nothing but the number of sequences.
      const auto lively = random_batch(17, 4, false);
      std::vector<float> alone(static_cast<size_t>(model.layout.elements())), beside(alone);
      auto all = lively;
      all.insert(all.end(), silent.begin(), silent.end());
      config.loss.kind = kernels::LossKind::kDapo;
      EXPECT_EQ(trainer.gradients(model.weights(), lively, alone.data()).loss,
                trainer.gradients(model.weights(), all, beside.data()).loss);
    }
}

// By the rate, in every layer of experts and for each of them, by the tokens of all micro-batches.
TEST(Trainer, RouterBiasMovesTowardsTheUnderused) {
  for (const Dtype dtype : {Dtype::kF32, Dtype::kBf16}) {
    ModelConfig everywhere = testing::small_config();
    everywhere.first_k_dense_replace = 0;
    everywhere.moe.assign(everywhere.moe.size(), true);
    testing::AdapterModel model(9, dtype, everywhere);
    const ModelConfig& c = model.layout.config();
    const auto experts = static_cast<size_t>(c.num_experts);
    kernels::Context ctx(2);
    TrainerConfig config = config_of(kernels::LossKind::kGrpo);
    config.router_bias_rate = 0.01;
    config.micro_batch_tokens = 70;
    Trainer trainer(ctx, model.layout, config);
    const auto batch = random_batch(10, 8, true);
    std::vector<int64_t> load;
    for (const TrainSequence& q : batch) {
      TrainPass pass(ctx, {&model.layout, model.weights(), nullptr, nullptr}, false);
      pass.forward(q.tokens, {{static_cast<int64_t>(q.tokens.size())}});
      load.resize(pass.expert_load().size());
      for (size_t i = 0; i < load.size(); ++i) load[i] += pass.expert_load()[i];
    }
    Arena out(model.layout);
    const double most = trainer.step(model.weights(), out.data(), batch).router_max_load;
    double want_most = 0;
    size_t first = 0;
    int64_t moved[3] = {};
    for (int64_t layer = 0; layer < c.num_layers; ++layer) {
      if (!c.is_moe(layer)) continue;
      const int64_t sum = std::accumulate(load.begin() + static_cast<long>(first), load.begin() + static_cast<long>(first + experts), int64_t{0});
      const auto* bias =
          reinterpret_cast<const float*>(out.data() + model.layout.tensor(model.layout.layer(layer).router_bias).byte_offset);
      const auto* before =
          reinterpret_cast<const float*>(model.weights() + model.layout.tensor(model.layout.layer(layer).router_bias).byte_offset);
      for (size_t e = 0; e < experts; ++e) {
        const int64_t less = sum - load[first + e] * static_cast<int64_t>(experts);
        const float sign = static_cast<float>((less > 0) - (less < 0));
        EXPECT_EQ(bias[e], before[e] + 0.01f * sign) << "layer " << layer << " expert " << e;
        ++moved[1 + static_cast<int>(sign)];
        want_most = std::max(want_most, static_cast<double>(load[first + e] * static_cast<int64_t>(experts)) / static_cast<double>(sum));
      }
      first += experts;
    }
    ASSERT_EQ(first, load.size());
    EXPECT_GT(first, experts) << "more than one layer of experts";
    EXPECT_GT(moved[0], 0);
    EXPECT_GT(moved[2], 0);
    EXPECT_DOUBLE_EQ(most, want_most);
  }
}

}  // namespace
}  // namespace perigee::policy
