// Decoding a few short sequences: a cluster of eight blocks of threads takes a split, for 32 or 16 heads. Each block has the
// scores of an eighth of the split's keys and the sums of an eighth of the latent columns; the weights go from each to all
// through the cluster's shared memory. The chains are those of mla_bf16_attend.cuh, element by element, by instructions of
// a warp (mma.m16n8k16), of which a split keeps 128 busy at once.
#include "kernels/mla/mla_bf16_attend.cuh"
#include "kernels/mla/mla_bf16_layer.h"
#include "kernels/mla/mla_bf16_mma.cuh"

namespace perigee::kernels::mla {
namespace {

constexpr int kRanks = 8;  // blocks of a cluster
constexpr int kWarps = 8, kThreads = 32 * (kWarps + 1);
constexpr int kQueryPitch = kLayerWidth * 2 + 16;  // bytes; 4 banks on
constexpr int kKeyTiles = 9;

// kKeys: the most of a rank, an eighth of a split. Keys, queries, tile `rank` of the values of all blocks, and weights of all
// keys: weights lie where queries were; where keys are many, values and weights lie where keys and queries were.
template <int kKeys, int kHeads>
struct __align__(1024) Few {
  static constexpr int kBlocks = kKeys / 8, kWeightPitch = kBlocks * 64 * 2 + 16;
  static constexpr bool kValuesLater = kKeys > 64;
  static constexpr int kKeyBytes = kKeyTiles * kKeys * 128, kValueBytes = kBlocks * kTileBytes,
                       kQueryBytes = kHeads * kQueryPitch, kWeightBytes = kHeads * kWeightPitch;
  static constexpr int kValues = kValuesLater ? 0 : kKeyBytes,
                       kQueries = kValuesLater ? kKeyBytes : kKeyBytes + kValueBytes,
                       kWeights = kValuesLater ? kValueBytes : kQueries;
  static constexpr int kOwnHeads = kHeads / kRanks;  // whose sums a rank has
  static constexpr int kWeightsEnd = kWeights + kWeightBytes, kQueriesEnd = kQueries + kQueryBytes;

  std::byte space[kWeightsEnd > kQueriesEnd ? kWeightsEnd : kQueriesEnd];
  float top[kBlocks][4][kHeads];         // of sixteen keys each
  float pair[kBlocks][4][8][kOwnHeads];  // weights of keys i and i + 8 added
  float reference[kBlocks][kHeads], alpha[kBlocks][kHeads];
  uint64_t keys_here, values_here;
};
static_assert(2 * (sizeof(Few<32, 32>) + 1024) <= 228 * 1024 && sizeof(Few<128, 32>) <= 227 * 1024);

#if defined(PERIGEE_HOPPER)

// References of all blocks of keys, by a lane of each head.
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

// The sum of the weights of head lane % 4 of this rank's, where it has so many: each lane has those of keys lane / 4 and + 8 of each sixteen.
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
      sum[b % 2][w] += shared.pair[b][w][lane / 4][lane % 4 % Shared::kOwnHeads];
    }
  }
#pragma unroll
  for (int d = 4; d < 32; d *= 2)
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      sum[0][w] += __shfl_xor_sync(~0u, sum[0][w], d);
      sum[1][w] += __shfl_xor_sync(~0u, sum[1][w], d);
    }
  return ((sum[0][0] + sum[0][1]) + (sum[0][2] + sum[0][3])) +
         ((sum[1][0] + sum[1][1]) + (sum[1][2] + sum[1][3]));
}

// What a warp multiplies at once: 16 by 64 of A, and of B 64 by eight columns, once or twice.
template <int kChains>
struct Operands {
  uint32_t a[4][4], b[2 * kChains][4];

  // B: rows of elements, `pitch` bytes apart; right: where this lane begins.
  __device__ __forceinline__ void load_right(uint32_t right) {
#pragma unroll
    for (int i = 0; i < 2 * kChains; ++i) load_matrices(b[i], right + i * (64 / kChains));
  }
  __device__ __forceinline__ static uint32_t begin_right(uint32_t rows, int pitch, int lane) {
    if constexpr (kChains == 1) return right_address(rows, pitch, 0, lane);
    return right_address(rows, pitch, 0, lane % 16) + lane / 16 * 8 * pitch;
  }
  __device__ __forceinline__ void add(float (&c)[kChains][4]) const {
#pragma unroll
    for (int k = 0; k < 4; ++k)
#pragma unroll
      for (int j = 0; j < kChains; ++j) {
        if constexpr (kChains == 1)
          mma(c[j], a[k], b[k / 2][k % 2 * 2], b[k / 2][k % 2 * 2 + 1]);
        else
          mma(c[j], a[k], b[k][2 * j], b[k][2 * j + 1]);
      }
  }
};

