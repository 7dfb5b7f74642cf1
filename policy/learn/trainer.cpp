#include "policy/learn/trainer.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "policy/learn/backend.h"

namespace perigee::policy {

using namespace kernels;

struct Trainer::Impl {
  std::unique_ptr<LearnBackend> backend;
  const ParamLayout& model;
  const ArenaLayout& layout;  // of what is trained: the model, or adapters beside it
  TrainerConfig config;
  ScheduleParams schedule;
  int64_t schedule_start = 0;
  int64_t steps = 0;
  StepObserver* observer = nullptr;

  Impl(std::unique_ptr<LearnBackend> b, const ParamLayout& m, const ArenaLayout& l, const TrainerConfig& t)
      : backend(std::move(b)), model(m), layout(l), config(t), schedule(t.schedule) {
    check_config(config.loss);
    PERIGEE_CHECK(config.micro_batch_tokens > 0 && config.minibatches > 0);
    PERIGEE_CHECK(backend->moment_layout().form() == config.moments, "the backend keeps other moments");
  }

  // Weight of the worked examples' own mean: all there is in a supervised step, learn.ptx_coef beside episodes. Decided
  // by the batch, not by a minibatch of it that happens to hold nothing else.
  double curated_coef(const std::vector<TrainSequence>& batch) const {
    for (const TrainSequence& q : batch)
      if (!q.curated) return config.ptx_coef;
    return 1.0;
  }

  struct Totals {
    LossStats stats;
    double ptx = 0;
    int64_t ptx_tokens = 0, tokens = 0, trained_tokens = 0, sequences = 0;
    std::vector<int64_t> expert_load;
  };

  // Entries' log-probabilities under other weights, for micro-batches packed the same way.
  std::vector<std::vector<float>> frozen_logprobs(const std::byte* weights,
                                                  const std::vector<MicroBatch>& batches) {
    std::vector<std::vector<float>> out;
    backend->set_weights(weights);
    for (const MicroBatch& b : batches) {
      const LearnBackend::Scores scores = backend->forward(b, false);
      out.emplace_back(scores.logprob, scores.logprob + b.entries());
    }
    return out;
  }

