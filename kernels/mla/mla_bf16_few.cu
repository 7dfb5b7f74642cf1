// Decoding a few short sequences: a cluster of eight blocks of threads takes a split, for 32 heads. Each block has the
// scores of an eighth of the split's keys and the sums of an eighth of the latent columns; the weights go from each to all
// through the cluster's shared memory. The chains are those of mla_bf16_attend.cuh, element by element, by instructions of
// a warp (mma.m16n8k16), of which a split keeps 128 busy at once.
#include "kernels/mla/mla_bf16_layer.h"
#include "kernels/mla/mla_bf16_attend.cuh"
#include "kernels/mla/mla_bf16_mma.cuh"

namespace perigee::kernels::mla {
namespace {

constexpr int kRanks = 8;                    // blocks of a cluster
constexpr int kWarps = 16, kThreads = 32 * (kWarps + 1);
constexpr int kQueryPitch = kLayerWidth * 2 + 16;  // bytes; 4 banks on
constexpr int kKeyTiles = 9;

// kKeys: the most of a rank, an eighth of a split. Keys, queries, tile `rank` of the values of all blocks, and weights of all
// keys: weights lie where queries were; where keys are many, values and weights lie where keys and queries were.
template <int kKeys>
struct __align__(1024) Few {
  static constexpr int kBlocks = kKeys / 8, kWeightPitch = kBlocks * 64 * 2 + 16;
  static constexpr bool kValuesLater = kKeys > 64;
  static constexpr int kKeyBytes = kKeyTiles * kKeys * 128, kValueBytes = kBlocks * kTileBytes,
                       kQueryBytes = kLayerHeads * kQueryPitch, kWeightBytes = kLayerHeads * kWeightPitch;
  static constexpr int kValues = kValuesLater ? 0 : kKeyBytes,
                       kQueries = kValuesLater ? kKeyBytes : kKeyBytes + kValueBytes,
                       kWeights = kValuesLater ? kValueBytes : kQueries;
  static constexpr int kWeightsEnd = kWeights + kWeightBytes, kQueriesEnd = kQueries + kQueryBytes;

  std::byte space[kWeightsEnd > kQueriesEnd ? kWeightsEnd : kQueriesEnd];
  float top[kBlocks][4][kLayerHeads];  // of sixteen keys each
  float pair[kBlocks][4][8][4];        // weights of keys i and i + 8 added, for the four heads whose sums this rank has
  float reference[kBlocks][kLayerHeads], alpha[kBlocks][kLayerHeads];
  uint64_t keys_here, values_here, queries_here;
};
static_assert(2 * (sizeof(Few<32>) + 1024) <= 228 * 1024 && sizeof(Few<128>) <= 227 * 1024);

#if defined(PERIGEE_HOPPER)

// References of all blocks: lane is the head.
template <class Shared>
__device__ __forceinline__ void follow_reference(Shared& shared, int blocks, float log2_scale, int lane) {
  float top[Shared::kBlocks];
#pragma unroll
  for (int b = 0; b < Shared::kBlocks; ++b) {
    const auto& t = shared.top[b];
    if (b < blocks) top[b] = fmaxf(fmaxf(t[0][lane], t[1][lane]), fmaxf(t[2][lane], t[3][lane]));
  }
  float m = 0;
#pragma unroll
  for (int b = 0; b < Shared::kBlocks; ++b) {
    if (b >= blocks) break;
    const bool move = b == 0 || __fmaf_rn(top[b], log2_scale, -m) > kSlack;
    const float to = move ? top[b] * log2_scale : m;
    shared.alpha[b][lane] = move && b > 0 ? exp2_fast(m - to) : 1.0f;
    shared.reference[b][lane] = m = to;
  }
}

// The sum of the weights of head lane % 4 of this rank's: each lane has those of keys lane / 4 and + 8 of each sixteen.
template <class Shared>
__device__ __forceinline__ float sum_of_weights(const Shared& shared, int blocks, int head, int lane) {
  float sum[2][4] = {};  // of even and odd blocks
#pragma unroll
  for (int b = 0; b < Shared::kBlocks; ++b) {
    if (b >= blocks) break;
    const float alpha = shared.alpha[b][head];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      sum[0][w] *= alpha;
      sum[1][w] *= alpha;
      sum[b % 2][w] += shared.pair[b][w][lane / 4][lane % 4];
    }
  }
#pragma unroll
  for (int d = 4; d < 32; d *= 2)
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      sum[0][w] += __shfl_xor_sync(~0u, sum[0][w], d);
      sum[1][w] += __shfl_xor_sync(~0u, sum[1][w], d);
    }
  return ((sum[0][0] + sum[0][1]) + (sum[0][2] + sum[0][3])) + ((sum[1][0] + sum[1][1]) + (sum[1][2] + sum[1][3]));
}

