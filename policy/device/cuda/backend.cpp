#include "policy/device/backend.h"

#include <algorithm>
#include <array>
#include <limits>
#include <map>
#include <memory>
#include <utility>

#include "kernels/attention/attention_device.h"
#include "kernels/attention/rope_device.h"
#include "kernels/dplr/dplr_device.h"
#include "kernels/gemm/gemm_device.h"
#include "kernels/moe/moe_device.h"
#include "kernels/sampling/sampling_device.h"
#include "kernels/vocab/vocab_device.h"
#include "policy/device/inputs.h"
#include "policy/device/layers.h"
#include "policy/device/memory.h"
#include "policy/device/products.h"

namespace perigee::policy {
namespace {

using namespace kernels;

// Rows of a decoding batch are padded up to one of these, so that a few graphs serve all.
constexpr std::array<int64_t, 14> kBuckets = {1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 256};
int64_t bucket(int64_t rows) {
  for (int64_t b : kBuckets)
    if (rows <= b) return b;
  return (rows + 63) / 64 * 64;
}
constexpr size_t kScoredAtOnce = 256;  // bounds the logits that scoring keeps in the scratch

bool expands(const Device& device, const ModelConfig& c) {
  return expanded_supported(device, c.kv_lora_rank, c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim);
}

template <class T>
class DeviceBackend : public Backend {
 public:
  // weights: the model's on the device, or null for memory of this object's own that set_weights fills. adapter: null, or
  // that of the arena that set_weights fills instead.
  DeviceBackend(Device& device, const ParamLayout& layout, const EngineConfig& config, const std::byte* weights,
                const AdapterLayout* adapter)
      : device_(device),
        layout_(layout),
        pool_(device::state_layout<T>(layout.config()), device_memory(device), config.memory_bytes),
        decode_inputs_(device),
        other_inputs_(device),
        draw_inputs_(device),
        score_inputs_(device),
        max_rows_(bucket(config.max_running)),
        fast_(config.numerics == Numerics::kFast && sizeof(T) == 2 && expands(device, layout.config())),
        weights_{&layout, weights, adapter, nullptr} {
    const int64_t most_logits = 2 * max_rows_;  // every member, and prompts that end in the same step
    logits_ = static_cast<float*>(device.allocate(most_logits * vocab() * 4));
    logits_rows_ = most_logits;
    results_ = PinnedMemory(most_logits * 12);
    if (weights != nullptr && adapter == nullptr) return;
    owned_weights_ = static_cast<std::byte*>(device.allocate(given().weight_bytes()));
    (adapter != nullptr ? weights_.adapter_data : weights_.data) = owned_weights_;
  }
  ~DeviceBackend() override {
    device_.release(logits_);
    if (owned_weights_ != nullptr) device_.release(owned_weights_);
    for (float* kept : free_kept_) device_.release(kept);
  }

  StatePool& pool() override { return pool_; }

  void set_weights(const std::byte* weights) override {
    if (owned_weights_ == nullptr) {
      PERIGEE_CHECK(weights == weights_.data);  // they lie here already
      return;
    }
    device_.copy_in(owned_weights_, weights, given().weight_bytes());
    device_.synchronize();
  }

  const float* forward(std::span<const int32_t> tokens, std::span<const SequenceSlice> slices,
                       std::span<const uint8_t> wanted, std::span<Score> scores) override {
    size_t decoding = 0;
    while (decoding < slices.size() && slices[decoding].slice.count == 1 && wanted[decoding] != 0) ++decoding;
    const auto decoded = static_cast<int64_t>(decoding);
    const int64_t rest = std::count_if(wanted.begin() + decoded, wanted.end(), [](uint8_t w) { return w != 0; });
    PERIGEE_CHECK(decoded + rest <= logits_rows_, "{} + {} rows of logits", decoded, rest);
    if (decoded > 0) decode(tokens.first(decoding), slices.first(decoding));
    if (decoding < slices.size())
      prefill(tokens.subspan(decoding), slices.subspan(decoding), wanted.subspan(decoding), decoded, scores);
    return logits_;
  }

  const float* keep(const float* logits) override {
    float* kept;
    if (free_kept_.empty()) {
      kept = device_.allocate_array<float>(vocab());
    } else {
      kept = free_kept_.back();
      free_kept_.pop_back();
    }
    device_.copy(kept, logits, vocab() * 4);
    return kept;
  }
  void release(const float* kept) override { free_kept_.push_back(const_cast<float*>(kept)); }

