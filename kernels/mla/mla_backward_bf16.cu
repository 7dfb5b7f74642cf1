// Attention over latent rows, backwards, in bfloat16: the host's side and the small kernels around the two passes of
// mla_backward_bf16_pass.cuh.
#include "kernels/mla/mla_backward_bf16_pass.cuh"

namespace perigee::kernels {
namespace mla_grad {
namespace {

// delta = dout . out, a warp to a query.
__global__ void __launch_bounds__(256)
    dot_rows(int64_t queries, const bf16* dout, const bf16* out, float* delta) {
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
__global__ void __launch_bounds__(144)
    add_spans(const DeviceSlice* slices, int64_t rows, int span, const float4* parts, float4* dc) {
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
__global__ void __launch_bounds__(256)
    narrow(const DeviceSlice* slices, int64_t row, const float* x, bf16* y) {
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
                                    const cuuint64_t*, const cuuint32_t*, const cuuint32_t*,
                                    CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                                    CUtensorMapFloatOOBfill);
// The driver's function that describes a matrix to the copy engine; the runtime finds it, so nothing links to the driver.
EncodeFunction encode_function() {
  static const EncodeFunction function = [] {
    void* f = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    PERIGEE_CUDA(
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault, &found));
#else
    PERIGEE_CUDA(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &f, cudaEnableDefault, &found));
#endif
    PERIGEE_CHECK(found == cudaDriverEntryPointSuccess && f != nullptr);
    return reinterpret_cast<EncodeFunction>(f);
  }();
  return function;
}

// x [rows, 64 chunks] in boxes of `box_chunks` chunks of 64 columns, which arrive one after the other.
CUtensorMap describe(const bf16* x, int64_t rows, int chunks, int box_rows, int box_chunks) {
  CUtensorMap map;
  const cuuint64_t sizes[3] = {64, static_cast<cuuint64_t>(rows), static_cast<cuuint64_t>(chunks)};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(chunks) * 128, 128};
  const cuuint32_t box[3] = {64, static_cast<cuuint32_t>(box_rows), static_cast<cuuint32_t>(box_chunks)},
                   ones[3] = {1, 1, 1};
  const CUresult result =
      encode_function()(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, const_cast<bf16*>(x), sizes, strides, box,
                        ones, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  PERIGEE_CHECK(result == CUDA_SUCCESS);
  return map;
}

bool on_tensor_cores(const Device& device, const MlaShape& shape) {
  return device.info().capability == 90 && shape.latent == kLatent && shape.width() == kWidth &&
         shape.heads % kStreamRows == 0;
}

int64_t scratch_bytes(const Device& device, const MlaShape& shape, int64_t rows, int64_t max_count) {
  if (!on_tensor_cores(device, shape))
    return rows * 4 * (shape.width() + shape.heads * 2 * (shape.width() + shape.latent)) + 5 * 1024 +
           mla_backward_scratch_bytes<float>(device, shape, rows, max_count);
  const int64_t spans = (max_count + span_of(max_count) - 1) / span_of(max_count);
  return rows * shape.heads * 4 + (spans > 1 ? spans * rows * kWidth * 4 : 0) + 2 * 1024;
}

void backward_widened(Device& device, const MlaShape& shape, const bf16* q, const bf16* c,
                      const DeviceBatch& batch, const bf16* out, const float* lse, const bf16* dout, bf16* dq,
                      float* dc) {
  DeviceScratch::Mark mark(device.scratch);
  const int64_t rows = batch.rows, wide = rows * shape.heads * shape.width(),
                values = rows * shape.heads * shape.latent;
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
                              const DeviceBatch& batch, const bf16* out, const float* lse, const bf16* dout,
                              bf16* dq, float* dc) {
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
  p.held = describe(c, rows, kChunks, kHeldRows, kChunks);
  p.stream = describe(q, queries, kChunks, kStreamRows, 1);
  p.stream_values = describe(dout, queries, kValueChunks, kStreamRows, 1);
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
  p.held = describe(q, queries, kChunks, kHeldRows, kChunks);
  p.held_values = describe(dout, queries, kValueChunks, kHeldRows, kValueChunks);
  p.stream = describe(c, rows, kChunks, kStreamRows, kChunks);
  allow_shared_memory(backward<false>, Layout<false>::kBytes);
  const dim3 tiles(blocks_for(batch.max_count * shape.heads, kHeldRows), slices);
  backward<false><<<tiles, kThreads, Layout<false>::kBytes, device.stream()>>>(p);
  PERIGEE_LAUNCHED();
}

}  // namespace
}  // namespace mla_grad

template <>
int64_t mla_backward_scratch_bytes<bf16>(const Device& device, const MlaShape& shape, int64_t rows,
                                         int64_t max_count) {
  return mla_grad::scratch_bytes(device, shape, rows, max_count);
}

template <>
void mla_backward<bf16>(Device& device, const MlaShape& shape, const bf16* q, const bf16* c,
                        const DeviceBatch& batch, const bf16* out, const float* lse, const bf16* dout,
                        bf16* dq, float* dc) {
  PERIGEE_CHECK(shape.heads > 0 && shape.latent > 0 && shape.rope >= 0, "shape of attention");
  if (batch.slices == 0 || batch.max_count == 0) return;
  const auto backward = mla_grad::on_tensor_cores(device, shape) ? mla_grad::backward_on_tensor_cores
                                                                 : mla_grad::backward_widened;
  backward(device, shape, q, c, batch, out, lse, dout, dq, dc);
}

}  // namespace perigee::kernels