#endif

template <int kKeys>
__global__ void __launch_bounds__(kThreads, kKeys == 32 ? 2 : 1) few(const __grid_constant__ FewArgs a) {
#if defined(PERIGEE_HOPPER)
  extern __shared__ __align__(1024) std::byte memory[];
  using Shared = Few<kKeys>;
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  constexpr int kWeightPitch = Shared::kWeightPitch;
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x / 32), 0), lane = threadIdx.x % 32;
  const int rank = blockIdx.x, split = blockIdx.y, groups = a.heads / kLayerHeads,
            slice = static_cast<int>(blockIdx.z) / groups, group = static_cast<int>(blockIdx.z) % groups;
  const DeviceSlice s = a.batch.slice[slice];
  const int length = split_blocks(s.position), blocks = min(length, s.position / 64 + 1 - split * length);
  if (s.count == 0 || blocks <= 0) {  // the whole cluster
    wait_for_previous();
    let_next_start();
    return;
  }
  // This rank's keys begin in block `mine` of the split, at `row` of its page, `here` blocks or a part of one; `end` is the
  // place of the last key, this token's, in the split.
  const int rows = length * 8, mine = rank * rows / 64, row = rank * rows % 64, first_key = mine * 64 + row,
            here = min(max(rows / 64, 1), blocks - mine), end = s.position - split * length * 64;
  const bool has_end = end < length * 64;
  const uint32_t keys = shared_address(shared.space), values = keys + Shared::kValues, queries = keys + Shared::kQueries,
                 weights = keys + Shared::kWeights;
  const uint32_t keys_here = shared_address(&shared.keys_here), values_here = shared_address(&shared.values_here),
                 queries_here = shared_address(&shared.queries_here);
  const std::byte* const* const pages = a.batch.pages + int64_t{slice} * a.batch.max_pages + split * length;
  const auto copy_values = [&] {  // a warp
    if (lane < blocks)
      bulk_copy(values + lane * kTileBytes, pages[lane] + a.page_offset + rank * kTileBytes, kTileBytes, values_here);
  };
  // Pages as the steps before left them; the row of this token is put in later.
  if (warp == kWarps) {
    const int bytes = min(rows, 64) * 128;
    if (lane == 0) {
      barrier_init(keys_here, 1);
      barrier_init(values_here, 1);
      barrier_init(queries_here, 1);
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
      if (here > 0) barrier_expect(keys_here, here * kKeyTiles * bytes);
      barrier_expect(values_here, blocks * kTileBytes);
      barrier_expect(queries_here, kLayerHeads * kLayerWidth * 2);
    }
    __syncwarp();
    if (lane / 16 < here && lane % 16 < kKeyTiles)
      bulk_copy(keys + lane % 16 * (kKeys * 128) + lane / 16 * kTileBytes,
                pages[mine + lane / 16] + a.page_offset + lane % 16 * kTileBytes + row * 128, bytes, keys_here);
    if (!Shared::kValuesLater) copy_values();
  }
  cluster_arrive();
  const int last = end / 64, last_row = end % 64;  // of the split
  const std::byte* const last_page = has_end ? pages[last] + a.page_offset : nullptr;
  __syncthreads();
  wait_for_previous();
  let_next_start();
  const int64_t first = int64_t{s.begin} * a.heads + group * kLayerHeads;
  if (warp == kWarps)
    bulk_copy(queries + lane * kQueryPitch, a.q + (first + lane) * kLayerWidth, kLayerWidth * 2, queries_here);

  // This token's row, into the keys if they are here, and its piece into the values.
  const int thread = threadIdx.x;
  uint4 own = {};
  const bool own_key = has_end && end >= first_key && end < first_key + rows && thread < kKeyTiles * 8,
             own_value = has_end && thread >= 128 && thread < 136;
  if (own_key)
    own = __ldcg(reinterpret_cast<const uint4*>(last_page + thread / 8 * kTileBytes + last_row * 128 + thread % 8 * 16));
  if (own_value) own = __ldcg(reinterpret_cast<const uint4*>(last_page + rank * kTileBytes + last_row * 128 + thread % 8 * 16));
  if (here > 0) barrier_wait(keys_here, 0);
  if (own_key)
    *reinterpret_cast<uint4*>(shared.space + thread / 8 * (kKeys * 128) + (end - first_key) * 128 + thread % 8 * 16) = own;
  barrier_wait(queries_here, 0);
  __syncthreads();

  // S^T: sixteen keys and eight heads of a warp, once or twice.
  constexpr int kTimes = kKeys > 64 ? kKeys / 64 : 1;
  const int sixteen = warp / 4, head = warp % 4 * 8 + lane % 4 * 2;
  const auto key_of = [&](int u) { return first_key + (sixteen + 4 * u) * 16; };  // in the split
  const auto scored = [&](int u) {
    return warp < kWarps && (sixteen + 4 * u) * 16 < rows && key_of(u) / 64 < blocks;
  };
  float x[kTimes][4] = {};