#endif

template <int kKeys, int kHeads>
__global__ void __launch_bounds__(kThreads, kKeys == 32 ? 2 : 1) few(const __grid_constant__ FewArgs a) {
#if defined(PERIGEE_HOPPER)
  extern __shared__ __align__(1024) std::byte memory[];
  using Shared = Few<kKeys, kHeads>;
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  constexpr int kWeightPitch = Shared::kWeightPitch, kChains = kHeads / 16, kOwnHeads = Shared::kOwnHeads;
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x / 32), 0), lane = threadIdx.x % 32;
  const int rank = blockIdx.x, split = blockIdx.y, groups = a.heads / kHeads,
            slice = static_cast<int>(blockIdx.z) / groups, group = static_cast<int>(blockIdx.z) % groups;
  const DeviceSlice s = a.batch.slice[slice];
  const int length = split_blocks(s.position), blocks = min(length, s.position / 64 + 1 - split * length);
  if (s.count == 0 || blocks <= 0) {  // the whole cluster
    let_next_start();
    wait_for_previous();
    return;
  }
  // This rank's keys begin in block `mine` of the split, at `row` of its page, `here` blocks or a part of one; `end` is the
  // place of the last key, this token's, in the split.
  const int rows = length * 8, mine = rank * rows / 64, row = rank * rows % 64, first_key = mine * 64 + row,
            here = min(max(rows / 64, 1), blocks - mine), end = s.position - split * length * 64;
  const bool has_end = end < length * 64;
  const uint32_t keys = shared_address(shared.space), values = keys + Shared::kValues,
                 queries = keys + Shared::kQueries, weights = keys + Shared::kWeights;
  const uint32_t keys_here = shared_address(&shared.keys_here),
                 values_here = shared_address(&shared.values_here);
  const std::byte* const* const pages = a.batch.pages + int64_t{slice} * a.batch.max_pages + split * length;
  const auto copy_values = [&] {  // a warp
    if (lane < blocks)
      bulk_copy(values + lane * kTileBytes, pages[lane] + a.page_offset + rank * kTileBytes, kTileBytes,
                values_here);
  };
  // Pages as the steps before left them; the row of this token is put in later.
  if (warp == kWarps) {
    const int bytes = min(rows, 64) * 128;
    if (lane == 0) {
      barrier_init(keys_here, 1);
      barrier_init(values_here, 1);
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
      if (here > 0) barrier_expect(keys_here, here * kKeyTiles * bytes);
      barrier_expect(values_here, blocks * kTileBytes);
    }
    __syncwarp();
    if (lane / 16 < here && lane % 16 < kKeyTiles)
      bulk_copy(keys + lane % 16 * (kKeys * 128) + lane / 16 * kTileBytes,
                pages[mine + lane / 16] + a.page_offset + lane % 16 * kTileBytes + row * 128, bytes,
                keys_here);
    if (!Shared::kValuesLater) copy_values();
  }
  cluster_arrive();
  const int last = end / 64, last_row = end % 64;  // of the split
  const std::byte* const last_page = has_end ? pages[last] + a.page_offset : nullptr;
  __syncthreads();
  // What comes next may fetch its weights.
  let_next_start();
  wait_for_previous();
  const int thread = threadIdx.x;
  constexpr int kPieces = kLayerWidth / 8, kQueryRows = kThreads / kPieces, kEach = kHeads / kQueryRows;
  static_assert(kThreads % kPieces == 0 && kHeads % kQueryRows == 0);
  const int64_t first = int64_t{s.begin} * a.heads + group * kHeads + thread / kPieces;
  uint4 q[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i)
    q[i] = __ldcg(reinterpret_cast<const uint4*>(a.q + (first + i * kQueryRows) * kLayerWidth) +
                  thread % kPieces);

  // This token's row, into the keys if they are here, and its piece into the values.
  uint4 own = {};
  const bool own_key = has_end && end >= first_key && end < first_key + rows && thread < kKeyTiles * 8,
             own_value = has_end && thread >= 128 && thread < 136;
  if (own_key)
    own = __ldcg(reinterpret_cast<const uint4*>(last_page + thread / 8 * kTileBytes + last_row * 128 +
                                                thread % 8 * 16));
  if (own_value)
    own = __ldcg(
        reinterpret_cast<const uint4*>(last_page + rank * kTileBytes + last_row * 128 + thread % 8 * 16));
  if (here > 0) barrier_wait(keys_here, 0);
  if (own_key)
    *reinterpret_cast<uint4*>(shared.space + thread / 8 * (kKeys * 128) + (end - first_key) * 128 +
                              thread % 8 * 16) = own;
