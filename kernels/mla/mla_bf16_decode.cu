// Decoding: one token of each sequence, the splits of all sequences shared out among the CTAs.
#include <algorithm>

#include "kernels/mla/mla_bf16_attend.cuh"
#include "kernels/mla/mla_bf16_launch.h"

namespace perigee::kernels::mla {
namespace {

constexpr int kHeads = 32;
constexpr int64_t kMostPartials = 4096;  // 256 MiB

// Merges the splits that the attention left. A thread has four accumulators, of two heads, as they lie in a partial.
template <int VT>
__global__ void __launch_bounds__(128) combine(const __grid_constant__ AttendArgs a) {
#if defined(PERIGEE_HOPPER)
  cudaGridDependencySynchronize();
  const int slice = static_cast<int>(blockIdx.y) / a.groups, group = static_cast<int>(blockIdx.y) % a.groups;
  const DeviceSlice s = a.batch.slice[slice];
  if (s.count == 0) return;
  const int2 part = a.parts[blockIdx.y];
  const int splits = split_count(s.position);
  if (part.y >= splits) return;
  constexpr int kFloats = kPartialFloats<kHeads, VT>;
  constexpr int kAhead = 8;
  const int at = static_cast<int>(blockIdx.x) * 128 + static_cast<int>(threadIdx.x);
  const int piece = at / 256, thread = at % 256, head = 8 * (piece % 4) + 2 * (thread % 4);
  const float* const from = a.partial + int64_t{part.x} * kFloats;
  const auto values = [&](int i) {
    return *reinterpret_cast<const float4*>(from + int64_t{i} * kFloats + 4 * at);
  };
  const auto stats = [&](int i, int which) {
    return *reinterpret_cast<const float2*>(from + int64_t{i} * kFloats + VT * kHeads / 2 * 256 +
                                            which * kHeads + head);
  };
  float4 o = values(part.y - 1);
  float2 m = stats(part.y - 1, 0), sum = stats(part.y - 1, 1);
  for (int i = part.y; i < splits; i += kAhead) {
    float4 p[kAhead];
    float2 pm[kAhead], ps[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      if (i + j < splits) {
        p[j] = values(i + j);
        pm[j] = stats(i + j, 0);
        ps[j] = stats(i + j, 1);
      }
    }
#pragma unroll
    for (int j = 0; j < kAhead; ++j) {
      if (i + j < splits) {
        float x, y;
        merge_factors(m.x, pm[j].x, x, y);
        sum.x = merge(sum.x, x, ps[j].x, y);
        o.x = merge(o.x, x, p[j].x, y);
        o.z = merge(o.z, x, p[j].z, y);
        merge_factors(m.y, pm[j].y, x, y);
        sum.y = merge(sum.y, x, ps[j].y, y);
        o.y = merge(o.y, x, p[j].y, y);
        o.w = merge(o.w, x, p[j].w, y);
      }
    }
  }
  const int latent = 64 * (thread / 128 * VT + piece / 4) + 16 * (thread / 32 % 4) + thread % 32 / 4;
  const float x = __fdiv_rn(1.0f, sum.x), y = __fdiv_rn(1.0f, sum.y);
  const int first = group * kHeads + head;
  const int64_t row = int64_t{s.begin} * a.heads + first;
  const bool one = first < a.heads, two = first + 1 < a.heads;
  bf16* const out = a.out + row * a.latent + latent;
  if (latent < a.latent) {
    if (one) out[0] = from_float<bf16>(o.x * x);
    if (two) out[a.latent] = from_float<bf16>(o.y * y);
  }
  if (latent + 8 < a.latent) {
    if (one) out[8] = from_float<bf16>(o.z * x);
    if (two) out[a.latent + 8] = from_float<bf16>(o.w * y);
  }
  if (a.lse != nullptr && latent == 0) {
    if (one) a.lse[row] = log_sum(m.x, sum.x);
    if (two) a.lse[row + 1] = log_sum(m.y, sum.y);
  }
#endif
}

template <int VT>
void launch(Device& device, const AttendArgs& args, int64_t most_splits) {
  constexpr int kBytes = attend_shared_bytes<kHeads, VT>();
  const int64_t items = int64_t{args.batch.slices} * args.groups * most_splits;
  const unsigned ctas = static_cast<unsigned>(std::min<int64_t>(items, device.info().multiprocessors));
  allow_shared_memory(attend<kHeads, VT>, kBytes);
  launch_dependent(attend<kHeads, VT>, dim3(ctas), dim3(kAttendThreads), kBytes, device.stream(), args);
  if (most_splits == 1) return;
  // Its blocks may wait on the processors that have no split.
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(VT * kHeads / 8 * 2, static_cast<unsigned>(args.batch.slices * args.groups));
  config.blockDim = dim3(128);
  config.stream = device.stream();
  config.attrs = &early;
  config.numAttrs = 1;
  PERIGEE_CUDA(cudaLaunchKernelEx(&config, combine<VT>, args));
}

}  // namespace

void launch_decode(Device& device, AttendArgs args, int64_t most_splits) {
  args.group_heads = std::min(args.heads, kHeads);
  args.groups = (args.heads + kHeads - 1) / kHeads;
  args.tokens = 1;
  const DeviceBatch all = args.batch;
  const int64_t slices = std::min<int64_t>(
      {all.slices, kMostSlices, std::max<int64_t>(1, kMostPartials / (most_splits * args.groups))});
  DeviceScratch::Mark mark(device.scratch);
  const int64_t floats = args.latent <= 128 ? kPartialFloats<kHeads, 1> : kPartialFloats<kHeads, 4>;
  args.partial = device.scratch.take<float>(slices * args.groups * most_splits * floats);
  args.parts = device.scratch.take<int2>(slices * args.groups);
  for (args.first_slice = 0; args.first_slice < all.slices; args.first_slice += static_cast<int>(slices)) {
    args.batch.slice = all.slice + args.first_slice;
    args.batch.pages = all.pages + int64_t{args.first_slice} * all.max_pages;
    args.batch.slices = static_cast<int>(std::min<int64_t>(slices, all.slices - args.first_slice));
    args.latent <= 128 ? launch<1>(device, args, most_splits) : launch<4>(device, args, most_splits);
  }
}

}  // namespace perigee::kernels::mla