#pragma unroll
  for (int u = 0; u < kTimes; ++u) {
    if (!scored(u)) continue;
    const uint32_t right = right_address(queries + warp % 4 * 8 * kQueryPitch, kQueryPitch, 0, lane);
#pragma unroll
    for (int i = 0; i < kKeyTiles; ++i) {
      const int t = i == 8 ? 8 : i % 2 * 4 + i / 2;  // the order of the attention over many
#pragma unroll
      for (int k = 0; k < 4; k += 2) {
        uint32_t b[4], one[4], two[4];
        load_matrices(b, right + t * 128 + k * 32);
        load_matrices(one, rows_address(keys + t * (kKeys * 128), (sixteen + 4 * u) * 16, k, lane));
        load_matrices(two, rows_address(keys + t * (kKeys * 128), (sixteen + 4 * u) * 16, k + 1, lane));
        mma(x[u], one, b[0], b[1]);
        mma(x[u], two, b[2], b[3]);
      }
    }
    const int key = key_of(u) + lane / 4;
    if (key > end) x[u][0] = x[u][1] = -INFINITY;
    if (key + 8 > end) x[u][2] = x[u][3] = -INFINITY;
  }
  if (Shared::kValuesLater) {
    fence_async();
    __syncthreads();
    if (warp == kWarps) copy_values();
  }
  cluster_wait();  // all blocks of it run
#pragma unroll
  for (int u = 0; u < kTimes; ++u) {
    if (!scored(u)) continue;
    float top[2] = {fmaxf(x[u][0], x[u][2]), fmaxf(x[u][1], x[u][3])};
#pragma unroll
    for (int d = 4; d < 32; d *= 2) {
      top[0] = fmaxf(top[0], __shfl_xor_sync(~0u, top[0], d));
      top[1] = fmaxf(top[1], __shfl_xor_sync(~0u, top[1], d));
    }
    const int key = key_of(u);
    store_there(of_rank(shared_address(&shared.top[key / 64][key % 64 / 16][head]), lane / 4), top[0], top[1]);
  }
  cluster_arrive();
  cluster_wait();
  if (warp == kWarps) follow_reference(shared, blocks, a.log2_scale, lane);
  __syncthreads();

  // Weights, where no block reads any more.