#pragma unroll
  for (int i = 0; i < kEach; ++i)
    *reinterpret_cast<uint4*>(shared.space + Shared::kQueries +
                              (thread / kPieces + i * kQueryRows) * kQueryPitch + thread % kPieces * 16) =
        q[i];
  __syncthreads();

  // S^T: sixteen keys and eight or sixteen heads of a warp, once or twice.
  constexpr int kTimes = kKeys > 64 ? kKeys / 64 : 1;
  const int sixteen = warp / 2, side = warp % 2 * 8 * kChains,
            head = side + lane % 4 * 2;                                           // and 8 after each
  const auto key_of = [&](int u) { return first_key + (sixteen + 4 * u) * 16; };  // in the split
  const auto scored = [&](int u) {
    return warp < kWarps && (sixteen + 4 * u) * 16 < rows && key_of(u) / 64 < blocks;
  };
  float x[kTimes][kChains][4] = {};
#pragma unroll
  for (int u = 0; u < kTimes; ++u) {
    if (!scored(u)) continue;
    const uint32_t right = Operands<kChains>::begin_right(queries + side * kQueryPitch, kQueryPitch, lane);
    Operands<kChains> operands[2];
    const auto load = [&](int i) {
      const int t = i == 8 ? 8 : i % 2 * 4 + i / 2;  // the order of the attention over many
      operands[i % 2].load_right(right + t * 128);
#pragma unroll
      for (int k = 0; k < 4; ++k)
        load_matrices(operands[i % 2].a[k],
                      rows_address(keys + t * (kKeys * 128), (sixteen + 4 * u) * 16, k, lane));
    };
    load(0);
#pragma unroll
    for (int i = 0; i < kKeyTiles; ++i) {
      if (i + 1 < kKeyTiles) load(i + 1);
      operands[i % 2].add(x[u]);
    }
    const int key = key_of(u) + lane / 4;
#pragma unroll
    for (int j = 0; j < kChains; ++j) {
      if (key > end) x[u][j][0] = x[u][j][1] = -INFINITY;
      if (key + 8 > end) x[u][j][2] = x[u][j][3] = -INFINITY;
    }
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
    const int key = key_of(u);
#pragma unroll
    for (int j = 0; j < kChains; ++j) {
      float top[2] = {fmaxf(x[u][j][0], x[u][j][2]), fmaxf(x[u][j][1], x[u][j][3])};
#pragma unroll
      for (int d = 4; d < 32; d *= 2) {
        top[0] = fmaxf(top[0], __shfl_xor_sync(~0u, top[0], d));
        top[1] = fmaxf(top[1], __shfl_xor_sync(~0u, top[1], d));
      }
      store_there(of_rank(shared_address(&shared.top[key / 64][key % 64 / 16][head + 8 * j]), lane / 4),
                  top[0], top[1]);
    }
  }
  cluster_arrive();
  cluster_wait();
  if (warp == kWarps) follow_reference(shared, blocks, a.log2_scale, lane % kHeads);
  __syncthreads();

  // Weights, where no block reads any more.
