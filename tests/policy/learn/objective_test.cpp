// What a step is the gradient of, whole: every loss with its correction, KL and entropy terms, answers in pieces, worked
// examples beside episodes, two temperatures, micro-batches, several optimiser steps on one batch; of a model and of
// adapters beside it, experts included; and what a step reports of it. The references (objective_ref.h) share no code with
// what is tested.
#include <gtest/gtest.h>

#include "tests/policy/learn/objective_ref.h"

namespace perigee::policy {
namespace {

using kernels::Correction;
using kernels::KlKind;
using kernels::LossKind;
using objective::by_tape;
using objective::episodes;
using objective::expect_near;
using objective::Learner;
using objective::Values;
using testing::WeightsMemory;

// Log-probabilities are good to 1e-5 (float32, logits near 5), and these are means of smooth functions of them.
void expect_metrics(const StepMetrics& got, const StepMetrics& want, const std::string& title) {
  const auto near = [&](double StepMetrics::*f, const char* name) {
    EXPECT_NEAR(got.*f, want.*f, 4e-5 * (1 + std::abs(want.*f))) << title << " " << name;
  };
  near(&StepMetrics::loss, "loss");
  near(&StepMetrics::policy_loss, "policy_loss");
  near(&StepMetrics::ptx_loss, "ptx_loss");
  near(&StepMetrics::kl, "kl");
  near(&StepMetrics::entropy, "entropy");
  near(&StepMetrics::ratio_mean, "ratio_mean");
  near(&StepMetrics::clip_fraction, "clip_fraction");
  near(&StepMetrics::mismatch_kl, "mismatch_kl");
  near(&StepMetrics::mismatch_max, "mismatch_max");
  near(&StepMetrics::mismatch_share, "mismatch_share");
  EXPECT_EQ(got.tokens, want.tokens) << title;
  EXPECT_EQ(got.trained_tokens, want.trained_tokens) << title;
  EXPECT_EQ(got.sequences, want.sequences) << title;
  EXPECT_EQ(got.dropped_sequences, 0) << title;
}

TrainerConfig trainer_config(LossKind kind, Correction correction, KlKind kl) {
  TrainerConfig c;
  c.loss = kernels::loss_defaults(kind);
  c.loss.max_length = 11;
  c.loss.correction = correction;
  c.loss.cap = 1.3;
  c.loss.icepop_low = 0.3;
  c.loss.icepop_high = 3;
  c.loss.kl = kl;
  c.loss.kl_coef = 0.4;
  c.loss.entropy_coef = 0.2;
  c.ptx_coef = 0.3;
  c.micro_batch_tokens = 20;
  c.schedule.lr = 2e-3;
  return c;
}

struct Case {
  const char* name;
  LossKind kind;
  Correction correction;
  KlKind kl;
};
constexpr Case kCases[] = {{"grpo", LossKind::kGrpo, Correction::kTis, KlKind::kK3},
                           {"dr_grpo", LossKind::kDrGrpo, Correction::kIcepop, KlKind::kK2},
                           {"dapo", LossKind::kDapo, Correction::kSeqMis, KlKind::kK1},
                           {"gspo", LossKind::kGspo, Correction::kSeqTis, KlKind::kK3},
                           {"cispo", LossKind::kCispo, Correction::kTis, KlKind::kK2},
                           {"rloo", LossKind::kRloo, Correction::kNone, KlKind::kK1},
                           {"k15", LossKind::kK15, Correction::kSeqTis, KlKind::kK3}};

void expect_first_step(Learner& of, const Case& c, const std::string& title) {
  const TrainerConfig config = trainer_config(c.kind, c.correction, c.kl);
  const auto batch = episodes(of.model.vocab());
  Learner other(of.model.config,
                of.adapters ? of.adapters->layout.config().targets : std::vector<std::string>{}, 7);
  std::byte* const reference = const_cast<std::byte*>(other.weights());
  StepMetrics want;
  const Values truth = by_tape<double>(of, config, batch, of.weights(), of.weights(), reference, &want),
               plain = by_tape<float>(of, config, batch, of.weights(), of.weights(), reference, nullptr);
  kernels::Context ctx(2);
  Trainer trainer = of.trainer(ctx, config);
  std::vector<float> flat(static_cast<size_t>(of.layout().elements())), again(flat);
  const StepMetrics m = trainer.gradients(of.weights(), batch, flat.data(), reference);
  expect_near(of.named(flat.data()), truth, plain, title);
  expect_metrics(m, want, title);
  TrainerConfig recomputing = config;
  recomputing.recompute = true;
  kernels::Context one(1);
  of.trainer(one, recomputing).gradients(of.weights(), batch, again.data(), reference);
  EXPECT_EQ(flat, again) << title << ": recomputed, on one thread";
}

nlohmann::json experts(const std::vector<std::string>& mixers, const char* patch = "{}") {
  nlohmann::json c = testing::mixers_config(mixers, mixers.size());
  c.merge_patch(
      nlohmann::json::parse(R"({"num_experts": 6, "num_experts_per_token": 2, "num_shared_experts": 1,
      "first_k_dense_replace": 1, "moe_intermediate_size": 16, "intermediate_size": 32, "routed_scaling_factor": 1.5})"));
  c.merge_patch(nlohmann::json::parse(patch));
  return c;
}

TEST(Objective, EveryLossHasItsGradientInTheWeights) {
  for (const Case& c : kCases) {
    Learner of(experts({"gdn", "attention"}, R"({"hidden_size": 24})"), false, 31);
    expect_first_step(of, c, c.name);
  }
}

// All of it worked examples: their mean weighs 1, and the policy's terms are not there.
TEST(Objective, OfASupervisedStepIsTheMeanLogLikelihood) {
  Learner of(experts({"kda", "mla"}), false, 35);
  const TrainerConfig config = trainer_config(LossKind::kGrpo, Correction::kTis, KlKind::kK3);
  auto batch = episodes(of.model.vocab());
  for (TrainSequence& q : batch) q.curated = true;
  StepMetrics want;
  const Values truth = by_tape<double>(of, config, batch, of.weights(), of.weights(), of.weights(), &want),
               plain = by_tape<float>(of, config, batch, of.weights(), of.weights(), of.weights(), nullptr);
  kernels::Context ctx(2);
  std::vector<float> flat(static_cast<size_t>(of.layout().elements()));
  const StepMetrics m = of.trainer(ctx, config).gradients(of.weights(), batch, flat.data(), of.weights());
  expect_near(of.named(flat.data()), truth, plain, "worked examples");
  expect_metrics(m, want, "worked examples");
}

TEST(Objective, EveryLossHasItsGradientInAdaptersOfExperts) {
  for (const Case& c : kCases) {
    Learner of(experts({"gdn", "attention"}, R"({"hidden_size": 24, "first_k_dense_replace": 0})"), true, 32);
    expect_first_step(of, c, std::string("adapters, ") + c.name);
  }
}

// The first adapter of the layout is that of an expert, one half of gate and up has none, or one matrix of all.
TEST(Objective, HasItsGradientInAnyChoiceOfTargets) {
  size_t i = 0;
  for (const std::vector<std::string>& targets :
       std::vector<std::vector<std::string>>{{"w1"},
                                             {"w3"},
                                             {"w2"},
                                             {"w2", "w3", "w1"},
                                             {"up_proj"},
                                             {"gate_proj", "down_proj"},
                                             {"a_proj"},
                                             {"o_proj", "w3"}}) {
    Learner of(experts({"gdn"}, R"({"hidden_size": 24, "first_k_dense_replace": 0})"), targets, 36);
    expect_first_step(of, kCases[i++ % std::size(kCases)], targets.back() + " alone");
  }
}

TEST(Objective, HasItsGradientInEveryMixer) {
  size_t i = 0;
  for (const char* mixer : {"kda", "gdn", "mamba2", "dplr", "mla", "mla_rope", "attention"})
    for (const bool adapt : {false, true}) {
      const nlohmann::json config = experts(
          {mixer, mixer}, R"({"num_shared_experts": 0, "hidden_size": 24, "moe_renormalize": false})");
      Learner of(config, adapt, 33);
      expect_first_step(of, kCases[i++ % std::size(kCases)],
                        std::string(mixer) + (adapt ? ", adapters" : ""));
    }
}

class GradientOf : public StepObserver {
 public:
  void on_gradient(int64_t minibatch, std::span<const float> gradient, const StepMetrics& m,
                   double) override {
    gradients.emplace_back(gradient.begin(), gradient.end());
    metrics.push_back(m);
    EXPECT_EQ(minibatch, static_cast<int64_t>(gradients.size()) - 1);
  }
  std::vector<std::vector<float>> gradients;
  std::vector<StepMetrics> metrics;
};

// The second optimiser step on a batch: ratios are against the weights before the first.
TEST(Objective, OfTheSecondMinibatchIsAgainstTheWeightsBeforeTheFirst) {
  for (const Case& c : kCases)
    for (const bool adapt : {false, true}) {
      const std::string title = std::string(c.name) + (adapt ? ", adapters, second" : ", second");
      Learner of(experts({"kda", "mla"}, R"({"hidden_size": 24})"), adapt, 34),
          other(of.model.config, adapt, 8);
      TrainerConfig config = trainer_config(c.kind, c.correction, c.kl);
      config.loss.clip_low = c.kind == LossKind::kGspo ? 0.003 : 0.02;
      config.loss.clip_high = c.kind == LossKind::kGspo ? 0.004 : 0.03;
      std::vector<TrainSequence> batch = episodes(of.model.vocab());
      // Halves of equal kinds: sequences 0 to 2 and 3 to 5, curated 6 and 7.
      const std::vector<TrainSequence> first = {batch[0], batch[1], batch[2], batch[6]},
                                       second = {batch[3], batch[4], batch[5], batch[7]};
      kernels::Context ctx(2);
      WeightsMemory middle(of.layout()), out(of.layout());
      const std::byte* const reference = other.weights();
      of.trainer(ctx, config).step(of.weights(), middle.data(), first, reference);
      config.minibatches = 2;
      GradientOf seen;
      Trainer trainer = of.trainer(ctx, config);
      trainer.observe(&seen);
      trainer.step(of.weights(), out.data(), batch, reference);
      ASSERT_EQ(seen.gradients.size(), 2u);
      StepMetrics want;
      const Values truth = by_tape<double>(of, config, second, middle.data(), of.weights(), reference, &want),
                   plain =
                       by_tape<float>(of, config, second, middle.data(), of.weights(), reference, nullptr);
      expect_near(of.named(seen.gradients[1].data()), truth, plain, title);
      expect_metrics(seen.metrics[1], want, title);
      EXPECT_NE(seen.metrics[1].ratio_mean, 1) << title;
    }
}

}  // namespace
}  // namespace perigee::policy
