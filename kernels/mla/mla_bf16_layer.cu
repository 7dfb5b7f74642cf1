// Decoding a few short sequences: what comes before attention, in one launch, and what comes after, in another. The
// products are chains of mma.m16n8k16, of which eight rows of the batch are the columns.
#include "kernels/mla/latent_row.cuh"
#include "kernels/mla/mla_bf16_attend.cuh"
#include "kernels/mla/mla_bf16_layer.h"
#include "kernels/mla/mla_bf16_mma.cuh"
#include "kernels/mla/mla_layer_device.h"

namespace perigee::kernels {
namespace mla {
namespace {

constexpr int kThreads = 256;
constexpr int kInner = 128;  // that a head's q has to absorb, and values that it gives
constexpr int kMostRows = 8;
constexpr int kPieces = 4;                           // blocks of threads that share a head
constexpr int kWeightBytes = 32768;                  // of one of them: a quarter of a matrix
constexpr int kLatentPitch = kLayerLatent * 2 + 16;  // bytes; 4 banks on

struct __align__(1024) Before {
  std::byte weights[kWeightBytes];  // 128 outputs by 128
  uint64_t here;
};
struct __align__(1024) After {
  std::byte weights[kWeightBytes];  // 32 outputs by 512, 4 KiB of each tile
  std::byte latent[kMostRows * kLatentPitch];
  DeviceSlice slice[kMostRows];
  uint64_t here;
};

struct LayerArgs {
  MlaDecodeLayer layer;
  DeviceBatch batch;
  int64_t page_offset;
  int heads, most_splits;
  bf16* absorbed;
  float* partial;
  bf16* o;
};

// A latent row per block, then of each head four blocks, of 128 outputs of absorb_k each. The first copies the rope part.
__global__ void __launch_bounds__(kThreads) before(const __grid_constant__ LayerArgs a) {
#if defined(PERIGEE_HOPPER)
  extern __shared__ __align__(1024) std::byte memory[];
  Before& shared = *reinterpret_cast<Before*>(memory);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  if (static_cast<int>(blockIdx.x) < a.batch.slices) {
    float *const x = reinterpret_cast<float*>(memory), *const norm_w = x + kLayerWidth;
    const DeviceSlice s = a.batch.slice[blockIdx.x];
    bf16* const page = reinterpret_cast<bf16*>(
        a.batch.pages[int64_t{blockIdx.x} * a.batch.max_pages + s.position / 64] + a.page_offset);
    for (int j = thread; j < kLayerLatent; j += kThreads) norm_w[j] = __ldg(a.layer.norm_w + j);
    let_next_start();
    wait_for_previous();
    if (s.count == 0) return;
    store_latent_row<bf16, kThreads>(
        kLayerLatent, kLayerWidth, a.layer.kv, [&](int j) { return norm_w[j]; }, a.layer.eps, s, page,
        static_cast<bf16*>(nullptr), x);
    return;
  }
  const int unit = static_cast<int>(blockIdx.x) - a.batch.slices, head = unit / kPieces,
            piece = unit % kPieces;
  const uint32_t here = shared_address(&shared.here);
  if (thread == 0) {
    barrier_init(here, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    barrier_expect(here, kWeightBytes);
    bulk_copy(shared_address(shared.weights),
              reinterpret_cast<const std::byte*>(a.layer.absorb_k) + head * a.layer.absorb_k_step +
                  piece * kWeightBytes,
              kWeightBytes, here);
  }
  __syncthreads();
  // The clusters that come next may take their places and fetch pages.
  let_next_start();
  wait_for_previous();
  constexpr int kWide = kInner + kLayerRope;
  const auto q_row = [&](int row) { return a.layer.q + (int64_t{row} * a.heads + head) * kWide; };
  bf16* const to = a.absorbed + head * kLayerWidth;
  const int64_t to_row = int64_t{a.heads} * kLayerWidth;
  uint32_t x[2 * kInner / 16] = {};
  if (lane / 4 < a.batch.rows) {
    const bf16* const from = q_row(lane / 4) + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 2 * kInner / 16; ++i) x[i] = *reinterpret_cast<const uint32_t*>(from + 8 * i);
  }
  if (piece == 0 && thread < a.batch.rows * 8)
    *reinterpret_cast<uint4*>(to + thread / 8 * to_row + kLayerLatent + thread % 8 * 8) =
        *reinterpret_cast<const uint4*>(q_row(thread / 8) + kInner + thread % 8 * 8);
  barrier_wait(here, 0);
  float c[4] = {};
  const uint32_t tiles = shared_address(shared.weights) + warp / 4 * (2 * kTileBytes);
#pragma unroll
  for (int i = 0; i < kInner / 16; ++i) {
    uint32_t w[4];
    load_matrices(w, rows_address(tiles + i / 4 * kTileBytes, warp % 4 * 16, i % 4, lane));
    mma(c, w, x[2 * i], x[2 * i + 1]);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = lane % 4 * 2 + i % 2;
    if (row < a.batch.rows)
      to[row * to_row + piece * 128 + warp * 16 + lane / 4 + i / 2 * 8] = from_float<bf16>(c[i]);
  }
#endif
}

// Of each head four blocks, of 32 outputs of absorb_v each; each merges the head's splits, kSplits at most, for itself.
template <int kSplits>
__global__ void __launch_bounds__(kThreads, 1) after(const __grid_constant__ LayerArgs a) {
#if defined(PERIGEE_HOPPER)
  extern __shared__ __align__(1024) std::byte memory[];
  After& shared = *reinterpret_cast<After*>(memory);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int head = static_cast<int>(blockIdx.x) / kPieces, piece = static_cast<int>(blockIdx.x) % kPieces;
  const uint32_t here = shared_address(&shared.here), weights = shared_address(shared.weights);
  constexpr int kTilesAcross = kLayerLatent / 64, kPieceBytes = 32 * 128;
  if (warp == 0) {
    if (lane == 0) {
      barrier_init(here, 1);
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
      barrier_expect(here, kWeightBytes);
    }
    __syncwarp();
    if (lane < kTilesAcross)
      bulk_copy(weights + lane * kPieceBytes,
                reinterpret_cast<const std::byte*>(a.layer.absorb_v) + head * a.layer.absorb_v_step +
                    (piece / 2 * kTilesAcross + lane) * kTileBytes + piece % 2 * kPieceBytes,
                kPieceBytes, here);
  }
  if (thread < a.batch.slices) shared.slice[thread] = a.batch.slice[thread];
  __syncthreads();
  wait_for_previous();
  let_next_start();
  const int groups = a.heads / kLayerHeads, in_group = head % kLayerHeads;
  constexpr int kQuads = kLayerLatent / 4;
  for (int i = thread; i < a.batch.slices * kQuads; i += kThreads) {
    const int slice = i / kQuads, quad = i % kQuads;
    const DeviceSlice s = shared.slice[slice];
    const int splits = s.count == 0 ? 0 : split_count(s.position);
    const float* const from =
        a.partial + int64_t{slice * groups + head / kLayerHeads} * a.most_splits * kSplitFloats;
    float4 p[kSplits];
    float m[kSplits], sum[kSplits];
#pragma unroll
    for (int j = 0; j < kSplits; ++j) {
      if (j < splits) {
        const float* const split = from + j * kSplitFloats;
        p[j] = *reinterpret_cast<const float4*>(split + in_group * kLayerLatent + quad * 4);
        m[j] = split[kLayerHeads * kLayerLatent + in_group];
        sum[j] = split[kLayerHeads * kLayerLatent + kLayerHeads + in_group];
      }
    }
    uint2 narrow = {};
    if (splits > 0) {
#pragma unroll
      for (int j = 1; j < kSplits; ++j) {
        if (j < splits) {
          float x, y;
          merge_factors(m[0], m[j], x, y);
          sum[0] = merge(sum[0], x, sum[j], y);
          p[0].x = merge(p[0].x, x, p[j].x, y);
          p[0].y = merge(p[0].y, x, p[j].y, y);
          p[0].z = merge(p[0].z, x, p[j].z, y);
          p[0].w = merge(p[0].w, x, p[j].w, y);
        }
      }
      const float f = __fdiv_rn(1.0f, sum[0]);
      narrow = {pack(p[0].x * f, p[0].y * f), pack(p[0].z * f, p[0].w * f)};
    }
    *reinterpret_cast<uint2*>(shared.latent + slice * kLatentPitch + quad * 8) = narrow;
  }
  // Columns of the product that no slice has.
  for (int i = a.batch.slices * kQuads + thread; i < kMostRows * kQuads; i += kThreads)
    *reinterpret_cast<uint2*>(shared.latent + i / kQuads * kLatentPitch + i % kQuads * 8) = uint2{0, 0};
  __syncthreads();
  barrier_wait(here, 0);
  if (warp >= 2) return;
  float c[4] = {};
  const uint32_t right = right_address(shared_address(shared.latent), kLatentPitch, 0, lane);
#pragma unroll
  for (int i = 0; i < kLayerLatent / 32; ++i) {
    uint32_t b[4], one[4], two[4];
    load_matrices(b, right + i * 64);
    load_matrices(one, rows_address(weights + i / 2 * kPieceBytes, warp * 16, i % 2 * 2, lane));
    load_matrices(two, rows_address(weights + i / 2 * kPieceBytes, warp * 16, i % 2 * 2 + 1, lane));
    mma(c, one, b[0], b[1]);
    mma(c, two, b[2], b[3]);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int slice = lane % 4 * 2 + i % 2;
    if (slice >= a.batch.slices) continue;
    const DeviceSlice s = shared.slice[slice];
    if (s.count == 0) continue;
    a.o[(int64_t{s.begin} * a.heads + head) * kInner + piece * 32 + warp * 16 + lane / 4 + i / 2 * 8] =
        from_float<bf16>(c[i]);
  }
#endif
}

// Clusters that are faster than the attention over many: they run at once.
constexpr int64_t kMostClusters = 16;

int64_t most_splits(const DeviceBatch& batch) {
  return most_split_count(static_cast<int>(batch.max_pages * kLatentPage - 1));
}

}  // namespace
}  // namespace mla

bool mla_decodes_layer(const Device& device, const MlaShape& shape, int64_t nope, int64_t v,
                       const DeviceBatch& batch) {
  using namespace mla;
  return batch.max_count == 1 && !batch.training() && shape.latent == kLayerLatent &&
         shape.rope == kLayerRope && shape.heads % kLayerHeads == 0 && nope == kInner && v == kInner &&
         batch.rows <= kMostRows && batch.slices <= kMostRows && batch.max_pages <= kLayerPages &&
         device.info().capability == 90 &&
         batch.slices * (shape.heads / kLayerHeads) * most_splits(batch) <= kMostClusters;
}

bool mla_decode_layer(Device& device, const MlaShape& shape, const MlaDecodeLayer& layer,
                      const DeviceBatch& batch, int64_t page_offset, bf16* o) {
  using namespace mla;
  if (!mla_decodes_layer(device, shape, kInner, kInner, batch)) return false;
  if (batch.slices == 0) return true;
  PERIGEE_CHECK(page_offset % 16 == 0 && layer.absorb_k_step % 16 == 0 && layer.absorb_v_step % 16 == 0);
  const int64_t splits = most_splits(batch);
  DeviceScratch::Mark mark(device.scratch);
  LayerArgs a = {
      layer,   batch, page_offset, static_cast<int>(shape.heads), static_cast<int>(splits), nullptr,
      nullptr, o};
  a.absorbed = device.scratch.take<bf16>(batch.rows * shape.heads * kLayerWidth);
  a.partial = device.scratch.take<float>(batch.slices * (shape.heads / kLayerHeads) * splits * kSplitFloats);
  const auto of_heads = static_cast<unsigned>(shape.heads * kPieces);
  launch_dependent(before, dim3(static_cast<unsigned>(batch.slices) + of_heads), dim3(kThreads),
                   sizeof(Before), device.stream(), a);
  FewArgs few = {};
  few.q = a.absorbed, few.batch = batch, few.page_offset = page_offset;
  few.heads = a.heads, few.most_splits = a.most_splits;
  few.log2_scale = shape.scale * 1.44269504088896341f;
  few.partial = a.partial;
  launch_few(device, few);
  launch_dependent(splits <= kLayerSplits / 2 ? after<kLayerSplits / 2> : after<kLayerSplits>, dim3(of_heads),
                   dim3(kThreads), sizeof(After), device.stream(), a);
  return true;
}

}  // namespace perigee::kernels
