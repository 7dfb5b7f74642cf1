#include "base/error.h"
#include "kernels/gemm/gemm.h"
#include "kernels/gemm/gemm_device.h"

namespace perigee::kernels {

void pack_tiles(const float* w, int64_t n, int64_t k, bf16* tiles) {
  PERIGEE_CHECK(n >= 1 && k >= 1);
  for (int64_t i = 0; i < tiles_across(n) * kTile; ++i)
    for (int64_t j = 0; j < tiles_across(k) * kTile; ++j)
      tiles[tiled_index(k, i, j)].bits = i < n && j < k ? to_bf16(w[i * k + j]) : uint16_t{0};
}

void unpack_tiles(const bf16* tiles, int64_t n, int64_t k, float* w) {
  PERIGEE_CHECK(n >= 1 && k >= 1);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < k; ++j) w[i * k + j] = from_bf16(tiles[tiled_index(k, i, j)].bits);
}

}  // namespace perigee::kernels
