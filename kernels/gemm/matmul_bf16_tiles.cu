// Into tiles and back: the layout of tiles.h.
#include "base/error.h"
#include "kernels/device/launch.cuh"
#include "kernels/gemm/gemm_device.h"

namespace perigee::kernels {

namespace {

// One thread to sixteen bytes of a tile.
__global__ void make_tiles_kernel(const bf16* w, int64_t ldw, int64_t n, int64_t k, bf16* tiles) {
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * 8;
  if (at >= tiled_elements(n, k)) return;
  const int64_t tile = at / kTileElements, inside = at % kTileElements;
  const int64_t row = inside / kTile, piece = inside % kTile / 8;
  const int64_t i = tile / tiles_across(k) * kTile + row;
  const int64_t j = tile % tiles_across(k) * kTile + (piece ^ (row & 7)) * 8;
  uint32_t words[4] = {0, 0, 0, 0};
  for (int c = 0; c < 8; ++c)
    if (i < n && j + c < k) words[c / 2] |= static_cast<uint32_t>(w[i * ldw + j + c].bits) << (16 * (c & 1));
  *reinterpret_cast<uint4*>(tiles + at) = make_uint4(words[0], words[1], words[2], words[3]);
}

__global__ void undo_tiles_kernel(const bf16* tiles, int64_t n, int64_t k, bf16* w, int64_t ldw) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= n * k) return;
  const int64_t i = at / k, j = at % k;
  w[i * ldw + j] = tiles[tiled_index(k, i, j)];
}

}  // namespace

void make_tiles(Device& device, const bf16* w, int64_t ldw, int64_t n, int64_t k, bf16* tiles) {
  PERIGEE_CHECK(n >= 1 && k >= 1 && ldw >= k);
  make_tiles_kernel<<<blocks_for(tiled_elements(n, k) / 8, 256), 256, 0, device.stream()>>>(w, ldw, n, k,
                                                                                            tiles);
  PERIGEE_LAUNCHED();
}

void undo_tiles(Device& device, const bf16* tiles, int64_t n, int64_t k, bf16* w, int64_t ldw) {
  PERIGEE_CHECK(n >= 1 && k >= 1 && ldw >= k);
  undo_tiles_kernel<<<blocks_for(n * k, 256), 256, 0, device.stream()>>>(tiles, n, k, w, ldw);
  PERIGEE_LAUNCHED();
}

}  // namespace perigee::kernels