#pragma unroll
  for (int u = 0; u < kTimes; ++u) {
    if (!scored(u)) continue;
    const int key = key_of(u), block = key / 64;
#pragma unroll
    for (int j = 0; j < kChains; ++j) {
      const int h = head + 8 * j;
      const float m[2] = {shared.reference[block][h], shared.reference[block][h + 1]};
      float p[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) p[i] = exp2_fast(__fmaf_rn(x[u][j][i], a.log2_scale, -m[i % 2]));
      store_there(
          of_rank(shared_address(&shared.pair[block][key % 64 / 16][lane / 4][h % kOwnHeads]), h / kOwnHeads),
          p[0] + p[2], p[1] + p[3]);
      // Keys of head lane / 4: eight and eight more, of which each of four lanes has two.
      const uint32_t low = turn(pack(p[0], p[1])), high = turn(pack(p[2], p[3]));
      uint32_t eight[2][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        eight[0][i] = __shfl_sync(~0u, low, lane / 4 * 4 + i);
        eight[1][i] = __shfl_sync(~0u, high, lane / 4 * 4 + i);
      }
      const uint32_t to = weights + (side + 8 * j + lane / 4) * kWeightPitch + key * 2;
#pragma unroll
      for (int r = 0; r < kRanks; r += 4) {
        const uint32_t there = of_rank(to, r + lane % 4);
        store_there(there, eight[0]);
        store_there(there + 16, eight[1]);
      }
    }
  }
  barrier_wait(values_here, 0);
  std::byte* const last_values = shared.space + Shared::kValues + last * kTileBytes;
  if (own_value) *reinterpret_cast<uint4*>(last_values + last_row * 128 + thread % 8 * 16) = own;
  // What lies in the page past the last key may be anything; times a weight of zero it must be zero.
  if (has_end)
    for (int i = thread; i < (63 - last_row) * 8; i += kThreads)
      *reinterpret_cast<uint4*>(last_values + (last_row + 1) * 128 + i * 16) = uint4{0, 0, 0, 0};
  cluster_arrive();
  cluster_wait();

  const int first_head = group * kHeads % kLayerHeads;  // of those that lie together
  float* const partial =
      a.partial +
      ((int64_t{slice} * (a.heads / kLayerHeads) + group * kHeads / kLayerHeads) * a.most_splits + split) *
          kSplitFloats;
  if (warp == kWarps) {
    const int own_head = rank * kOwnHeads + lane % kOwnHeads;
    const float sum = sum_of_weights(shared, blocks, own_head, lane);
    if (lane < kOwnHeads) {
      float* const to = partial + kLayerHeads * kLayerLatent + first_head + own_head;
      to[0] = shared.reference[blocks - 1][own_head];
      to[kLayerHeads] = sum;
    }
    return;
  }
  // O^T: sixteen latent columns and eight or sixteen heads of a warp.
  float o[kChains][4] = {};
  const uint32_t right = Operands<kChains>::begin_right(weights + side * kWeightPitch, kWeightPitch, lane);
  Operands<kChains> operands[2];
  const auto load = [&](int b) {
    operands[b % 2].load_right(right + b * 128);
#pragma unroll
    for (int k = 0; k < 4; ++k)
      load_matrices_turned(operands[b % 2].a[k],
                           columns_address(values + b * kTileBytes, sixteen * 16, k, lane));
  };
  load(0);
#pragma unroll
  for (int b = 0; b < Shared::kBlocks; ++b) {
    if (b >= blocks) break;
    if (b + 1 < Shared::kBlocks && b + 1 < blocks) load(b + 1);
    if (b > 0) {
#pragma unroll
      for (int j = 0; j < kChains; ++j) {
        const float2 alpha = *reinterpret_cast<const float2*>(&shared.alpha[b][head + 8 * j]);
        o[j][0] *= alpha.x, o[j][1] *= alpha.y, o[j][2] *= alpha.x, o[j][3] *= alpha.y;
      }
    }
    operands[b % 2].add(o);
  }
#pragma unroll
  for (int j = 0; j < kChains; ++j) {
    float* const to =
        partial + (first_head + head + 8 * j) * kLayerLatent + rank * 64 + sixteen * 16 + lane / 4;
    to[0] = o[j][0];
    to[kLayerLatent] = o[j][1];
    to[8] = o[j][2];
    to[kLayerLatent + 8] = o[j][3];
  }
#endif
}

template <int kKeys, int kHeads>
void launch(Device& device, const FewArgs& a) {
  allow_shared_memory(few<kKeys, kHeads>, sizeof(Few<kKeys, kHeads>));
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = kRanks;
  attributes[1].val.clusterDim.y = attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(kRanks, static_cast<unsigned>(a.most_splits),
                        static_cast<unsigned>(a.batch.slices * (a.heads / kHeads)));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = sizeof(Few<kKeys, kHeads>);
  config.stream = device.stream();
  config.attrs = attributes;
  config.numAttrs = 2;
  PERIGEE_CUDA(cudaLaunchKernelEx(&config, few<kKeys, kHeads>, a));
}

}  // namespace

void launch_few(Device& device, const FewArgs& a) {
  PERIGEE_CHECK(a.batch.max_pages <= kLayerPages && a.most_splits <= kLayerSplits);
  // Splits are of 4 blocks up to position 1023, then of 8, from 4096 on of 16. Half the heads, where there is room for
  // twice the clusters.
  const bool half = int64_t{a.batch.slices} * (a.heads / kLayerHeads) * a.most_splits <= kRanks / 2;
  if (a.batch.max_pages <= 16) return half ? launch<32, 16>(device, a) : launch<32, 32>(device, a);
  if (a.batch.max_pages <= 64) return half ? launch<64, 16>(device, a) : launch<64, 32>(device, a);
  launch<128, 32>(device, a);
}

}  // namespace perigee::kernels::mla
