// What a step is the gradient of, whole: every loss with its correction, KL and entropy terms, answers in pieces, worked
// examples beside episodes, two temperatures, micro-batches, several optimiser steps on one batch; of a model and of
// adapters beside it, experts included. The truth is reverse mode over float64 references of the model (mixers_ref.h) and
// of the loss (loss_ref.h), which share no code with what is tested.
#include <gtest/gtest.h>

#include <numeric>

#include "policy/learn/backend.h"
#include "policy/learn/trainer.h"
#include "tests/kernels/loss/loss_case.h"
#include "tests/policy/model/mixers_model.h"
#include "tests/policy/model/tape.h"

namespace perigee::policy {
namespace {

using kernels::Correction;
using kernels::KlKind;
using kernels::LossConfig;
using kernels::LossKind;
using perigee::reference::LossSequence;
using reference::Tape;
using reference::Tensors;
using reference::Var;
using testing::MixersModel;
using testing::SmallAdapters;
using testing::WeightsMemory;

constexpr int64_t kRank = 4;
using Values = std::map<std::string, std::vector<double>>;

// Lengths 1 and 2, a turn of tools in the middle of an answer, another temperature, nothing to learn in one.
std::vector<TrainSequence> episodes(int32_t vocab) {
  Random random(91);
  std::vector<TrainSequence> batch;
  const struct {
    int64_t length, prompt, tool_begin, tool_end;
    float temperature;
    bool curated;
  } rows[] = {{1, 1, 0, 0, 1, false}, {17, 3, 8, 12, 1, false},   {2, 1, 0, 0, 1, false},
              {9, 9, 0, 0, 1, false}, {12, 1, 0, 0, 0.7f, false}, {7, 2, 0, 0, 0.7f, false},
              {10, 4, 6, 8, 1, true}, {5, 1, 0, 0, 1, true}};
  for (const auto& r : rows) {
    TrainSequence q;
    for (int64_t t = 0; t < r.length; ++t) {
      q.tokens.push_back(static_cast<int32_t>(random.next_int(0, vocab - 1)));
      q.mask.push_back(t >= r.prompt && (t < r.tool_begin || t >= r.tool_end));
      q.mu.push_back(-4.0f + static_cast<float>(random.next_normal()));
    }
    q.temperature = r.temperature;
    q.advantage = static_cast<float>(random.next_normal());
    q.curated = r.curated;
    batch.push_back(std::move(q));
  }
  return batch;
}

// Of every trained token, in order of sequences: log-probability and entropy.
template <class T>
struct Scores {
  std::vector<std::vector<T>> logprob, entropy;  // [sequences][trained tokens]
};
template <class T>
Scores<T> score(const nlohmann::json& config, const Tensors<T>& tensors,
                const std::vector<TrainSequence>& batch) {
  using std::exp;
  using std::log;
  reference::Model<T> model(config, tensors);
  Scores<T> out;
  for (const TrainSequence& q : batch) {
    model.reset();
    out.logprob.emplace_back();
    out.entropy.emplace_back();
    for (size_t t = 1; t < q.tokens.size(); ++t) {
      const std::vector<T> plain_logprobs = model.step(q.tokens[t - 1]);
      if (q.mask[t] == 0) continue;
      T sum(0), entropy(0);
      std::vector<T> l;
      for (const T& x : plain_logprobs) l.push_back(x / T(q.temperature));
      for (const T& x : l) sum = sum + exp(x);
      const T lse = log(sum);
      for (T& x : l) x = x - lse;
      for (const T& x : l) entropy = entropy - exp(x) * x;
      out.logprob.back().push_back(l[static_cast<size_t>(q.tokens[t])]);
      out.entropy.back().push_back(entropy);
    }
  }
  return out;
}

// d loss / d log-probability and / d entropy, and the loss, by the reference of the losses.
struct Slopes {
  std::vector<std::vector<double>> logprob, entropy;
  StepMetrics metrics;  // what a step reports of it, but for the gradient
};
Slopes slopes(const TrainerConfig& config, const std::vector<TrainSequence>& batch, const Scores<double>& now,
              const std::vector<std::vector<double>>& old, const std::vector<std::vector<double>>& ref) {
  std::vector<LossSequence> policy;
  double tokens = 0, curated_tokens = 0;
  for (size_t i = 0; i < batch.size(); ++i) {
    const auto n = now.logprob[i].size();
    if (batch[i].curated) {
      curated_tokens += static_cast<double>(n);
      continue;
    }
    LossSequence s{now.logprob[i],    old[i], {}, ref[i], now.entropy[i], std::vector<double>(n, 1),
                   batch[i].advantage};
    for (size_t t = 0; t < batch[i].mask.size(); ++t)
      if (batch[i].mask[t] != 0) s.mu.push_back(batch[i].mu[t]);
    tokens += static_cast<double>(n);
    policy.push_back(s);
  }
  const auto spec = spec_of(config.loss);
  const auto sequences = static_cast<double>(policy.size());
  const std::vector<double> dl = perigee::reference::gradient(spec, policy, sequences, tokens),
                            dh = perigee::reference::gradient(spec, policy, sequences, tokens, true);
  std::vector<std::vector<double>> frozen;
  for (const auto& s : policy) frozen.push_back(s.logprob);
  Slopes out;
  StepMetrics& m = out.metrics;
  auto alone = spec;
  alone.kl_coef = alone.entropy_coef = 0;
  m.policy_loss = perigee::reference::loss(alone, policy, frozen, sequences, tokens);
  m.loss = perigee::reference::loss(spec, policy, frozen, sequences, tokens);
  m.ratio_mean = policy.empty() ? 1 : 0;
  for (const LossSequence& s : policy) {
    double together = 0;
    for (size_t t = 0; t < s.logprob.size(); ++t)
      together += (s.logprob[t] - s.old[t]) / static_cast<double>(s.logprob.size());
    for (size_t t = 0; t < s.logprob.size(); ++t) {
      const double d = s.logprob[t] - s.ref[t], log_rho = s.old[t] - s.mu[t];
      const double ratio = std::exp(spec.objective == "gspo" ? together : s.logprob[t] - s.old[t]);
      const bool clips = spec.objective == "clip" || spec.objective == "gspo";
      const bool clipped = (clips && s.advantage > 0 && ratio > 1 + spec.clip_high) ||
                           (clips && s.advantage < 0 && ratio < 1 - spec.clip_low) ||
                           (spec.objective == "cispo" && ratio > 1 + spec.clip_high);
      m.kl += (spec.kl == "k1" ? d : spec.kl == "k2" ? d * d / 2 : std::exp(-d) - 1 + d) / tokens;
      m.entropy += s.entropy[t] / tokens;
      m.ratio_mean += ratio / tokens;
      m.clip_fraction += clipped / tokens;
      m.mismatch_kl += (std::exp(log_rho) - 1 - log_rho) / tokens;
      m.mismatch_max = std::max(m.mismatch_max, std::abs(log_rho));
      m.mismatch_share += (log_rho != 0) / tokens;
    }
  }
  const double coef = policy.empty() ? 1 : config.ptx_coef;
  for (size_t i = 0; i < batch.size(); ++i) {
    m.tokens += static_cast<int64_t>(batch[i].tokens.size());
    m.trained_tokens += static_cast<int64_t>(now.logprob[i].size());
    ++m.sequences;
    if (!batch[i].curated) continue;
    for (const double l : now.logprob[i]) m.ptx_loss -= coef * l / curated_tokens;
    if (policy.empty())
      for (const double h : now.entropy[i]) m.entropy += h / curated_tokens;
  }
  m.loss += m.ptx_loss;
  size_t at = 0;
  for (size_t i = 0; i < batch.size(); ++i) {
    const auto n = now.logprob[i].size();
    if (batch[i].curated) {
      out.logprob.emplace_back(n, -coef / curated_tokens);
      out.entropy.emplace_back(n, 0);
      continue;
    }
    out.logprob.emplace_back(dl.begin() + static_cast<long>(at), dl.begin() + static_cast<long>(at + n));
    out.entropy.emplace_back(dh.begin() + static_cast<long>(at), dh.begin() + static_cast<long>(at + n));
    at += n;
  }
  return out;
}

// What learns: a model, or adapters beside it.
struct Learner {
  // targets: of adapters; empty: the model itself.
  Learner(const nlohmann::json& config, const std::vector<std::string>& targets, uint64_t seed)
      : model(config, seed) {
    if (!targets.empty())
      adapters = std::make_unique<SmallAdapters>(model.layout, 0.1, testing::lora_config(kRank, targets));
  }
  Learner(const nlohmann::json& config, bool adapt, uint64_t seed)
      : Learner(config,
                adapt ? testing::adaptable(MixersModel(config, seed).layout) : std::vector<std::string>{},
                seed) {}
  const ArenaLayout& layout() const {
    return adapters ? static_cast<const ArenaLayout&>(adapters->layout) : model.layout;
  }
  const std::byte* weights() { return adapters ? adapters->weights() : model.weights(); }
  Trainer trainer(kernels::Context& ctx, const TrainerConfig& c) {
    return adapters ? Trainer(host_learn_backend(ctx, adapters->layout, model.weights(), c.recompute),
                              adapters->layout, c)
                    : Trainer(ctx, model.layout, c);
  }
  std::vector<float> adapter_values(int tensor, const float* flat) const {
    const ParamSpec& t = adapters->layout.tensor(tensor);
    std::vector<float> out(static_cast<size_t>(t.n * t.k));
    adapters->layout.read_flat(flat, tensor, out.data());
    return out;
  }
  // The parameters of the model, of the adapters merged into it, that these weights are.
  Tensors<double> tensors(const std::byte* of) {
    std::vector<float> flat(static_cast<size_t>(layout().elements()));
    layout().weights_to_flat(of, flat.data());
    Tensors<double> out;
    for (const CheckpointTensor& t : model.layout.checkpoint())
      for (const float v : model.values(t, adapters ? model.flat.data() : flat.data()))
        out[t.name].push_back(v);
    if (!adapters) return out;
    const double s = adapters->layout.scale();
    for (const auto& t : adapters->layout.adapters()) {
      const std::vector<float> a = adapter_values(t.a, flat.data()), b = adapter_values(t.b, flat.data());
      std::vector<double>& w = out.at(t.module + ".weight");
      for (int64_t i = 0; i < t.n; ++i)
        for (int64_t j = 0; j < t.k; ++j)
          for (int64_t r = 0; r < kRank; ++r)
            w[static_cast<size_t>(i * t.k + j)] +=
                s * b[static_cast<size_t>(i * kRank + r)] * a[static_cast<size_t>(r * t.k + j)];
    }
    return out;
  }
  // Gradients by name from those of the (merged) model; with adapters dA = s Bᵀ dW, dB = s dW Aᵀ.
  Values named(const Values& dw, const std::byte* at) {
    if (!adapters) return dw;
    std::vector<float> flat(static_cast<size_t>(layout().elements()));
    layout().weights_to_flat(at, flat.data());
    Values out;
    const double s = adapters->layout.scale();
    for (const auto& t : adapters->layout.adapters()) {
      const std::vector<float> a = adapter_values(t.a, flat.data()), b = adapter_values(t.b, flat.data());
      std::vector<double> da(a.size()), db(b.size());
      const std::vector<double>& d = dw.at(t.module + ".weight");
      for (int64_t i = 0; i < t.n; ++i)
        for (int64_t j = 0; j < t.k; ++j)
          for (int64_t r = 0; r < kRank; ++r) {
            da[static_cast<size_t>(r * t.k + j)] +=
                s * d[static_cast<size_t>(i * t.k + j)] * b[static_cast<size_t>(i * kRank + r)];
            db[static_cast<size_t>(i * kRank + r)] +=
                s * d[static_cast<size_t>(i * t.k + j)] * a[static_cast<size_t>(r * t.k + j)];
          }
      out[t.module + " A"] = da;
      out[t.module + " B"] = db;
    }
    return out;
  }
  Values named(const float* gradient) {
    Values out;
    const auto put = [&](const std::string& name, const std::vector<float>& x) {
      out[name].assign(x.begin(), x.end());
    };
    if (adapters) {
      for (const auto& t : adapters->layout.adapters()) {
        put(t.module + " A", adapter_values(t.a, gradient));
        put(t.module + " B", adapter_values(t.b, gradient));
      }
    } else {
      for (const CheckpointTensor& t : model.layout.checkpoint())
        if (!t.name.ends_with("e_score_correction_bias")) put(t.name, model.values(t, gradient));
    }
    return out;
  }

