// Attention over latent rows, backwards, in bfloat16: the host's side and the small kernels around the two passes of
// mla_backward_bf16_pass.cuh.
#include "kernels/gemm/tensor_map.h"
#include "kernels/mla/mla_backward_bf16_pass.cuh"

namespace perigee::kernels {
namespace mla_grad {
namespace {

// delta = dout . out, a warp to a query.
template <int V>
__global__ void __launch_bounds__(256)
    dot_rows(int64_t queries, const bf16* dout, const bf16* out, float* delta) {
  const int64_t query = static_cast<int64_t>(blockIdx.x) * 8 + threadIdx.x / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (query >= queries) return;
  const uint4* const a = reinterpret_cast<const uint4*>(dout + query * 64 * V);
  const uint4* const b = reinterpret_cast<const uint4*>(out + query * 64 * V);
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < V / 4; ++i) {
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
template <int V>
__global__ void __launch_bounds__(16 * (V + 1))
    add_spans(const DeviceSlice* slices, int64_t rows, int span, const float4* parts, float4* dc) {
  const DeviceSlice slice = slices[blockIdx.y];
  const int key = static_cast<int>(blockIdx.x);
  if (key >= slice.count) return;
  constexpr int kPieces = 16 * (V + 1);
  const int64_t at = (static_cast<int64_t>(slice.begin) + key) * kPieces + threadIdx.x;
  const int first = key / kHeldRows * kHeldRows / span, last = (slice.count - 1) / span;
  float4 sum = parts[first * rows * kPieces + at];
  for (int i = first + 1; i <= last; ++i) {
    const float4 x = parts[i * rows * kPieces + at];
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

bool on_tensor_cores(const Device& device, const MlaShape& shape) {
  return device.info().capability == 90 && (shape.latent == 512 || shape.latent == 256) &&
         shape.rope == kKeyColumns && shape.heads % 2 == 0;
}

int64_t scratch_bytes(const Device& device, const MlaShape& shape, int64_t rows, int64_t max_count) {
  if (!on_tensor_cores(device, shape))
    return rows * 4 * (shape.width() + shape.heads * 2 * (shape.width() + shape.latent)) + 5 * 1024 +
           mla_backward_scratch_bytes<float>(device, shape, rows, max_count);
  const int64_t spans = (max_count + span_of(max_count) - 1) / span_of(max_count);
  return rows * shape.heads * 4 + (spans > 1 ? spans * rows * shape.width() * 4 : 0) + 2 * 1024;
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

template <int V>
void backward_on_tensor_cores(Device& device, const MlaShape& shape, const bf16* q, const bf16* c,
                              const DeviceBatch& batch, const bf16* out, const float* lse, const bf16* dout,
                              bf16* dq, float* dc) {
  constexpr int kChunks = V + 1;
  const int64_t rows = batch.rows, queries = rows * shape.heads;
  const int span = span_of(batch.max_count);
  const unsigned spans = blocks_for(batch.max_count, span), slices = static_cast<unsigned>(batch.slices);
  DeviceScratch::Mark mark(device.scratch);
  float* const delta = device.scratch.take<float>(queries);
  float* const parts = spans > 1 ? device.scratch.take<float>(spans * rows * shape.width()) : dc;
  dot_rows<V><<<blocks_for(queries, 8), 256, 0, device.stream()>>>(queries, dout, out, delta);
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
  p.held = describe_chunks(c, rows, kChunks, kHeldRows, kChunks);
  p.stream = describe_chunks(q, queries, kChunks, kStreamRows, 1);
  p.stream_values = describe_chunks(dout, queries, V, kStreamRows, 1);
  allow_shared_memory(backward<true, V>, Layout<true, V>::kBytes);
  const dim3 keys(blocks_for(batch.max_count, kHeldRows), spans, slices);
  backward<true, V><<<keys, kThreads, Layout<true, V>::kBytes, device.stream()>>>(p);
  PERIGEE_LAUNCHED();
  if (spans > 1) {
    add_spans<V><<<dim3(static_cast<unsigned>(batch.max_count), slices), 16 * (V + 1), 0, device.stream()>>>(
        batch.slice, rows, span, reinterpret_cast<const float4*>(parts), reinterpret_cast<float4*>(dc));
    PERIGEE_LAUNCHED();
  }

  p.dq = dq;
  p.held = describe_chunks(q, queries, kChunks, kHeldRows, kChunks);
  p.held_values = describe_chunks(dout, queries, V, kHeldRows, V);
  p.stream = describe_chunks(c, rows, kChunks, kStreamRows, kChunks);
  allow_shared_memory(backward<false, V>, Layout<false, V>::kBytes);
  const dim3 tiles(blocks_for(batch.max_count * shape.heads, kHeldRows), slices);
  backward<false, V><<<tiles, kThreads, Layout<false, V>::kBytes, device.stream()>>>(p);
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
  const auto backward = !mla_grad::on_tensor_cores(device, shape) ? mla_grad::backward_widened
                        : shape.latent == 512                     ? mla_grad::backward_on_tensor_cores<8>
                                                                  : mla_grad::backward_on_tensor_cores<4>;
  backward(device, shape, q, c, batch, out, lse, dout, dq, dc);
}

}  // namespace perigee::kernels
