#include "policy/device/learn.h"

#include <algorithm>
#include <cstring>
#include <optional>
#include <type_traits>
#include <utility>

#include "kernels/kda/kda_device.h"
#include "kernels/moe/moe_device.h"
#include "kernels/optim/optim_device.h"
#include "kernels/vocab/embedding_device.h"
#include "kernels/vocab/vocab_device.h"
#include "policy/device/backend.h"
#include "policy/device/products.h"
#include "policy/device/scorer.h"
#include "policy/device/train_pass.h"

namespace perigee::policy {
namespace {

using namespace kernels;

template <class T>
class DeviceLearnBackend : public LearnBackend {
 public:
  // adapter, base: null, or what is trained beside a frozen model, whose weights are at base on the device.
  DeviceLearnBackend(Device& device, const ParamLayout& layout, bool recompute, const AdapterLayout* adapter,
                     const std::byte* base, MomentForm form)
      : device_(device),
        layout_(layout),
        arena_(adapter != nullptr ? static_cast<const ArenaLayout&>(*adapter) : layout),
        adapter_(adapter),
        base_(base),
        recompute_(recompute),
        narrow_(arena_.dtype() == Dtype::kBf16),
        moment_layout_(arena_, form) {
    const int64_t n = arena_.elements();
    weights_ = allocate<std::byte>(arena_.weight_bytes());
    next_ = allocate<std::byte>(arena_.weight_bytes());
    moments_ = allocate<std::byte>(moment_layout_.bytes());
    gradient_ = allocate<float>(n);
    if (narrow_) masters_ = allocate<float>(n);
    number_ = allocate<double>(1);
    device_.zero(moments_, moment_layout_.bytes());
  }
  ~DeviceLearnBackend() override {
    pass_.reset();
    for (void* p : owned_) device_.release(p);
  }

  void set_weights(const std::byte* weights) override {
    pass_.reset();
    mark_.reset();
    if (weights == finished_ && adapter_ == nullptr && sample(weights) == finished_sample_) return;  // they are there
    finished_ = nullptr;
    device_.copy_in(weights_, weights, arena_.weight_bytes());
    device_.synchronize();
  }

  Scores forward(const MicroBatch& b, bool keep) override {
    pass_.reset();
    mark_.reset();
    mark_.emplace(device_.scratch);
    const int64_t D = layout_.config().hidden_size, n = b.entries();
    entry_rows_ = upload<int32_t>({b.rows.begin(), b.rows.end()});
    targets_ = upload<int32_t>({b.targets.begin(), b.targets.end()});
    hidden_ = device_.scratch.template take<T>(n * D);
    logprob_ = device_.scratch.template take<float>(n);
    lse_ = device_.scratch.template take<float>(n);
    entropy_ = device_.scratch.template take<float>(n);
    pass_.emplace(device_, view(), keep ? recompute_ : true, keep);
    const T* hidden = pass_->forward(b.tokens, b.lengths);
    moe_gather<T>(device_, n, D, hidden, entry_rows_, hidden_);
    vocab_logprob_forward<T>(device_, n, D, hidden_, D, head(), layout_.config().vocab_size, inv_temperature(b), targets_,
                             logprob_, lse_, entropy_, device::narrow_weights<T>(view()));
    host_logprob_.resize(static_cast<size_t>(n));
    host_entropy_.resize(static_cast<size_t>(n));
    device_.copy_out(host_logprob_.data(), logprob_, n * 4);
    device_.copy_out(host_entropy_.data(), entropy_, n * 4);
    return {host_logprob_.data(), host_entropy_.data()};
  }

  std::vector<int64_t> expert_load() override { return pass_->expert_load(); }

  int64_t first_nonfinite_layer(const MicroBatch&) override { return pass_->first_nonfinite_layer(); }

  void zero_gradient() override { device_.zero(gradient_, arena_.elements() * 4); }