  MixersModel model;
  std::unique_ptr<SmallAdapters> adapters;
};

// The gradient at `at`, with `old` from the weights at `before` and KL against `reference`; in T.
template <class T>
Values by_tape(Learner& of, const TrainerConfig& config, const std::vector<TrainSequence>& batch,
               const std::byte* at, const std::byte* before, const std::byte* reference_weights,
               StepMetrics* metrics) {
  const auto values = [&](const std::byte* weights) {
    const Tensors<double> wide = of.tensors(weights);
    Tensors<T> tensors;
    for (const auto& [name, x] : wide) tensors[name].assign(x.begin(), x.end());
    const Scores<T> s = score<T>(of.model.config, tensors, batch);
    Scores<double> out;
    for (const auto& l : s.logprob) out.logprob.emplace_back(l.begin(), l.end());
    for (const auto& h : s.entropy) out.entropy.emplace_back(h.begin(), h.end());
    return out;
  };
  const Scores<double> now = values(at);
  const Slopes d = slopes(config, batch, now, before == at ? now.logprob : values(before).logprob,
                          values(reference_weights).logprob);
  if (metrics != nullptr) *metrics = d.metrics;
  Tape<T> tape;
  Tensors<Var<T>> leaves;
  for (const auto& [name, x] : of.tensors(at))
    for (const double v : x) leaves[name].push_back(tape.leaf(v));
  const Scores<Var<T>> s = score<Var<T>>(of.model.config, leaves, batch);
  Var<T> sum(0);
  for (size_t i = 0; i < batch.size(); ++i)
    for (size_t t = 0; t < s.logprob[i].size(); ++t)
      sum = sum + s.logprob[i][t] * Var<T>(d.logprob[i][t]) + s.entropy[i][t] * Var<T>(d.entropy[i][t]);
  const std::vector<T> by_node = tape.gradient(sum);
  Values dw;
  for (const auto& [name, x] : leaves) {
    if (name.ends_with("e_score_correction_bias")) continue;
    for (const Var<T>& v : x) dw[name].push_back(by_node[static_cast<size_t>(v.node)]);
  }
  return of.named(dw, at);
}

double distance(const std::vector<double>& a, const std::vector<double>& b) {
  EXPECT_EQ(a.size(), b.size());
  double sum = 0;
  for (size_t i = 0; i < b.size(); ++i) sum += (a[i] - b[i]) * (a[i] - b[i]);
  return std::sqrt(sum);
}

// As in mixers_gradient_test.cpp: a multiple of what reverse mode of the plain recurrence costs in float32, in the tensor or
// in the median one where that is more. The multiple is larger than there: a weight of a whole sequence takes the errors of
// all its log-probabilities at once, in which plain float32 may be lucky. Seen: up to 3.3, and 9.3 with such a weight; all are
// far below the 1e-4 of its norm by which a gradient without its smallest term is wrong.
void expect_near(const Values& got, const Values& truth, const Values& plain, const std::string& title) {
  ASSERT_EQ(got.size(), truth.size());
  std::vector<double> relative;
  const auto norm = [](const std::vector<double>& x) {
    return distance(x, std::vector<double>(x.size(), 0));
  };
  for (const auto& [name, want] : truth)
    if (norm(want) > 0) relative.push_back(distance(plain.at(name), want) / norm(want));
  ASSERT_GT(relative.size(), truth.size() / 2) << title;
  std::nth_element(relative.begin(), relative.begin() + static_cast<long>(relative.size() / 2),
                   relative.end());
  const double typical = relative[relative.size() / 2];
  double worst = 0;
  for (const auto& [name, want] : truth) {
    const double bound = std::max(typical * norm(want), distance(plain.at(name), want));
    const double error = distance(got.at(name), want);
    EXPECT_LE(error, 20 * bound) << title << " " << name << ": " << error / norm(want) << " of its norm";
    if (bound > 0) worst = std::max(worst, error / bound);
  }
  std::printf("%s: at most %.2f of plain float32's error, %.2g\n", title.c_str(), worst, typical);
}

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