  void draw(std::span<Draw> draws) override;
  void end_step() override {}

 private:
  int64_t vocab() const { return layout_.config().vocab_size; }
  // Of the arenas that set_weights takes.
  const ArenaLayout& given() const {
    return weights_.adapter != nullptr ? static_cast<const ArenaLayout&>(*weights_.adapter) : layout_;
  }

  void run(const Inputs& in, int64_t wanted, float* logits, std::span<Score> scores = {}, int64_t first_row = 0);
  void score(const T* hidden, std::span<Score> scores, int64_t first_row);
  void decode(std::span<const int32_t> tokens, std::span<const SequenceSlice> slices);
  void prefill(std::span<const int32_t> tokens, std::span<const SequenceSlice> slices, std::span<const uint8_t> wanted,
               int64_t first_logits, std::span<Score> scores);

  Device& device_;
  const ParamLayout& layout_;
  StatePool pool_;
  InputBlock decode_inputs_, other_inputs_, draw_inputs_, score_inputs_;
  int64_t max_rows_;
  bool fast_;
  Weights weights_;
  std::byte* owned_weights_ = nullptr;
  float* logits_ = nullptr;
  int64_t logits_rows_ = 0;
  PinnedMemory results_;
  Bell drawn_;
  std::vector<float*> free_kept_;
  std::map<std::pair<int64_t, int64_t>, DeviceGraph> graphs_;  // by rows and pages
};

// The log-probabilities of targets after rows of hidden, whose first is row first_row of the step.
template <class T>
void DeviceBackend<T>::score(const T* hidden, std::span<Score> scores, int64_t first_row) {
  const int64_t D = layout_.config().hidden_size;
  for (size_t begin = 0, end = 0; begin < scores.size(); begin = end) {
    while (end < scores.size() && end - begin < kScoredAtOnce &&
           scores[end].inv_temperature == scores[begin].inv_temperature)
      ++end;
    const auto n = static_cast<int64_t>(end - begin);
    score_inputs_.reserve(n * 8 + 2 * 64);
    const int32_t *rows_at, *targets_at;
    int32_t* rows = score_inputs_.place<int32_t>(n, &rows_at);
    int32_t* targets = score_inputs_.place<int32_t>(n, &targets_at);
    for (int64_t i = 0; i < n; ++i) {
      const Score& s = scores[begin + static_cast<size_t>(i)];
      rows[i] = static_cast<int32_t>(s.row - first_row);
      targets[i] = s.target;
    }
    score_inputs_.send();
    DeviceScratch::Mark mark(device_.scratch);
    T* x = device_.scratch.take<T>(n * D);
    float* logprob = device_.scratch.take<float>(n);
    float* lse = device_.scratch.take<float>(n);
    moe_gather<T>(device_, n, D, hidden, rows_at, x);
    vocab_logprob_forward<T>(device_, n, D, x, D, weights_.table(layout_.head()), vocab(),
                             scores[begin].inv_temperature, targets_at, logprob, lse, nullptr,
                             device::narrow_weights<T>(weights_));
    std::vector<float> got(static_cast<size_t>(n));
    device_.copy_out(got.data(), logprob, n * 4);
    for (size_t i = 0; i < got.size(); ++i) scores[begin + i].logprob = got[i];
  }
}

// Forward pass and head: logits [wanted, vocab] of the rows in.last names, or of all rows when it is null.
template <class T>
void DeviceBackend<T>::run(const Inputs& in, int64_t wanted, float* logits, std::span<Score> scores, int64_t first_row) {
  const ModelConfig& c = layout_.config();
  DeviceScratch::Mark mark(device_.scratch);
  const device::Pass pass{device_, weights_, c, in.batch, &pool_.layout(), in.active, in.expanded};
  T* hidden = pass.take<T>(c.hidden_size);
  device::forward<T>(pass, in.tokens, hidden);
  score(hidden, scores, first_row);
  if (wanted == 0) return;
  T* rows = hidden;
  if (in.last != nullptr) {
    rows = device_.scratch.take<T>(wanted * c.hidden_size);
    moe_gather<T>(device_, wanted, c.hidden_size, hidden, in.last, rows);
  }
  const ParamSpec& t = layout_.tensor(layout_.head());
  const DeviceMatmulTask<T> head{weights_.table(layout_.head()), t.n, t.k, rows, t.k, wanted, logits, vocab(), Store::kF32,
                                 {}, 1.0f, device::narrow_weights<T>(weights_)};
  matmul<T>(device_, {&head, 1});
}

template <class T>
void DeviceBackend<T>::decode(std::span<const int32_t> tokens, std::span<const SequenceSlice> slices) {
  const int64_t rows = bucket(static_cast<int64_t>(slices.size()));
  const int64_t pages = power_of_two(std::max<int64_t>(most_pages(slices), 1), 8);
  if (decode_inputs_.reserve(input_bytes(rows, rows, pages))) graphs_.clear();
  Inputs in = place_inputs(decode_inputs_, tokens, slices, rows, rows, pages, {});
  in.last = nullptr;
  const bool inside = decode_inputs_.by_kernel();  // then the graph begins with it
  if (!inside) decode_inputs_.send();
  const auto key = std::make_pair(rows, pages);
  auto it = graphs_.find(key);
  if (it == graphs_.end()) {
    DeviceGraph graph(device_, [&] {
      if (inside) decode_inputs_.send();
      run(in, rows, logits_);
    });
    it = graphs_.emplace(key, std::move(graph)).first;
  }
  it->second.launch(device_);
  decode_inputs_.sent();
}

template <class T>
void DeviceBackend<T>::prefill(std::span<const int32_t> tokens, std::span<const SequenceSlice> slices,
                               std::span<const uint8_t> wanted, int64_t first_logits, std::span<Score> scores) {
  const auto rows = static_cast<int64_t>(tokens.size()), n = static_cast<int64_t>(slices.size());
  const int64_t pages = std::max<int64_t>(most_pages(slices), 1);
  std::vector<int32_t> last;
  for (size_t i = 0; i < slices.size(); ++i) {
    const Slice& s = slices[i].slice;
    if (wanted[i] != 0) last.push_back(static_cast<int32_t>(s.begin + s.count - 1 - slices[0].slice.begin));
  }
  std::vector<DeviceSlice> parts;
  for (const SequenceSlice& s : slices)
    parts.push_back({static_cast<int32_t>(s.slice.begin - slices[0].slice.begin), static_cast<int32_t>(s.slice.count),
                     static_cast<int32_t>(s.slice.position), 0});
  ExpandedPlan plan;
  if (fast_) plan = plan_expanded(parts, kExpandedLeastRows, device::expanded_arena_rows(layout_.config()));
  const auto pieces = static_cast<int64_t>(plan.pieces.size());
  other_inputs_.reserve(input_bytes(rows, n, pages) + pieces * static_cast<int64_t>(sizeof(ExpandedPiece)) +
                        n * static_cast<int64_t>(sizeof(DeviceSlice)) + 2 * 64);
  Inputs in = place_inputs(other_inputs_, tokens, slices, rows, n, pages, last);
  device::Expanded expanded;
  if (pieces > 0) {
    expanded.rounds = plan.rounds;
    expanded.merges = plan.merges;
    std::copy(plan.pieces.begin(), plan.pieces.end(), other_inputs_.place<ExpandedPiece>(pieces, &expanded.pieces));
    expanded.rest = in.batch;
    DeviceSlice* const rest = other_inputs_.place<DeviceSlice>(n, &expanded.rest.slice);
    bool any = false;
    for (int64_t i = 0; i < n; ++i) {
      rest[i] = parts[static_cast<size_t>(i)];
      if (rest[i].count >= kExpandedLeastRows) rest[i].count = 0;
      any = any || rest[i].count > 0;
    }
    // Not a decoding batch, whose slices are rows.
    expanded.rest.max_count = std::max(expanded.rest.max_count, 2);
    if (!any) expanded.rest.slices = 0;
    in.expanded = &expanded;
  }
  other_inputs_.send();
  run(in, static_cast<int64_t>(last.size()), logits_ + first_logits * vocab(), scores, slices[0].slice.begin);
}

template <class T>
void DeviceBackend<T>::draw(std::span<Draw> draws) {
  const auto n = static_cast<int64_t>(draws.size());
  if (n == 0) return;
  const DrawInputs in = place_draws(draw_inputs_, draws, vocab());
  draw_inputs_.send();
  // Rows that draw from consecutive logits go together; a group's members draw from one kept row.
  DeviceScratch::Mark mark(device_.scratch);
  const float* logits = draws[0].logits;
  bool in_place = true;
  for (int64_t i = 0; i < n; ++i) in_place = in_place && draws[static_cast<size_t>(i)].logits == logits + i * vocab();
  if (!in_place) {
    float* gathered = device_.scratch.take<float>(n * vocab());
    for (int64_t i = 0; i < n; ++i)
      device_.copy(gathered + i * vocab(), draws[static_cast<size_t>(i)].logits, vocab() * 4);
    logits = gathered;
  }
  PERIGEE_CHECK(n <= logits_rows_, "{} draws", n);
  // Straight to the host's memory.
  auto* tokens = reinterpret_cast<int32_t*>(results_.data());
  auto* logprob = reinterpret_cast<float*>(results_.data()) + n;
  auto* entropy = logprob + n;
  sample_tokens(device_, n, vocab(), logits, vocab(), in.params, in.seen, in.bias, in.plain, tokens, logprob, entropy);
  drawn_.ring(device_);
  drawn_.wait(device_);
  for (InputBlock* block : {&decode_inputs_, &other_inputs_, &draw_inputs_, &score_inputs_}) block->settle();
  for (int64_t i = 0; i < n; ++i) {
    Draw& d = draws[static_cast<size_t>(i)];
    d.token = tokens[i];
    d.logprob = logprob[i];
    d.entropy = entropy[i];
  }
  for (Draw& d : draws) {
    // A broken model: no allowed token has a finite logit.
    if (!d.allowed.empty() && !allows(d.allowed, d.token)) {
      for (d.token = 0; !allows(d.allowed, d.token);) ++d.token;
      d.logprob = std::numeric_limits<float>::quiet_NaN();
    }
    if (d.top == 0) continue;
    // A row over the bus and a look at it on the host: tens of microseconds, for the requests that ask for it.
    std::vector<float> row(static_cast<size_t>(vocab()));
    device_.copy_out(row.data(), d.logits, vocab() * 4);
    d.top_tokens = most_likely(row.data(), vocab(), d.sampling->inv_temperature(), d.top);
  }
}

}  // namespace

StateLayout device_state_layout(const ParamLayout& layout) {
  return layout.matrices() == MatrixForm::kTiles ? device::state_layout<bf16>(layout.config())
                                                 : device::state_layout<float>(layout.config());
}

void check_device_model(const ParamLayout& layout) {
  const ModelConfig& c = layout.config();
  for (const LayerKind kind : c.layers) {
    if (kind == LayerKind::kAttention && c.head_dim > kAttentionMostDim)
      throw_input("head_dim is {}: a GPU takes at most {}", c.head_dim, kAttentionMostDim);
    if (kind == LayerKind::kMlaRope && c.qk_rope_head_dim > kRopeMostDim)
      throw_input("qk_rope_head_dim is {}: a GPU rotates at most {}", c.qk_rope_head_dim, kRopeMostDim);
  }
  if (c.linear_head_dim > 128) throw_input("linear_attn_config.head_dim is {}: a GPU takes at most 128", c.linear_head_dim);
  if (layout.matrices() != MatrixForm::kTiles) return;
  if (!Device::runs_bf16(0))
    throw_input("bfloat16 on a GPU takes compute capability 9.0 (H100, H200) and a build with -DPERIGEE_CUDA_ARCH=90a; use "
                "float32, or for a run run.numerics portable");
  const auto multiple = [](const char* name, int64_t value, int64_t of) {
    if (value % of != 0) throw_input("{} is {}: bfloat16 on a GPU takes multiples of {}; use float32", name, value, of);
  };
  multiple("hidden_size", c.hidden_size, 8);
  multiple("intermediate_size", c.intermediate_size, 8);
  multiple("moe_intermediate_size", c.moe_intermediate_size, 8);
  multiple("vocab_size", c.vocab_size, 2);
  multiple("linear_attn_config.num_heads", c.linear_heads, 2);
  multiple("linear_attn_config.head_dim", c.linear_head_dim, 16);
  multiple("head_dim", c.head_dim, 8);
  multiple("kv_lora_rank", c.kv_lora_rank, 16);
  multiple("qk_rope_head_dim", c.qk_rope_head_dim, 16);
  multiple("qk_nope_head_dim", c.qk_nope_head_dim, 8);
  multiple("v_head_dim", c.v_head_dim, 8);
  if (c.kv_lora_rank > 512 || c.qk_rope_head_dim > 64)
    throw_input("kv_lora_rank {} and qk_rope_head_dim {}: bfloat16 on a GPU takes at most 512 and 64", c.kv_lora_rank,
                c.qk_rope_head_dim);
}

int64_t device_scratch_bytes(const ParamLayout& layout, int64_t rows) {
  constexpr int64_t kKernelBytes = int64_t{640} << 20;
  const ModelConfig& c = layout.config();
  const int64_t act = device::activation_bytes(layout), D = c.hidden_size, wide = c.linear_width();
  const auto has = [&](LayerKind kind) { return std::ranges::find(c.layers, kind) != c.layers.end(); };
  int64_t linear = act * (D + 9 * wide + 2 * c.linear_head_dim) + 4 * (2 * wide + 2 * c.linear_heads), recurrence = 0;
  if (has(LayerKind::kDplr) || has(LayerKind::kMamba2)) linear += act * (wide + c.linear_head_dim) + 4 * (wide + c.linear_heads);
  // Of each chunk of 1024 and a few, what the general delta rule prepares (kernels/dplr/dplr_device.h) is more than KDA does.
  // Decoding, a row has two chunks; so few rows find room in what kernels take for themselves, unless there are many heads.
  const auto prepared = [&](int64_t chunks) {
    return c.linear_heads * (std::min<int64_t>(chunks, kDplrSegment + 8) * 19'000 + (128 << 10));
  };
  if (has(LayerKind::kDplr))
    recurrence = std::max(prepared(rows / 8 + 2), prepared(rows / 16 + 2 * rows) - kKernelBytes);
  const int64_t attention = act * (D + 2 * c.num_heads * c.head_dim + c.kv_width()) + 4 * c.num_heads;
  const int64_t mla = act * (D + c.num_heads * (c.qk_head_dim() + c.latent_width() + c.kv_lora_rank + c.v_head_dim)) +
                      4 * c.latent_width();
  const int64_t dense = act * (2 * D + 3 * std::max(c.intermediate_size, c.shared_intermediate_size()));
  const int64_t routed = c.experts_per_token * (act * (3 * c.moe_intermediate_size + D) + 16) + 4 * c.num_experts;
  // The residual stream, the final hidden states, and what kernels take for themselves.
  return rows * (2 * (4 + act) * D + std::max({2 * linear, 2 * mla, 2 * attention, dense + routed})) +
         kKernelBytes + recurrence + 2 * std::max<int64_t>(rows, 256) * c.vocab_size / 8;
}

namespace {

std::unique_ptr<Backend> make_backend(Device& device, const ParamLayout& layout, const EngineConfig& config,
                                      const std::byte* weights, const AdapterLayout* adapter) {
  if (layout.matrices() == MatrixForm::kTiles)
    return std::make_unique<DeviceBackend<bf16>>(device, layout, config, weights, adapter);
  return std::make_unique<DeviceBackend<float>>(device, layout, config, weights, adapter);
}

}  // namespace

std::unique_ptr<Backend> device_backend(Device& device, const ParamLayout& layout, const EngineConfig& config,
                                        const std::byte* weights) {
  return make_backend(device, layout, config, weights, nullptr);
}

std::unique_ptr<Backend> device_backend(Device& device, const ParamLayout& layout, const EngineConfig& config) {
  return make_backend(device, layout, config, nullptr, nullptr);
}

std::unique_ptr<Backend> device_backend(Device& device, const AdapterLayout& adapter, const EngineConfig& config,
                                        const std::byte* device_base) {
  PERIGEE_CHECK(device_base != nullptr);
  return make_backend(device, adapter.base(), config, device_base, &adapter);
}

int64_t device_scratch_bytes(const AdapterLayout& adapter, int64_t rows) {
  // Of one half at a time: low rows of at most ten adapters, their gradients, and, over float32, sums set aside.
  const ModelConfig& c = adapter.base().config();
  const int64_t low = 20 * (rows * adapter.config().rank * 4 + 1024);
  return device_scratch_bytes(adapter.base(), rows) + low + rows * c.hidden_size * 4 +
         device::expert_adapter_bytes(adapter, rows);
}

}  // namespace perigee::policy
