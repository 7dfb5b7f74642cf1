// The truth of what a step is the gradient of (objective_test.cpp): reverse mode over float64 references of the model
// (mixers_ref.h) and of the loss (loss_ref.h), of a model or of adapters merged into one.
#pragma once
#include <gtest/gtest.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "policy/learn/backend.h"
#include "policy/learn/trainer.h"
#include "tests/kernels/loss/loss_case.h"
#include "tests/policy/model/mixers_model.h"
#include "tests/policy/model/tape.h"

namespace perigee::policy::objective {

using perigee::reference::LossSequence;
using reference::Tape;
using reference::Tensors;
using reference::Var;
using testing::MixersModel;
using testing::SmallAdapters;
using testing::WeightsMemory;

inline constexpr int64_t kRank = 4;
using Values = std::map<std::string, std::vector<double>>;

// Lengths 1 and 2, a turn of tools in the middle of an answer, another temperature, nothing to learn in one.
inline std::vector<TrainSequence> episodes(int32_t vocab) {
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
inline Slopes slopes(const TrainerConfig& config, const std::vector<TrainSequence>& batch,
                     const Scores<double>& now, const std::vector<std::vector<double>>& old,
                     const std::vector<std::vector<double>>& ref) {
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

inline double distance(const std::vector<double>& a, const std::vector<double>& b) {
  EXPECT_EQ(a.size(), b.size());
  double sum = 0;
  for (size_t i = 0; i < b.size(); ++i) sum += (a[i] - b[i]) * (a[i] - b[i]);
  return std::sqrt(sum);
}

// As in mixers_gradient_test.cpp: a multiple of what reverse mode of the plain recurrence costs in float32, in the tensor or
// in the median one where that is more. The multiple is larger than there: a weight of a whole sequence takes the errors of
// all its log-probabilities at once, in which plain float32 may be lucky. Seen: up to 3.3, and 9.3 with such a weight; all are
// far below the 1e-4 of its norm by which a gradient without its smallest term is wrong.
inline void expect_near(const Values& got, const Values& truth, const Values& plain,
                        const std::string& title) {
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

}  // namespace perigee::policy::objective
