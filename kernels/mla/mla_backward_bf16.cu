// Attention over latent rows, backwards, in bfloat16 on Hopper's tensor cores. docs/kernels/mla_backward.md has the
// arithmetic that led to this form.
//
// Two passes of one kernel, each recomputing p and ds from the forward's log-sum-exp: one holds 64 queries and streams the
// keys for dq, one holds 64 keys and streams the queries for dc. What is held and two stages of 32 streamed rows lie in
// shared memory; three warpgroups hold 192 columns of the 576-wide sum each. For every 32 streamed rows
//   warpgroup 0 makes the scores and from them p; warpgroup 1 makes dp and, with p, ds; both through shared memory;
//   all three then add  dq += ds c   or   dc += p dout, dc += ds q.
// The next rows' scores start while the last sums still run. A thread of a fourth warpgroup feeds the stages.
//
// dc of a key is summed in spans of queries, of a length that depends on the longest sequence, and the spans in ascending
// order: the work of long sequences is cut into pieces and no sum depends on luck.
#include "kernels/mla/mla_backward_bf16.cuh"
#include "kernels/mla/mla_device_grad.h"

namespace perigee::kernels {

namespace mla_grad {
namespace {

using hopper::barrier_wait;

constexpr int kLatent = 512, kWidth = 576, kChunks = kWidth / 64, kValueChunks = kLatent / 64;
constexpr int kHeldRows = 64, kStreamRows = 32;
constexpr int kHeldChunk = kHeldRows * 128, kStreamChunk = kStreamRows * 128;  // bytes
constexpr int kConsumers = 3 * 128, kThreads = kConsumers + 128;
constexpr int kWeightBytes = 64 * 128;  // p | ds, [64, 32 | 32] bf16
constexpr float kLog2E = 1.44269504088896341f;

struct Params {
  CUtensorMap held, held_values, stream, stream_values;  // wide rows, and rows of dout
  const DeviceSlice* slices;
  const float *lse, *delta;
  bf16* dq;     // of queries
  float* dc;    // of keys: [spans, rows, width]
  int64_t rows;
  int heads, span;
  float scale;
};

template <bool kKeys>
struct Layout {
  static constexpr int kHeldValues = kChunks * kHeldChunk;
  static constexpr int kHeldBytes = (kKeys ? kChunks : kChunks + kValueChunks) * kHeldChunk;
  static constexpr int kStreamValues = kChunks * kStreamChunk;
  static constexpr int kStageBytes = (kKeys ? kChunks + kValueChunks : kChunks) * kStreamChunk;
  static constexpr int kStage = kHeldBytes;
  static constexpr int kWeights = kStage + 2 * kStageBytes;
  static constexpr int kBarriers = kWeights + 2 * kWeightBytes;  // held, full[2], empty[2]
  static constexpr int kBytes = kBarriers + 64 + 1024;           // and the alignment
};

// What a block of threads does: tiles [first, end) of kStreamRows rows each.
struct Job {
  int first, end;
  int64_t held_row, stream_row;  // of the batch; stream_row is where tile 0 would be
  int held0;                     // first query or key, from the slice's start
  int count;                     // tokens of the slice
  float* dc;                     // the span's
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <bool kKeys, int kRole>
__device__ __forceinline__ void consume(const Params& p, const Job& job, uint32_t base) {
  using L = Layout<kKeys>;
  using namespace hopper;
  const uint32_t full = base + L::kBarriers + 8, empty = full + 16;
  const int thread = static_cast<int>(threadIdx.x) % 128, lane = thread % 32;
  const int row = thread / 32 * 16 + lane / 4, pair = 2 * (lane % 4);
  const float scale2 = p.scale * kLog2E;
  const int tiles_per_token = p.heads / kStreamRows;
  // Where this thread's pairs of p lie: row (+ 8), columns 8 j + pair; ds is 32 columns further.
  const uint32_t own = static_cast<uint32_t>(row * 128 + (lane % 4) * 4);
  const auto piece = [&](int j) { return static_cast<uint32_t>((j ^ (lane / 4)) * 16); };

  float acc[96];
#pragma unroll
  for (int i = 0; i < 96; ++i) acc[i] = 0.0f;
  settle(acc);

  // With queries held, a thread's two rows keep their numbers.
  float held_lse[2] = {0.0f, 0.0f}, held_delta[2] = {0.0f, 0.0f};
  int token[2] = {0, 0};
  if constexpr (!kKeys) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int query = job.held0 + row + 8 * i;
      token[i] = query / p.heads;
      if (token[i] < job.count) {
        held_lse[i] = p.lse[job.held_row + row + 8 * i] * kLog2E;
        held_delta[i] = p.delta[job.held_row + row + 8 * i];
      }
    }
  }