  void backward(const MicroBatch& b, const float* dlogprob, const float* dentropy) override {
    const int64_t D = layout_.config().hidden_size, n = b.entries(), rows = static_cast<int64_t>(b.tokens.size());
    DeviceScratch::Mark mark(device_.scratch);
    float* device_dlogprob = upload<float>({dlogprob, dlogprob + n});
    float* device_dentropy = dentropy != nullptr ? upload<float>({dentropy, dentropy + n}) : nullptr;
    float* dhidden = device_.scratch.template take<float>(rows * D);
    {
      DeviceScratch::Mark entries(device_.scratch);
      T* dentry = device_.scratch.template take<T>(n * D);
      vocab_logprob_backward<T>(device_, n, D, hidden_, D, head(), layout_.config().vocab_size, inv_temperature(b),
                                targets_, lse_, entropy_, device_dlogprob, device_dentropy, dentry, D,
                                adapter_ != nullptr ? nullptr : gradient_ + layout_.tensor(layout_.head()).element_offset,
                                device::narrow_weights<T>(view()));
      // Each row's entry, or none: an embedding in a table of entries, zero outside of it.
      std::vector<int32_t> entry(static_cast<size_t>(rows), -1);
      for (int64_t i = 0; i < n; ++i) entry[static_cast<size_t>(b.rows[static_cast<size_t>(i)])] = static_cast<int32_t>(i);
      embedding_forward<T>(device_, rows, D, n, dentry, upload<int32_t>(entry), dhidden);
    }
    pass_->backward(dhidden, gradient_);
  }

  double gradient_sum_of_squares() override {
    sum_of_squares(device_, arena_.elements(), gradient_, number_);
    double sum;
    device_.copy_out(&sum, number_, 8);
    return sum;
  }
  int64_t gradient_first_nonfinite() override {
    auto* at = reinterpret_cast<int64_t*>(number_);
    first_nonfinite(device_, arena_.elements(), gradient_, at);
    int64_t first;
    device_.copy_out(&first, at, 8);
    return first;
  }
  void read_gradient(float* flat) override { device_.copy_out(flat, gradient_, arena_.elements() * 4); }

  void update(const AdamWParams& p, std::byte*) override {
    pass_.reset();
    mark_.reset();
    const float* from;
    float* to;
    if (narrow_) {
      if (!has_masters_) make_masters();
      from = to = masters_;
    } else {
      from = reinterpret_cast<const float*>(weights_);
      to = reinterpret_cast<float*>(next_);
      device_.copy(next_, weights_, arena_.weight_bytes());  // what is not trained stays
    }
    for (const MomentLayout::Range& r : moment_layout_.ranges()) {
      const float* const gradient = gradient_ + r.begin;
      if (moment_layout_.form() == MomentForm::kByte)
        adamw_step(device_, p, r.count, from + r.begin, to + r.begin, gradient, moment_layout_.of_bytes(moments_, r));
      else
        adamw_step(device_, p, r.count, from + r.begin, to + r.begin, gradient, moment_layout_.m(moments_, r),
                   moment_layout_.v(moments_, r));
    }
  }

  void add_to_vector(int tensor, std::span<const float> change, std::byte*) override {
    DeviceScratch::Mark mark(device_.scratch);
    float* flat = narrow_ ? masters_ : reinterpret_cast<float*>(next_);
    add(device_, static_cast<int64_t>(change.size()), upload<float>({change.begin(), change.end()}),
        flat + arena_.tensor(tensor).element_offset);
  }

  void finish(std::byte* weights_out) override {
    if (narrow_) {
      device_.zero(next_, arena_.weight_bytes());  // the gaps too: the arena is hashed
      for (const ParamSpec& t : arena_.tensors()) {
        const float* from = masters_ + t.element_offset;
        if (t.in_dtype()) {
          narrow(device_, t.elements, from, reinterpret_cast<bf16*>(next_ + t.byte_offset));
        } else {
          device_.copy(next_ + t.byte_offset, from, t.elements * 4);
        }
      }
    }
    device_.copy_out(weights_out, next_, arena_.weight_bytes());
    std::swap(weights_, next_);
    finished_ = weights_out;
    finished_sample_ = sample(weights_out);
  }