#pragma unroll
  for (int u = 0; u < kTimes; ++u) {
    if (!scored(u)) continue;
    const int key = key_of(u), block = key / 64;
    const float m[2] = {shared.reference[block][head], shared.reference[block][head + 1]};
    float p[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) p[i] = exp2_fast(__fmaf_rn(x[u][i], a.log2_scale, -m[i % 2]));
    store_there(of_rank(shared_address(&shared.pair[block][key % 64 / 16][lane / 4][head % 4]), head / 4), p[0] + p[2],
                p[1] + p[3]);
    // Keys of head lane / 4: eight and eight more, of which each of four lanes has two.
    const uint32_t low = turn(pack(p[0], p[1])), high = turn(pack(p[2], p[3]));
    uint32_t eight[2][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      eight[0][i] = __shfl_sync(~0u, low, lane / 4 * 4 + i);
      eight[1][i] = __shfl_sync(~0u, high, lane / 4 * 4 + i);
    }
    const uint32_t to = weights + (warp % 4 * 8 + lane / 4) * kWeightPitch + key * 2;
#pragma unroll
    for (int r = 0; r < kRanks; r += 4) {
      const uint32_t there = of_rank(to, r + lane % 4);
      store_there(there, eight[0]);
      store_there(there + 16, eight[1]);
    }
  }
  barrier_wait(values_here, 0);
  std::byte* const last_values = shared.space + Shared::kValues + last * kTileBytes;
  if (own_value)
    *reinterpret_cast<uint4*>(last_values + last_row * 128 + thread % 8 * 16) = own;
  // What lies in the page past the last key may be anything; times a weight of zero it must be zero.
  if (has_end)
    for (int i = thread; i < (63 - last_row) * 8; i += kThreads)
      *reinterpret_cast<uint4*>(last_values + (last_row + 1) * 128 + i * 16) = uint4{0, 0, 0, 0};
  cluster_arrive();
  cluster_wait();

  float* const partial = a.partial + (int64_t{blockIdx.z} * a.most_splits + split) * kSplitFloats;
  if (warp == kWarps) {
    const int own_head = rank * 4 + lane % 4;
    const float sum = sum_of_weights(shared, blocks, own_head, lane);
    if (lane < 4) {
      partial[kLayerHeads * kLayerLatent + own_head] = shared.reference[blocks - 1][own_head];
      partial[kLayerHeads * kLayerLatent + kLayerHeads + own_head] = sum;
    }
    return;
  }
  // O^T: sixteen latent columns and eight heads of a warp.
  float o[4] = {};
  const uint32_t right = right_address(weights + warp % 4 * 8 * kWeightPitch, kWeightPitch, 0, lane);
#pragma unroll 4
  for (int b = 0; b < blocks; ++b) {
    const float2 alpha = *reinterpret_cast<const float2*>(&shared.alpha[b][head]);
    uint32_t w[2][4], v[4][4];
    load_matrices(w[0], right + b * 128);
    load_matrices(w[1], right + b * 128 + 64);
#pragma unroll
    for (int k = 0; k < 4; ++k)
      load_matrices_turned(v[k], columns_address(values + b * kTileBytes, sixteen * 16, k, lane));
    if (b > 0) o[0] *= alpha.x, o[1] *= alpha.y, o[2] *= alpha.x, o[3] *= alpha.y;
#pragma unroll
    for (int k = 0; k < 4; ++k) mma(o, v[k], w[k / 2][k % 2 * 2], w[k / 2][k % 2 * 2 + 1]);
  }
  float* const to = partial + head * kLayerLatent + rank * 64 + sixteen * 16 + lane / 4;
  to[0] = o[0];
  to[kLayerLatent] = o[1];
  to[8] = o[2];
  to[kLayerLatent + 8] = o[3];
#endif
}

template <int kKeys>
void launch(Device& device, const FewArgs& a) {
  allow_shared_memory(few<kKeys>, sizeof(Few<kKeys>));
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = kRanks;
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(kRanks, static_cast<unsigned>(a.most_splits),
                        static_cast<unsigned>(a.batch.slices * (a.heads / kLayerHeads)));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = sizeof(Few<kKeys>);
  config.stream = device.stream();
  config.attrs = attributes;
  config.numAttrs = 2;
  PERIGEE_CUDA(cudaLaunchKernelEx(&config, few<kKeys>, a));
}

}  // namespace

void launch_few(Device& device, const FewArgs& a) {
  PERIGEE_CHECK(a.batch.max_pages <= kLayerPages && a.most_splits <= kLayerSplits);
  // Splits are of 4 blocks up to position 1023, then of 8, from 4096 on of 16.
  if (a.batch.max_pages <= 16) return launch<32>(device, a);
  a.batch.max_pages <= 64 ? launch<64>(device, a) : launch<128>(device, a);
}

}  // namespace perigee::kernels::mla
