// Prefill and training: a CTA walks through all splits of 64 queries.
#include <algorithm>

#include "kernels/mla/mla_bf16_attend.cuh"
#include "kernels/mla/mla_bf16_launch.h"

namespace perigee::kernels::mla {
namespace {

constexpr int kQueries = 64;

template <int VT>
void launch(Device& device, const AttendArgs& args) {
  constexpr int kBytes = attend_shared_bytes<kQueries, VT>();
  allow_shared_memory(attend<kQueries, VT>, kBytes);
  attend<kQueries, VT>
      <<<static_cast<unsigned>(device.info().multiprocessors), kAttendThreads, kBytes, device.stream()>>>(
          args);
  PERIGEE_LAUNCHED();
}

// A warp per row.
__global__ void pages_of_rows(DeviceBatch batch, int width, int key_tiles, const bf16* c, std::byte* pages) {
  const DeviceSlice s = batch.slice[blockIdx.y];
  const int warps = static_cast<int>(blockDim.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  for (int t = static_cast<int>(blockIdx.x) * warps + static_cast<int>(threadIdx.x / 32); t < s.count;
       t += static_cast<int>(gridDim.x) * warps) {
    std::byte* const page =
        pages + (s.begin / 64 + static_cast<int64_t>(blockIdx.y) + t / 64) * key_tiles * kTileBytes;
    const bf16* const from = c + (int64_t{s.begin} + t) * width;
    for (int piece = lane; piece < key_tiles * 8; piece += 32) {
      uint4 v = {0, 0, 0, 0};
      if (piece * 8 < width) v = *reinterpret_cast<const uint4*>(from + piece * 8);
      *reinterpret_cast<uint4*>(page + piece / 8 * kTileBytes + t % 64 * 128 + ((piece % 8) ^ (t % 8)) * 16) =
          v;
    }
  }
}

}  // namespace

void launch_prefill(Device& device, AttendArgs args) {
  args.group_heads = std::min(args.heads, kQueries);
  args.groups = (args.heads + kQueries - 1) / kQueries;
  args.tokens = 1;
  while (2 * args.tokens * args.group_heads <= kQueries) args.tokens *= 2;
  DeviceScratch::Mark mark(device.scratch);
  args.total =
      device.scratch.take<float>(int64_t{device.info().multiprocessors} * kPartialFloats<kQueries, 4>);
  const DeviceBatch all = args.batch;
  for (args.first_slice = 0; args.first_slice < all.slices; args.first_slice += kMostSlices) {
    args.batch.slice = all.slice + args.first_slice;
    args.batch.pages = all.pages == nullptr ? nullptr : all.pages + int64_t{args.first_slice} * all.max_pages;
    args.batch.slices = std::min(kMostSlices, all.slices - args.first_slice);
    args.latent <= 128 ? launch<1>(device, args) : launch<4>(device, args);
  }
}

void launch_own_pages(Device& device, const MlaShape& shape, const DeviceBatch& batch, const bf16* c,
                      std::byte* pages) {
  const unsigned across =
      static_cast<unsigned>(std::clamp<int64_t>(8192 / batch.slices, 1, (batch.max_count + 7) / 8));
  pages_of_rows<<<dim3(across, static_cast<unsigned>(batch.slices)), 256, 0, device.stream()>>>(
      batch, static_cast<int>(shape.width()), static_cast<int>(tiles_across(shape.width())), c, pages);
  PERIGEE_LAUNCHED();
}

}  // namespace perigee::kernels::mla