  bool has_masters() const override { return has_masters_; }
  const MomentLayout& moment_layout() const override { return moment_layout_; }
  void save_moments(std::byte* moments, float* masters) const override {
    device_.copy_out(moments, moments_, moment_layout_.bytes());
    if (masters != nullptr) device_.copy_out(masters, masters_, arena_.elements() * 4);
  }
  void load_moments(const std::byte* moments, const float* masters) override {
    device_.copy_in(moments_, moments, moment_layout_.bytes());
    has_masters_ = masters != nullptr;
    if (masters != nullptr) device_.copy_in(masters_, masters, arena_.elements() * 4);
    device_.synchronize();
  }

 private:
  template <class U>
  U* allocate(int64_t count) {
    U* p = device_.allocate_array<U>(count);
    owned_.push_back(p);
    return p;
  }
  // Into scratch.
  template <class U>
  U* upload(const std::vector<U>& values) {
    U* to = device_.scratch.template take<U>(static_cast<int64_t>(values.size()));
    device_.copy_in(to, values.data(), static_cast<int64_t>(values.size() * sizeof(U)));
    return to;
  }
  Weights view() const {
    return adapter_ != nullptr ? Weights{&layout_, base_, adapter_, weights_} : Weights{&layout_, weights_};
  }
  const void* head() const { return view().table(layout_.head()); }

  // Of every page a word: memory that was reused for other weights is known by it.
  uint64_t sample(const std::byte* weights) const {
    uint64_t hash = 0xcbf29ce484222325ull;
    for (int64_t at = 0; at + 8 <= arena_.weight_bytes(); at += 4096) {
      uint64_t word;
      std::memcpy(&word, weights + at, 8);
      hash = (hash ^ word) * 0x100000001b3ull;
    }
    return hash;
  }

  void make_masters() {
    device_.zero(masters_, arena_.elements() * 4);
    for (const ParamSpec& t : arena_.tensors()) {
      float* to = masters_ + t.element_offset;
      if (t.in_dtype()) {
        widen(device_, t.elements, reinterpret_cast<const bf16*>(weights_ + t.byte_offset), to);
      } else {
        device_.copy(to, weights_ + t.byte_offset, t.elements * 4);
      }
    }
    has_masters_ = true;
  }