  barrier_wait(base + L::kBarriers, 0);
  for (int tile = job.first; tile < job.end; ++tile) {
    const int i = tile - job.first, s = i & 1;
    const uint32_t stage = base + L::kStage + s * L::kStageBytes, weights = base + L::kWeights + s * kWeightBytes;
    barrier_wait(full + 8 * s, (i >> 1) & 1);

    float score[16];
    if constexpr (kRole < 2) {
      const uint32_t a = base + (!kKeys && kRole == 1 ? L::kHeldValues : 0);
      const uint32_t b = stage + (kKeys && kRole == 1 ? L::kStreamValues : 0);
#pragma unroll
      for (int j = 0; j < 16; ++j) score[j] = 0.0f;
      settle(score);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < (kRole == 0 ? kChunks : kValueChunks); ++k)
#pragma unroll
        for (int step = 0; step < 4; ++step)
          wgmma<32>(score, operand(a + k * kHeldChunk) + step * kOperandStep,
                    operand(b + k * kStreamChunk) + step * kOperandStep);
      wgmma_commit();
    }
    // The sums of the last tile are done: its stage may be filled again.
    if (i > 0) {
      if constexpr (kRole < 2) wgmma_wait<1>();
      else wgmma_wait<0>();
      if (lane == 0) barrier_arrive(empty + 8 * (s ^ 1));
    }

    float2 per_query[4] = {};
    if constexpr (kKeys && kRole < 2) {
      const float* from = (kRole == 0 ? p.lse : p.delta) + job.stream_row + static_cast<int64_t>(tile) * kStreamRows + pair;
#pragma unroll
      for (int j = 0; j < 4; ++j) per_query[j] = *reinterpret_cast<const float2*>(from + 8 * j);
    }

