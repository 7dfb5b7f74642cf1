// Decoding a few sequences: all of a KDA layer between its products, in one launch.
#pragma once
#include <cstdint>

#include "kernels/device/batch.h"
#include "kernels/device/device.h"
#include "kernels/kda/shape.h"

namespace perigee::kernels {

// Arguments of conv_forward (qkv, taps, window_offset), kda_gate_forward (f, b, a_log, dt_bias) and
// gated_rms_norm_forward (gate, norm_w, eps); see there.
struct KdaDecodeLayer {
  const bf16* qkv = nullptr;
  const float* taps = nullptr;
  int64_t window_offset = 0;
  const float *f = nullptr, *b = nullptr, *a_log = nullptr, *dt_bias = nullptr;
  const bf16* gate = nullptr;
  const float* norm_w = nullptr;
  float eps = 0.0f;
  float q_scale = 0.0f;  // set by the call
  // If not null, f and gate are not read but made here: f = f_low f_bᵀ in float, gate = gate_low g_bᵀ rounded to bf16, with
  // the bits of matmul<bf16>. f_low, gate_low [rows, 128], 4-aligned; f_b, g_b: matrices [heads * 128, 128] in tiles
  // (gemm/tiles.h), read ahead as products read their weights (gemm_device.h).
  const bf16 *f_b = nullptr, *g_b = nullptr, *f_low = nullptr, *gate_low = nullptr;
};

// Whether kda_decode_layer would do it.
bool kda_decodes_layer(const Device& dev, const KdaShape& shape, const DeviceBatch& batch);

// What conv_forward, kda_gate_forward, kda_forward and gated_rms_norm_forward do one after the other for a batch of one
// row per slice, with the same bits: out [rows, heads * 128] is the normed output. False, and nothing done, where it
// would be slower or there is no such kernel: more slices * heads than blocks run at once, heads not of 128 channels.
// The entries of batch are read before the launch waits: between what writes them and this launch there must be one that
// waits before it lets the next begin.
bool kda_decode_layer(Device& dev, const KdaShape& shape, const KdaDecodeLayer& layer,
                      const DeviceBatch& batch, int64_t state_offset, bf16* out);

}  // namespace perigee::kernels
