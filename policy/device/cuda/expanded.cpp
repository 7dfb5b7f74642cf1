// Latent attention of prompts under numerics `fast`: keys and values of every head written out, a round at a time
// (kernels/mla/mla_expanded_device.h).
#include <algorithm>
#include <vector>

#include "policy/device/products.h"

namespace perigee::policy::device {

using namespace kernels;

int64_t expanded_arena_rows(const ModelConfig& c) {
  constexpr int64_t kBytes = int64_t{160} << 20, kMost = 8192;
  const int64_t row = 2 * (c.num_heads * (kExpandedNope + kExpandedValue) + c.latent_width());
  return std::min(kMost, kBytes / row / kExpandedTile * kExpandedTile);
}

template <>
void expanded_attention<bf16>(const Pass& pass, int64_t layer, const bf16* q, bf16* o) {
  const ModelConfig& c = pass.config;
  const LayerParams& p = pass.params(layer);
  const Expanded& e = *pass.expanded;
  Device& dev = pass.device;
  const int64_t H = c.num_heads, latent = c.kv_lora_rank, width = c.latent_width();
  const ExpandedShape shape{H, latent, 1.0f / __builtin_sqrtf(static_cast<float>(c.qk_head_dim()))};
  const int64_t page = pass.state->page_offset(layer), arena = expanded_arena_rows(c);

  DeviceScratch::Mark mark(dev.scratch);
  bf16* const latents = dev.scratch.take<bf16>(arena * width);
  bf16* const keys = dev.scratch.take<bf16>(arena * H * kExpandedNope);
  bf16* const values = dev.scratch.take<bf16>(arena * H * kExpandedValue);
  float* const partial = e.merges ? pass.take<float>(H * kExpandedValue) : nullptr;
  float* const log_sum = e.merges ? pass.take<float>(H) : nullptr;
  for (const ExpandedRound& round : e.rounds) {
    const ExpandedPiece* const pieces = e.pieces + round.first_piece;
    gather_latents(dev, shape, pass.batch, page, pieces, round, latents);
    // absorb_k takes a query to the latents: transposed, it takes the latents to keys.
    std::vector<DeviceGradInputTask<bf16>> make_keys;
    std::vector<DeviceMatmulTask<bf16>> make_values;
    for (int64_t h = 0; h < H; ++h) {
      const ParamSpec& k = pass.weights.layout->tensor(p.absorb_k + static_cast<int>(h));
      const ParamSpec& v = pass.weights.layout->tensor(p.absorb_v + static_cast<int>(h));
      make_keys.push_back({pass.weights.table(p.absorb_k + static_cast<int>(h)), k.n, k.k, latents, width,
                           round.rows, keys + h * kExpandedNope, H * kExpandedNope, Store::kAct});
      make_values.push_back({pass.weights.table(p.absorb_v + static_cast<int>(h)), v.n, v.k, latents, width,
                             round.rows, values + h * kExpandedValue, H * kExpandedValue, Store::kAct});
    }
    matmul_grad_input<bf16>(dev, make_keys);
    matmul<bf16>(dev, make_values);
    attend_expanded(dev, shape, pass.batch, q, pieces, round, latents, keys, values, partial, log_sum, o);
  }
}

template <>
void expanded_attention<float>(const Pass&, int64_t, const float*, float*) {
  PERIGEE_CHECK(false, "float32 is exact");
}

}  // namespace perigee::policy::device