    if constexpr (kRole == 0) {
      wgmma_wait<0>();
      settle(score);
      bool all;  // whether every query here sees every key
      if constexpr (kKeys) all = tile / tiles_per_token >= job.held0 + kHeldRows - 1;
      else all = token[0] >= (tile + 1) * kStreamRows - 1;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          float w[2];
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float lse = kKeys ? (e == 0 ? per_query[j].x : per_query[j].y) * kLog2E : held_lse[h];
            w[e] = exp2_fast(__fmaf_rn(score[4 * j + 2 * h + e], scale2, -lse));
            if (!all) {
              const bool seen = kKeys ? job.held0 + row + 8 * h <= tile / tiles_per_token
                                      : tile * kStreamRows + 8 * j + pair + e <= token[h];
              w[e] = seen ? w[e] : 0.0f;
            }
          }
          store_shared(weights + own + h * 1024 + piece(j), pack(w[0], w[1]));
        }
      }
      fence_async();
    }
    if constexpr (kRole == 2 && !kKeys) {
      // Keys past the sequence have no weight, and must not be NaN.
      const int past = (tile + 1) * kStreamRows - job.count;
      if (past > 0) {
        const int first = kStreamRows - past;
        for (int at = thread; at < past * kChunks * 32; at += 128) {
          const int r = first + at / (kChunks * 32), x = at % (kChunks * 32);
          store_shared(stage + x / 32 * kStreamChunk + r * 128 + x % 32 * 4, 0);
        }
        fence_async();
      }
    }
    named_barrier(1, kConsumers);

    if constexpr (kKeys) {
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const uint64_t a = operand(weights) + k * kOperandStep;
        const uint64_t b = turned_operand(stage + L::kStreamValues + kRole * 3 * kStreamChunk, kStreamChunk) + k * kTurnedStep;
        if constexpr (kRole < 2) wgmma_turned_192(acc, a, b);
        else wgmma_turned_128(acc, a, b);
      }
      wgmma_commit();
    }
    if constexpr (kRole == 1) {
      wgmma_wait<kKeys ? 1 : 0>();
      settle(score);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const uint32_t w = load_shared(weights + own + h * 1024 + piece(j));
          const float w0 = __uint_as_float(w << 16), w1 = __uint_as_float(w & 0xffff0000u);
          const float d0 = kKeys ? per_query[j].x : held_delta[h], d1 = kKeys ? per_query[j].y : held_delta[h];
          // A weight of zero stays zero: what it multiplies may be no number where there is no row.
          const float x = w0 == 0.0f ? 0.0f : p.scale * (w0 * (score[4 * j + 2 * h] - d0));
          const float y = w1 == 0.0f ? 0.0f : p.scale * (w1 * (score[4 * j + 2 * h + 1] - d1));
          store_shared(weights + own + h * 1024 + piece(4 + j), pack(x, y));
        }
      }
      fence_async();
    }
    named_barrier(2, kConsumers);

    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 2; ++k)
      wgmma_turned_192(acc, operand(weights) + (2 + k) * kOperandStep,
                       turned_operand(stage + kRole * 3 * kStreamChunk, kStreamChunk) + k * kTurnedStep);
    wgmma_commit();
  }
  wgmma_wait<0>();
  settle(acc);

#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int at = job.held0 + row + 8 * h;
    if (at >= (kKeys ? job.count : job.count * p.heads)) continue;
    const int64_t to = (job.held_row + row + 8 * h) * kWidth + kRole * 192 + pair;
#pragma unroll
    for (int j = 0; j < 24; ++j) {
      const float x = acc[4 * j + 2 * h], y = acc[4 * j + 2 * h + 1];
      if constexpr (kKeys) *reinterpret_cast<float2*>(job.dc + to + 8 * j) = make_float2(x, y);
      else *reinterpret_cast<uint32_t*>(p.dq + to + 8 * j) = pack(x, y);
    }
  }
}