  void accumulate(const std::vector<MicroBatch>& batches, const std::vector<std::vector<float>>& old,
                  const std::vector<std::vector<float>>& ref, double curated_coef, int64_t part, Totals& totals);
  void require_finite(const MicroBatch& b, const float* logprob);
  std::vector<float> recorded(const MicroBatch& b) const;
  void require_finite_gradient();
  StepMetrics metrics(const Totals& totals);
  double grad_scale(const StepMetrics& metrics) const {
    return config.grad_clip > 0 && metrics.grad_norm > config.grad_clip ? config.grad_clip / metrics.grad_norm : 1;
  }
  void apply(std::byte* weights_out, const StepMetrics& metrics, const Totals& totals);
  void balance_router(std::byte* weights_out, const std::vector<int64_t>& load);
};

void Trainer::Impl::require_finite(const MicroBatch& b, const float* logprob) {
  int64_t bad = 0;
  while (bad < b.entries() && std::isfinite(logprob[bad])) ++bad;
  if (bad == b.entries()) return;
  const int64_t row = b.rows[static_cast<size_t>(bad)];
  int64_t sequence = 0, begin = 0;
  while (begin + b.lengths[static_cast<size_t>(sequence)] <= row)
    begin += b.lengths[static_cast<size_t>(sequence++)];
  const int64_t layer_found = backend->first_nonfinite_layer(b);
  const std::string where =
      layer_found >= 0 ? fmt::format("first in layer {}", layer_found) : std::string("in the head");
  throw_environment(
      "NaN or infinity in the forward pass, {} (sequence {} of the micro-batch, token {}); weights and "
      "optimiser state are unchanged",
      where, sequence, row - begin + 1);
}

// The sampler's log-probabilities of the entries. One that is no number would be a weight of zero to some corrections, and
// nothing at all to others.
std::vector<float> Trainer::Impl::recorded(const MicroBatch& b) const {
  std::vector<float> mu;
  mu.reserve(b.rows.size());
  for (size_t s = 0; s < b.sequences.size(); ++s) {
    const TrainSequence& q = *b.sequences[s];
    for (size_t t = 1; t < q.tokens.size(); ++t) {
      if (q.mask[t] == 0) continue;
      if (!std::isfinite(q.mu[t]))
        throw_environment(
            "the sampler recorded {} as a log-probability (sequence {} of the micro-batch, token {}); weights and "
            "optimiser state are unchanged",
            q.mu[t], s, t);
      mu.push_back(q.mu[t]);
    }
  }
  return mu;
}

void Trainer::Impl::require_finite_gradient() {
  const int64_t bad = backend->gradient_first_nonfinite();
  if (bad < 0) return;
  for (const ParamSpec& t : layout.tensors())
    if (bad >= t.element_offset && bad < t.element_offset + t.elements)
      throw_environment("NaN or infinity in the gradient of {}; weights and optimiser state are unchanged",
                        t.name);
  throw_environment("NaN or infinity in the gradient; weights and optimiser state are unchanged");
}

void Trainer::Impl::accumulate(const std::vector<MicroBatch>& batches, const std::vector<std::vector<float>>& old,
                               const std::vector<std::vector<float>>& ref, double curated_coef, int64_t part,
                               Totals& totals) {
  Normalizer norm;
  int64_t curated_tokens = 0, policy_sequences = 0;
  for (const MicroBatch& b : batches) {
    if (b.curated) {
      curated_tokens += b.entries();
    } else {
      policy_sequences += static_cast<int64_t>(b.sequences.size());
      norm.tokens += b.entries();
    }
  }
  norm.sequences = policy_sequences;
  const bool wants_entropy = config.loss.entropy_coef != 0;
  for (size_t i = 0; i < batches.size(); ++i) {
    const MicroBatch& b = batches[i];
    const int64_t n = b.entries();
    const LearnBackend::Scores p = backend->forward(b, true);
    require_finite(b, p.logprob);
    std::vector<float> dlogprob(static_cast<size_t>(n)), dentropy_memory(wants_entropy && !b.curated ? dlogprob.size() : 0);
    float* dentropy = dentropy_memory.empty() ? nullptr : dentropy_memory.data();
    std::vector<float> mu;
    if (b.curated) {
      totals.ptx += ptx_loss<float>(curated_coef, curated_tokens, n, p.logprob, nullptr, dlogprob.data());
      totals.ptx_tokens += n;
      if (policy_sequences == 0)
        for (int64_t t = 0; t < n; ++t) totals.stats.entropy_sum += p.entropy[t];
    } else {
      mu = recorded(b);
      std::vector<double> advantage;
      for (const TrainSequence* q : b.sequences) advantage.push_back(q->advantage);
      LossBatch<float> loss;
      loss.sequences = static_cast<int64_t>(b.sequences.size());
      loss.offsets = b.offsets.data();
      loss.logprob = p.logprob;
      loss.old = old.empty() ? nullptr : old[i].data();
      loss.mu = mu.data();
      loss.ref = ref.empty() ? nullptr : ref[i].data();
      loss.entropy = p.entropy;
      loss.advantage = advantage.data();
      policy_loss<float>(config.loss, norm, loss, dlogprob.data(), dentropy, totals.stats);
    }
    if (observer != nullptr)
      observer->on_batch({part, b.curated, b.sequences, b.offsets, p.logprob, p.entropy,
                          old.empty() || b.curated ? nullptr : old[i].data(), b.curated ? nullptr : mu.data(),
                          ref.empty() || b.curated ? nullptr : ref[i].data(), dlogprob.data(), norm, curated_tokens,
                          curated_coef});
    const std::vector<int64_t> load = backend->expert_load();
    backend->backward(b, dlogprob.data(), dentropy);
    totals.tokens += static_cast<int64_t>(b.tokens.size());
    totals.trained_tokens += n;
    totals.sequences += static_cast<int64_t>(b.sequences.size());
    totals.expert_load.resize(load.size());
    for (size_t e = 0; e < load.size(); ++e) totals.expert_load[e] += load[e];
  }
}

StepMetrics Trainer::Impl::metrics(const Totals& t) {
  StepMetrics out;
  const LossStats& s = t.stats;
  out.loss = s.loss + t.ptx;
  out.policy_loss = s.policy_loss;
  out.ptx_loss = t.ptx;
  out.kl = s.mean_kl();
  out.entropy = s.kept_tokens() > 0 ? s.mean_entropy()
                : t.ptx_tokens > 0  ? s.entropy_sum / static_cast<double>(t.ptx_tokens)
                                    : 0;
  out.clip_fraction = s.clip_fraction();
  out.ratio_mean = s.kept_tokens() > 0 ? s.mean_ratio() : 1;
  out.mismatch_kl = s.mean_mismatch();
  out.mismatch_max = s.mismatch_max;
  out.mismatch_share = s.mismatch_share();
  out.tokens = t.tokens;
  out.trained_tokens = t.trained_tokens;
  out.sequences = t.sequences;
  out.dropped_sequences = s.dropped_sequences;
  if (!std::isfinite(out.loss))
    throw_environment("NaN or infinity in the loss; weights and optimiser state are unchanged");
  require_finite_gradient();
  out.grad_norm = std::sqrt(backend->gradient_sum_of_squares());
  const auto experts = static_cast<size_t>(std::max<int64_t>(model.config().num_experts, 1));
  for (size_t first = 0; first + experts <= t.expert_load.size(); first += experts) {
    int64_t sum = 0, most = 0;
    for (size_t e = first; e < first + experts; ++e) {
      sum += t.expert_load[e];
      most = std::max(most, t.expert_load[e]);
    }
    if (sum > 0)
      out.router_max_load =
          std::max(out.router_max_load,
                   static_cast<double>(most) * static_cast<double>(experts) / static_cast<double>(sum));
  }
  return out;
}

void Trainer::Impl::apply(std::byte* weights_out, const StepMetrics& metrics, const Totals& totals) {
  AdamWParams p;
  p.lr = static_cast<float>(metrics.lr);
  p.beta1 = static_cast<float>(config.beta1);
  p.beta2 = static_cast<float>(config.beta2);
  p.eps = static_cast<float>(config.eps);
  p.weight_decay = static_cast<float>(config.weight_decay);
  p.step = steps + 1;
  p.grad_scale = static_cast<float>(grad_scale(metrics));
  backend->update(p, weights_out);
  if (config.router_bias_rate > 0) balance_router(weights_out, totals.expert_load);
  backend->finish(weights_out);
  ++steps;
}

// Auxiliary-loss-free balancing (DeepSeek-V3, arXiv 2412.19437 section 2.1.2): an expert that got less than
// its share is made a little easier to choose.
void Trainer::Impl::balance_router(std::byte* weights_out, const std::vector<int64_t>& load) {
  const ModelConfig& c = model.config();
  size_t first = 0;
  for (int64_t i = 0; i < c.num_layers; ++i) {
    if (!c.is_moe(i)) continue;
    const auto experts = static_cast<size_t>(c.num_experts);
    if (first + experts > load.size()) return;
    int64_t sum = 0;
    for (size_t e = 0; e < experts; ++e) sum += load[first + e];
    std::vector<float> change(experts);
    for (size_t e = 0; e < experts; ++e) {
      const int64_t difference = sum - load[first + e] * static_cast<int64_t>(experts);
      change[e] = static_cast<float>(config.router_bias_rate) *
                  static_cast<float>((difference > 0) - (difference < 0));
    }
    backend->add_to_vector(model.layer(i).router_bias, change, weights_out);
    first += experts;
  }
}

Trainer::Trainer(Context& ctx, const ParamLayout& layout, const TrainerConfig& config)
    : Trainer(host_learn_backend(ctx, layout, config.recompute, config.moments), layout, config) {}

Trainer::Trainer(std::unique_ptr<LearnBackend> backend, const ParamLayout& layout, const TrainerConfig& config)
    : impl_(std::make_unique<Impl>(std::move(backend), layout, layout, config)) {}

Trainer::Trainer(std::unique_ptr<LearnBackend> backend, const AdapterLayout& adapter, const TrainerConfig& config)
    : impl_(std::make_unique<Impl>(std::move(backend), adapter.base(), adapter, config)) {
  PERIGEE_CHECK(config.router_bias_rate == 0, "the router of a frozen model");
}
Trainer::~Trainer() = default;

namespace {

// Part `part` of `parts`, plain and curated sequences cut alike, in order.
std::vector<const TrainSequence*> minibatch(const std::vector<TrainSequence>& batch, int64_t part,
                                            int64_t parts) {
  std::vector<const TrainSequence*> out;
  for (const bool curated : {false, true}) {
    std::vector<const TrainSequence*> kind;
    for (const TrainSequence& s : batch)
      if (s.curated == curated) kind.push_back(&s);
    const auto n = static_cast<int64_t>(kind.size());
    for (int64_t i = n * part / parts; i < n * (part + 1) / parts; ++i)
      out.push_back(kind[static_cast<size_t>(i)]);
  }
  return out;
}

}  // namespace

StepMetrics Trainer::step(const std::byte* weights_in, std::byte* weights_out,
                          const std::vector<TrainSequence>& batch, const std::byte* reference) {
  Impl& s = *impl_;
  PERIGEE_CHECK(weights_in != weights_out && !batch.empty());
  PERIGEE_CHECK(s.config.loss.kl_coef == 0 || reference != nullptr, "a KL term needs a reference policy");
  const int64_t parts = s.config.minibatches;
  std::vector<std::vector<MicroBatch>> minibatches;
  std::vector<std::vector<std::vector<float>>> old, ref;
  for (int64_t part = 0; part < parts; ++part) {
    minibatches.push_back(pack(minibatch(batch, part, parts), s.config.micro_batch_tokens, false));
    // With one optimiser step per batch the snapshot is the policy itself, and the ratio exactly 1.
    old.push_back(parts > 1 ? s.frozen_logprobs(weights_in, minibatches.back())
                            : std::vector<std::vector<float>>{});
    ref.push_back(s.config.loss.kl_coef != 0 ? s.frozen_logprobs(reference, minibatches.back())
                                             : std::vector<std::vector<float>>{});
  }
  // Only a failure after the first of several optimiser steps has anything to undo.
  std::vector<std::byte> saved;
  if (parts > 1) {
    saved.resize(static_cast<size_t>(state_bytes()));
    save_state(saved.data());
  }
  StepMetrics sum;
  const std::byte* current = weights_in;
  int64_t done = 0;
  try {
    for (int64_t part = 0; part < parts; ++part) {
      if (minibatches[static_cast<size_t>(part)].empty()) continue;
      s.backend->set_weights(current);
      s.backend->zero_gradient();
      Impl::Totals totals;
      s.accumulate(minibatches[static_cast<size_t>(part)], old[static_cast<size_t>(part)],
                   ref[static_cast<size_t>(part)], s.curated_coef(batch), part, totals);
      StepMetrics m = s.metrics(totals);
      m.lr = scheduled_lr(s.schedule, s.steps - s.schedule_start);
      if (s.observer != nullptr) {
        std::vector<float> gradient(static_cast<size_t>(s.layout.elements()));
        s.backend->read_gradient(gradient.data());
        s.observer->on_gradient(part, gradient, m, s.grad_scale(m));
      }
      s.apply(weights_out, m, totals);
      current = weights_out;
      ++done;
      const double share = 1.0 / static_cast<double>(done);
      const auto mean = [&](double StepMetrics::*f) { sum.*f += (m.*f - sum.*f) * share; };
      for (auto f :
           {&StepMetrics::loss, &StepMetrics::policy_loss, &StepMetrics::kl, &StepMetrics::entropy,
            &StepMetrics::ptx_loss, &StepMetrics::grad_norm, &StepMetrics::lr, &StepMetrics::clip_fraction,
            &StepMetrics::mismatch_kl, &StepMetrics::mismatch_share, &StepMetrics::ratio_mean})
        mean(f);
      sum.mismatch_max = std::max(sum.mismatch_max, m.mismatch_max);
      sum.router_max_load = std::max(sum.router_max_load, m.router_max_load);
      sum.tokens += m.tokens;
      sum.trained_tokens += m.trained_tokens;
      sum.sequences += m.sequences;
      sum.dropped_sequences += m.dropped_sequences;
    }
  } catch (...) {
    if (!saved.empty()) load_state(saved.data());
    throw;
  }
  return sum;
}

StepMetrics Trainer::gradients(const std::byte* weights, const std::vector<TrainSequence>& batch,
                               float* gradient, const std::byte* reference) {
  Impl& s = *impl_;
  const auto batches = pack(minibatch(batch, 0, 1), s.config.micro_batch_tokens, false);
  std::vector<std::vector<float>> ref;
  if (s.config.loss.kl_coef != 0) ref = s.frozen_logprobs(reference, batches);
  s.backend->set_weights(weights);
  s.backend->zero_gradient();
  Impl::Totals totals;
  s.accumulate(batches, {}, ref, s.curated_coef(batch), 0, totals);
  const StepMetrics metrics = s.metrics(totals);
  s.backend->read_gradient(gradient);
  return metrics;
}

std::vector<float> Trainer::logprobs(const std::byte* weights, const std::vector<TrainSequence>& batch,
                                     std::vector<float>* entropy) {
  Impl& s = *impl_;
  std::vector<const TrainSequence*> all;
  for (const TrainSequence& q : batch) all.push_back(&q);
  std::vector<float> out;
  if (entropy != nullptr) entropy->clear();
  s.backend->set_weights(weights);
  for (const MicroBatch& b : pack(all, s.config.micro_batch_tokens, true)) {
    const LearnBackend::Scores p = s.backend->forward(b, false);
    for (size_t i = 0; i < b.sequences.size(); ++i) {
      out.push_back(0);
      out.insert(out.end(), p.logprob + b.offsets[i], p.logprob + b.offsets[i + 1]);
      if (entropy != nullptr) {
        entropy->push_back(0);
        entropy->insert(entropy->end(), p.entropy + b.offsets[i], p.entropy + b.offsets[i + 1]);
      }
    }
  }
  return out;
}

void Trainer::observe(StepObserver* observer) {
  impl_->observer = observer;
}

int64_t Trainer::steps_done() const {
  return impl_->steps;
}

void Trainer::set_schedule(const ScheduleParams& schedule, int64_t first_step) {
  impl_->schedule = schedule;
  impl_->schedule_start = first_step;
}

namespace {

constexpr int64_t kStateHead = 16;

const char* form_name(int64_t form) { return form == 0 ? "float32" : form == 1 ? "8bit" : "a form unknown to this program"; }

}  // namespace

int64_t Trainer::state_bytes() const {
  const Impl& s = *impl_;
  const int64_t masters = s.layout.dtype() == Dtype::kBf16 ? s.layout.elements() * static_cast<int64_t>(sizeof(float)) : 0;
  return kStateHead + s.backend->moment_layout().bytes() + masters;
}

void Trainer::save_state(std::byte* out) const {
  const Impl& s = *impl_;
  const MomentLayout& moments = s.backend->moment_layout();
  const bool masters = s.backend->has_masters();
  const int64_t head[2] = {s.steps, (masters ? 1 : 0) | static_cast<int64_t>(moments.form()) << 8};
  std::memcpy(out, head, kStateHead);
  auto* floats = reinterpret_cast<float*>(out + kStateHead + moments.bytes());
  s.backend->save_moments(out + kStateHead, masters ? floats : nullptr);
  if (s.layout.dtype() == Dtype::kBf16 && !masters) std::fill_n(floats, s.layout.elements(), 0.0f);
}

void Trainer::load_state(const std::byte* in) {
  Impl& s = *impl_;
  const MomentLayout& moments = s.backend->moment_layout();
  int64_t head[2];
  std::memcpy(head, in, kStateHead);
  const int64_t form = head[1] >> 8, mine = static_cast<int64_t>(moments.form());
  if (form != mine)
    throw_environment("the optimiser state is {}, and this run's is {} (learn.optimizer_state)", form_name(form), form_name(mine));
  s.steps = head[0];
  const auto* floats = reinterpret_cast<const float*>(in + kStateHead + moments.bytes());
  s.backend->load_moments(in + kStateHead, (head[1] & 1) != 0 ? floats : nullptr);
}

}  // namespace perigee::policy
