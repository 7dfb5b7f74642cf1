// The sizes of latent attention, on the CPU and on the device.
#pragma once
#include <cstdint>

namespace perigee::kernels {

inline constexpr int64_t kLatentPage = 64;

struct MlaShape {
  int64_t heads = 0;
  int64_t latent = 0;  // values; kv_lora_rank
  int64_t rope = 0;    // further key dimensions (never rotated); qk_rope_head_dim
  float scale = 0;     // (qk_nope_head_dim + qk_rope_head_dim)^-1/2
  int64_t width() const { return latent + rope; }
};

}  // namespace perigee::kernels