template <bool kKeys>
__device__ __forceinline__ void produce(const Params& p, const Job& job, uint32_t base) {
  using L = Layout<kKeys>;
  using namespace hopper;
  const uint32_t held = base + L::kBarriers, full = held + 8, empty = full + 16;
  barrier_arrive_expect(held, L::kHeldBytes);
  tensor_load(base, &p.held, 0, static_cast<int>(job.held_row), 0, held);
  if constexpr (!kKeys) tensor_load(base + L::kHeldValues, &p.held_values, 0, static_cast<int>(job.held_row), 0, held);
  for (int tile = job.first; tile < job.end; ++tile) {
    const int i = tile - job.first, s = i & 1;
    if (i >= 2) barrier_wait(empty + 8 * s, ((i >> 1) - 1) & 1);
    const uint32_t stage = base + L::kStage + s * L::kStageBytes;
    const int row = static_cast<int>(job.stream_row) + tile * kStreamRows;
    barrier_arrive_expect(full + 8 * s, L::kStageBytes);
    tensor_load(stage, &p.stream, 0, row, 0, full + 8 * s);
    if constexpr (kKeys) tensor_load(stage + L::kStreamValues, &p.stream_values, 0, row, 0, full + 8 * s);
  }
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

template <bool kKeys>
__global__ void __launch_bounds__(kThreads, 1) backward(const __grid_constant__ Params params) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using L = Layout<kKeys>;
  extern __shared__ uint8_t memory[];
  const uint32_t base = (hopper::shared_address(memory) + 1023) / 1024 * 1024;
  const DeviceSlice slice = params.slices[kKeys ? blockIdx.z : blockIdx.y];
  const int tiles_per_token = params.heads / kStreamRows;
  Job job;
  job.count = slice.count;
  if constexpr (kKeys) {
    // Spans of later queries first: they have the most blocks of keys.
    const int span = static_cast<int>(gridDim.y - 1 - blockIdx.y), first_token = span * params.span;
    job.held0 = static_cast<int>(blockIdx.x) * kHeldRows;
    job.held_row = static_cast<int64_t>(slice.begin) + job.held0;
    job.stream_row = static_cast<int64_t>(slice.begin) * params.heads;
    const int begin = first_token > job.held0 ? first_token : job.held0;
    const int end = first_token + params.span < slice.count ? first_token + params.span : slice.count;
    if (begin >= end) return;
    job.first = begin * tiles_per_token;
    job.end = end * tiles_per_token;
  } else {
    job.held0 = static_cast<int>(gridDim.x - 1 - blockIdx.x) * kHeldRows;
    if (job.held0 >= slice.count * params.heads) return;
    job.held_row = static_cast<int64_t>(slice.begin) * params.heads + job.held0;
    job.stream_row = slice.begin;
    const int last = (job.held0 + kHeldRows - 1) / params.heads;
    job.first = 0;
    job.end = (last < slice.count ? last : slice.count - 1) / kStreamRows + 1;
  }

  if (threadIdx.x == 0) {
    const uint32_t held = base + L::kBarriers;
    hopper::barrier_init(held, 1);
    for (int s = 0; s < 2; ++s) {
      hopper::barrier_init(held + 8 + 8 * s, 1);
      hopper::barrier_init(held + 24 + 8 * s, kConsumers / 32);
    }
    hopper::fence_barrier_init();
  }
  __syncthreads();
  job.dc = kKeys ? params.dc + static_cast<int64_t>(gridDim.y - 1 - blockIdx.y) * params.rows * kWidth : nullptr;
  const int role = static_cast<int>(threadIdx.x) / 128;
  if (role == 3) {
    hopper::give_registers<32>();
    if (threadIdx.x == kConsumers) produce<kKeys>(params, job, base);
  } else {
    hopper::take_registers<160>();
    if (role == 0) consume<kKeys, 0>(params, job, base);
    else if (role == 1) consume<kKeys, 1>(params, job, base);
    else consume<kKeys, 2>(params, job, base);
  }
#endif
}

// delta = dout . out, a warp to a query.
__global__ void __launch_bounds__(256) dot_rows(int64_t queries, const bf16* dout, const bf16* out, float* delta) {
  const int64_t query = static_cast<int64_t>(blockIdx.x) * 8 + threadIdx.x / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (query >= queries) return;
  const uint4* const a = reinterpret_cast<const uint4*>(dout + query * kLatent);
  const uint4* const b = reinterpret_cast<const uint4*>(out + query * kLatent);
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint4 x = a[32 * i + lane], y = b[32 * i + lane];
    const uint32_t xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      sum = __fmaf_rn(__uint_as_float(xs[j] << 16), __uint_as_float(ys[j] << 16), sum);
      sum = __fmaf_rn(__uint_as_float(xs[j] & 0xffff0000u), __uint_as_float(ys[j] & 0xffff0000u), sum);
    }
  }
#pragma unroll
  for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, d);
  if (lane == 0) delta[query] = sum;
}

// dc = the spans that have queries for the key's block, in ascending order.
__global__ void __launch_bounds__(144) add_spans(const DeviceSlice* slices, int64_t rows, int span, const float4* parts,
                                                 float4* dc) {
  const DeviceSlice slice = slices[blockIdx.y];
  const int key = static_cast<int>(blockIdx.x);
  if (key >= slice.count) return;
  const int64_t at = (static_cast<int64_t>(slice.begin) + key) * (kWidth / 4) + threadIdx.x;
  const int first = key / kHeldRows * kHeldRows / span, last = (slice.count - 1) / span;
  float4 sum = parts[first * rows * (kWidth / 4) + at];
  for (int i = first + 1; i <= last; ++i) {
    const float4 x = parts[i * rows * (kWidth / 4) + at];
    sum = make_float4(sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w);
  }
  dc[at] = sum;
}

