// How a bfloat16 matrix lies in device memory: tiles of 64 outputs by 64 inputs, each 8 KiB, in the order and with the
// swizzle in which the tensor cores of Hopper read shared memory (128-byte rows, sixteen-byte pieces exchanged by the
// row's number), so that one bulk copy brings a tile and no tensor map is needed. Row-major over tiles: the tiles of 64
// outputs over all inputs follow one another. Padding, to multiples of 64 both ways, is zero.
//
// float32 matrices on the device lie in the panels of gemm.h, as on the CPU.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define PERIGEE_HOST_DEVICE __host__ __device__
#else
#define PERIGEE_HOST_DEVICE
#endif

namespace perigee::kernels {

inline constexpr int64_t kTile = 64;
inline constexpr int64_t kTileElements = kTile * kTile;

PERIGEE_HOST_DEVICE constexpr int64_t tiles_across(int64_t x) { return (x + kTile - 1) / kTile; }
// Elements, padding included, of an [n, k] matrix in tiles.
PERIGEE_HOST_DEVICE constexpr int64_t tiled_elements(int64_t n, int64_t k) {
  return tiles_across(n) * tiles_across(k) * kTileElements;
}
// Where element (i, j) of an [n, k] matrix lies.
PERIGEE_HOST_DEVICE constexpr int64_t tiled_index(int64_t k, int64_t i, int64_t j) {
  const int64_t r = i % kTile, c = j % kTile;
  return ((i / kTile) * tiles_across(k) + j / kTile) * kTileElements + r * kTile + ((c / 8) ^ (r % 8)) * 8 + c % 8;
}

}  // namespace perigee::kernels
