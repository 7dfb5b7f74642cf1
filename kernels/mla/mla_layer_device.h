// Decoding a few short sequences: all of latent attention between its products, in three launches.
#pragma once
#include <cstdint>

#include "kernels/mla/mla_device.h"

namespace perigee::kernels {

struct MlaDecodeLayer {
  const bf16* q =
      nullptr;  // [rows, heads * (128 + rope)], 16-aligned; of each head what is absorbed, then the rope part
  // Arguments of latent_store; norm_w is read ahead, as the matrices are.
  const float* kv = nullptr;
  const float* norm_w = nullptr;
  float eps = 0.0f;
  // A matrix per head in tiles (gemm/tiles.h), `*_step` bytes apart, 16-aligned, read ahead as products read their weights
  // (gemm_device.h): absorb_k [latent, 128], absorb_v [128, latent].
  const bf16 *absorb_k = nullptr, *absorb_v = nullptr;
  int64_t absorb_k_step = 0, absorb_v_step = 0;
};

// Whether mla_decode_layer would do it, for heads whose q has `nope` values to absorb and whose values have v.
bool mla_decodes_layer(const Device& device, const MlaShape& shape, int64_t nope, int64_t v,
                       const DeviceBatch& batch);

// What latent_store, the products of absorb_k, a copy of the rope parts, mla_forward and the products of absorb_v do one
// after the other for a batch of one row per slice, with the same bits: o [rows, heads * 128]. False, and nothing done,
// where it would be slower or there is no such kernel: latent other than 512, rope than 64, nope and v than 128, a page table
// of more than 16384 positions, more than 16 splits of 32 heads: 8 rows of 512 positions, 4 of 2048, 2 of 8192. Rows of o of padding entries hold anything.
// The entries of batch, and the pages of tokens before this one, are read ahead: between a kernel that writes them and the
// launch before this call must lie one that waits before it lets the next begin (the embedding does). Takes scratch, 2 MiB
// at most.
bool mla_decode_layer(Device& device, const MlaShape& shape, const MlaDecodeLayer& layer,
                      const DeviceBatch& batch, int64_t page_offset, bf16* o);

}  // namespace perigee::kernels