// For shapes that the kernel above does not take.
__global__ void __launch_bounds__(256) widen(int64_t n, const bf16* x, float* y) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
  if (i < n) y[i] = to_float(x[i]);
}
// The slices' rows of `row` values each.
__global__ void __launch_bounds__(256) narrow(const DeviceSlice* slices, int64_t row, const float* x, bf16* y) {
  const DeviceSlice slice = slices[blockIdx.y];
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x, at = slice.begin * row + i;
  if (i < slice.count * row) y[at] = from_float<bf16>(x[at]);
}

// Queries of a span: long enough that a block's start does not matter, short enough for four pieces.
int span_of(int64_t max_count) {
  const int64_t quarter = ((max_count + 3) / 4 + kHeldRows - 1) / kHeldRows * kHeldRows;
  return static_cast<int>(quarter < 512 ? 512 : quarter);
}

using EncodeFunction = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                    const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                    CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
// The driver's function that describes a matrix to the copy engine; the runtime finds it, so nothing links to the driver.
EncodeFunction encode_function() {
  static const EncodeFunction function = [] {
    void* f = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    PERIGEE_CUDA(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault, &found));
#else
    PERIGEE_CUDA(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &f, cudaEnableDefault, &found));
#endif
    PERIGEE_CHECK(found == cudaDriverEntryPointSuccess && f != nullptr);
    return reinterpret_cast<EncodeFunction>(f);
  }();
  return function;
}

// x [rows, 64 chunks] in boxes of `box_rows` whole rows, which arrive chunk after chunk of 64 columns.
CUtensorMap describe(const bf16* x, int64_t rows, int chunks, int box_rows) {
  CUtensorMap map;
  const cuuint64_t sizes[3] = {64, static_cast<cuuint64_t>(rows), static_cast<cuuint64_t>(chunks)};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(chunks) * 128, 128};
  const cuuint32_t box[3] = {64, static_cast<cuuint32_t>(box_rows), static_cast<cuuint32_t>(chunks)}, ones[3] = {1, 1, 1};
  const CUresult result = encode_function()(
      &map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, const_cast<bf16*>(x), sizes, strides, box, ones,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  PERIGEE_CHECK(result == CUDA_SUCCESS);
  return map;
}

bool on_tensor_cores(const MlaShape& shape) {
  return shape.latent == kLatent && shape.width() == kWidth && shape.heads % kStreamRows == 0;
}

int64_t scratch_bytes(const MlaShape& shape, int64_t rows, int64_t max_count) {
  if (!on_tensor_cores(shape))
    return rows * 4 * (shape.width() + shape.heads * 2 * (shape.width() + shape.latent)) + 5 * 1024 +
           mla_backward_scratch_bytes<float>(shape, rows, max_count);
  const int64_t spans = (max_count + span_of(max_count) - 1) / span_of(max_count);
  return rows * shape.heads * 4 + (spans > 1 ? spans * rows * kWidth * 4 : 0) + 2 * 1024;
}

void backward_widened(Device& device, const MlaShape& shape, const bf16* q, const bf16* c, const DeviceBatch& batch,
                      const bf16* out, const float* lse, const bf16* dout, bf16* dq, float* dc) {
  DeviceScratch::Mark mark(device.scratch);
  const int64_t rows = batch.rows, wide = rows * shape.heads * shape.width(), values = rows * shape.heads * shape.latent;
  const auto widened = [&](const bf16* x, int64_t n) {
    float* const y = device.scratch.take<float>(n);
    widen<<<blocks_for(n, 256), 256, 0, device.stream()>>>(n, x, y);
    PERIGEE_LAUNCHED();
    return y;
  };
  const float* const wide_q = widened(q, wide);
  const float* const wide_c = widened(c, rows * shape.width());
  const float* const wide_out = widened(out, values);
  const float* const wide_dout = widened(dout, values);
  float* const wide_dq = device.scratch.take<float>(wide);
  mla_backward<float>(device, shape, wide_q, wide_c, batch, wide_out, lse, wide_dout, wide_dq, dc);
  const int64_t row = shape.heads * shape.width();
  const dim3 grid(blocks_for(batch.max_count * row, 256), static_cast<unsigned>(batch.slices));
  narrow<<<grid, 256, 0, device.stream()>>>(batch.slice, row, wide_dq, dq);
  PERIGEE_LAUNCHED();
}