  Device& device_;
  const ParamLayout& layout_;  // of the model
  const ArenaLayout& arena_;   // of what is trained
  const AdapterLayout* adapter_;
  const std::byte* base_;
  bool recompute_, narrow_, has_masters_ = false;  // narrow: weights in bfloat16, whatever the activations are
  MomentLayout moment_layout_;
  std::vector<void*> owned_;
  std::byte *weights_ = nullptr, *next_ = nullptr;  // arenas of what is trained
  // The arena that the last step wrote: weights_ holds the same.
  const std::byte* finished_ = nullptr;
  uint64_t finished_sample_ = 0;
  std::byte* moments_ = nullptr;
  float *gradient_ = nullptr, *masters_ = nullptr;
  double* number_ = nullptr;
  // The last forward; its memory is scratch behind the mark.
  std::optional<DeviceScratch::Mark> mark_;
  std::optional<device::TrainPass<T>> pass_;
  int32_t *entry_rows_ = nullptr, *targets_ = nullptr;
  T* hidden_ = nullptr;
  float *logprob_ = nullptr, *lse_ = nullptr, *entropy_ = nullptr;
  std::vector<float> host_logprob_, host_entropy_;
};

}  // namespace

int64_t device_learn_scratch_bytes(const ParamLayout& layout, int64_t tokens, bool recompute) {
  const ModelConfig& c = layout.config();
  // Without recomputation every half's activations stay; a backward holds about as much again.
  const int64_t forward = device_scratch_bytes(layout, tokens), score = device_score_scratch_bytes(layout, tokens);
  const int64_t states = kda_chunk_slots(tokens, tokens / 16 + 1) * c.linear_heads * c.linear_head_dim * c.linear_head_dim *
                         device::activation_bytes(layout);
  const int64_t halves = recompute ? 2 : 2 * c.num_layers;
  const int64_t kept = recompute ? device::kept_attention_bytes(c, tokens, device::activation_bytes(layout)) : 0;
  return score + halves * (forward - (int64_t{640} << 20)) + (recompute ? 1 : c.num_layers) * states + 2 * forward + kept;
}

std::unique_ptr<LearnBackend> device_learn_backend(Device& device, const ParamLayout& layout, bool recompute,
                                                   MomentForm moments) {
  if (layout.matrices() == MatrixForm::kTiles)
    return std::make_unique<DeviceLearnBackend<bf16>>(device, layout, recompute, nullptr, nullptr, moments);
  return std::make_unique<DeviceLearnBackend<float>>(device, layout, recompute, nullptr, nullptr, moments);
}

int64_t device_learn_scratch_bytes(const AdapterLayout& adapter, int64_t tokens, bool recompute) {
  const ParamLayout& base = adapter.base();
  const ModelConfig& c = base.config();
  const int64_t D = c.hidden_size, L = c.num_layers, rank = adapter.config().rank;
  // Of ten adapters a half: low, its gradient, and both once more for what a task rounds up; and those of experts.
  const int64_t low =
      4 * 10 * (tokens * rank * device::activation_bytes(adapter) + 1024) + device::expert_adapter_bytes(adapter, tokens);
  if (!recompute || base.matrices() != MatrixForm::kTiles)
    return device_learn_scratch_bytes(base, tokens, recompute) + (recompute ? 1 : L) * low + tokens * D * 4;
  // Beside a frozen model of 98 GB room is dear: what the passes take, half by half, in bytes of a token.
  const int64_t H = c.linear_heads, d = c.linear_head_dim, w = H * d, heads = c.num_heads, width = c.latent_width(),
                q = heads * c.qk_head_dim(), absorbed = heads * (width + c.kv_lora_rank), v = heads * c.v_head_dim;
  const int64_t I = std::max(c.intermediate_size, c.shared_intermediate_size()), Ie = c.moe_intermediate_size,
                slots = c.experts_per_token;
  const int64_t stream = 4 * D * (2 * L + 1) + D * 26 + 64;
  // The most that a linear mixer takes: eta, what is written and their gradients are beside KDA's where there are such.
  const bool writes = std::ranges::any_of(c.layers, [](LayerKind k) { return k == LayerKind::kDplr || k == LayerKind::kMamba2; });
  const int64_t linear = 2 * (2 * D + 20 * w + 6 * d + 2 * H) + 4 * (3 * w + 4 * H + 2 * D) + (writes ? 18 * w + 4 * d + 12 * H : 0);
  const bool wide = c.kv_lora_rank != 512 && c.kv_lora_rank != 256;  // attention's gradients in float32
  const int64_t mla = 2 * (D + 2 * (q + absorbed + v + 2 * width)) + 4 * (6 * width + 4 * heads + D) +
                      (wide ? 16 * absorbed : 0);
  const int64_t experts = 2 * (4 * D + 6 * I) + 4 * (D + 4 * c.num_experts) + (slots + 1) * (2 * (8 * Ie + 4 * D) + 32);
  const int64_t states = 2 * kda_chunk_slots(tokens, tokens / 16 + 1) * w * d;
  const int64_t attention = 2 * (D + 5 * heads * c.head_dim + 2 * c.kv_width()) + 4 * (2 * heads + D);
  const int64_t half = std::max({tokens * linear + states, tokens * mla, tokens * attention, tokens * experts});
  // Kernels' own: records of KDA's chunks, pieces of gradients, rounding up.
  return tokens * stream + std::max(half + low, kLogitBytes) + (int64_t{1280} << 20) +
         device::kept_attention_bytes(c, tokens, 2);
}

std::unique_ptr<LearnBackend> device_learn_backend(Device& device, const AdapterLayout& adapter, bool recompute,
                                                   const std::byte* device_base, MomentForm moments) {
  PERIGEE_CHECK(device_base != nullptr);
  if (adapter.matrices() == MatrixForm::kTiles)
    return std::make_unique<DeviceLearnBackend<bf16>>(device, adapter.base(), recompute, &adapter, device_base, moments);
  return std::make_unique<DeviceLearnBackend<float>>(device, adapter.base(), recompute, &adapter, device_base, moments);
}

}  // namespace perigee::policy