void backward_on_tensor_cores(Device& device, const MlaShape& shape, const bf16* q, const bf16* c,
                              const DeviceBatch& batch, const bf16* out, const float* lse, const bf16* dout, bf16* dq,
                              float* dc) {
  const int64_t rows = batch.rows, queries = rows * shape.heads;
  const int span = span_of(batch.max_count);
  const unsigned spans = blocks_for(batch.max_count, span), slices = static_cast<unsigned>(batch.slices);
  DeviceScratch::Mark mark(device.scratch);
  float* const delta = device.scratch.take<float>(queries);
  float* const parts = spans > 1 ? device.scratch.take<float>(spans * rows * kWidth) : dc;
  dot_rows<<<blocks_for(queries, 8), 256, 0, device.stream()>>>(queries, dout, out, delta);
  PERIGEE_LAUNCHED();

  Params p{};
  p.slices = batch.slice;
  p.lse = lse;
  p.delta = delta;
  p.rows = rows;
  p.heads = static_cast<int>(shape.heads);
  p.span = span;
  p.scale = shape.scale;

  p.dc = parts;
  p.held = describe(c, rows, kChunks, kHeldRows);
  p.stream = describe(q, queries, kChunks, kStreamRows);
  p.stream_values = describe(dout, queries, kValueChunks, kStreamRows);
  allow_shared_memory(backward<true>, Layout<true>::kBytes);
  const dim3 keys(blocks_for(batch.max_count, kHeldRows), spans, slices);
  backward<true><<<keys, kThreads, Layout<true>::kBytes, device.stream()>>>(p);
  PERIGEE_LAUNCHED();
  if (spans > 1) {
    add_spans<<<dim3(static_cast<unsigned>(batch.max_count), slices), 144, 0, device.stream()>>>(
        batch.slice, rows, span, reinterpret_cast<const float4*>(parts), reinterpret_cast<float4*>(dc));
    PERIGEE_LAUNCHED();
  }

  p.dq = dq;
  p.held = describe(q, queries, kChunks, kHeldRows);
  p.held_values = describe(dout, queries, kValueChunks, kHeldRows);
  p.stream = describe(c, rows, kChunks, kStreamRows);
  allow_shared_memory(backward<false>, Layout<false>::kBytes);
  const dim3 tiles(blocks_for(batch.max_count * shape.heads, kHeldRows), slices);
  backward<false><<<tiles, kThreads, Layout<false>::kBytes, device.stream()>>>(p);
  PERIGEE_LAUNCHED();
}

}  // namespace
}  // namespace mla_grad

template <>
int64_t mla_backward_scratch_bytes<bf16>(const MlaShape& shape, int64_t rows, int64_t max_count) {
  return mla_grad::scratch_bytes(shape, rows, max_count);
}

template <>
void mla_backward<bf16>(Device& device, const MlaShape& shape, const bf16* q, const bf16* c, const DeviceBatch& batch,
                        const bf16* out, const float* lse, const bf16* dout, bf16* dq, float* dc) {
  PERIGEE_CHECK(shape.heads > 0 && shape.latent > 0 && shape.rope >= 0, "shape of attention");
  if (batch.slices == 0 || batch.max_count == 0) return;
  const auto backward = mla_grad::on_tensor_cores(shape) ? mla_grad::backward_on_tensor_cores : mla_grad::backward_widened;
  backward(device, shape, q, c, batch, out, lse, dout, dq, dc);
}

}  // namespace perigee::kernels
