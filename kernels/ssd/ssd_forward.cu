// ssd_forward: the CPU's chains of operations (kernels/ssd/forward.cpp) over float and over widened bf16. The columns of S
// do not meet, so a block takes kColumns of them for one head of one slice and goes through the chunks with its part of S
// in shared memory; a warp takes four rows of a chunk, a thread of it one column.
#include "kernels/ssd/ssd_chunk.cuh"

namespace perigee::kernels {
namespace {

using namespace ssd_device;

constexpr int kThreads = 128, kColumns = 32, kRows = 4;  // rows of a warp
static_assert(kThreads / 32 * kRows == kChunk);

template <class T>
struct Operands {
  const T *q, *k, *v;
  const float* g;
  T *out, *chunk_states;
};

// Where the parts of one head lie in a sequence's state.
struct HeadState {
  float *s, *k, *v, *decay;
  __device__ HeadState(std::byte* memory, const Shape& shape, int head) {
    float* state = reinterpret_cast<float*>(memory);
    const int64_t h = shape.heads, dk = shape.dk, dv = shape.dv;
    s = state + head * dk * dv;
    k = state + h * dk * dv + head * dk * kChunk;
    v = state + h * dk * (dv + kChunk) + static_cast<int64_t>(head) * kChunk * dv;
    decay = state + h * (dk * dv + kChunk * (dk + dv)) + head * kChunk;
  }
};

int shared_floats(int dk) {
  return dk * (kColumns + 2 * kLine) + 2 * 256 + kChunk;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(Shape shape, Operands<T> o, DeviceBatch batch, int64_t state_offset) {
  extern __shared__ float4 aligned[];
  const int slice_index = blockIdx.y, dk = shape.dk, dv = shape.dv;
  const int blocks = (dv + kColumns - 1) / kColumns, head = blockIdx.x / blocks;
  const DeviceSlice slice = batch.slice[slice_index];
  if (slice.count == 0) return;
  float* s = reinterpret_cast<float*>(aligned);  // [dk, kColumns]
  float* queries = s + dk * kColumns;            // [dk, kLine]
  float* keys = queries + dk * kLine;            // [dk, kLine]
  float* since = keys + dk * kLine;              // [16, 16]
  float* weights = since + 256;                  // [16, 16]
  float* gamma = weights + 256;                  // [16]
  const int c = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int column = static_cast<int>(blockIdx.x) % blocks * kColumns + c;
  const bool inside = column < dv, training = batch.recurrent == nullptr;
  const HeadState state(training ? nullptr : batch.recurrent[slice_index] + state_offset, shape, head);
  const int64_t ldk = static_cast<int64_t>(shape.heads) * dk, ldv = static_cast<int64_t>(shape.heads) * dv;
  int64_t slot = kda_chunk_slot(slice.begin, slice_index, 0);

  int filled = slice.position % kChunk;
  const int column0 = column - c;
  if (!training && dv % 4 == 0) {  // all parts of the state are aligned
    for (int i = threadIdx.x; i < dk * (kColumns / 4); i += kThreads) {
      const int x = i / (kColumns / 4), at = i % (kColumns / 4) * 4;
      if (column0 + at < dv)
        fetch(s + x * kColumns + at, state.s + static_cast<int64_t>(x) * dv + column0 + at);
    }
    if (filled != 0)
      for (int i = threadIdx.x; i < dk * (kChunk / 4); i += kThreads)
        fetch(keys + i / (kChunk / 4) * kLine + i % (kChunk / 4) * 4, state.k + 4 * i);
  } else {
    for (int x = warp; x < dk; x += kThreads / 32)
      s[x * kColumns + c] = training || !inside ? 0.0f : state.s[static_cast<int64_t>(x) * dv + column];
    if (filled != 0)
      for (int i = threadIdx.x; i < dk * kChunk; i += kThreads)
        keys[i / kChunk * kLine + i % kChunk] = state.k[i];
  }
  float v[kChunk];  // of this column
#pragma unroll
  for (int j = 0; j < kChunk; ++j)
    v[j] = j < filled && inside ? state.v[static_cast<int64_t>(j) * dv + column] : 0.0f;
  all_arrived();

  bool changed = false;
  for (int done = 0; done < slice.count;) {
    const int64_t row = slice.begin + done;
    const int n = min(kChunk - filled, slice.count - done);
    __syncthreads();
    if (o.chunk_states != nullptr) {
      T* to = o.chunk_states + (slot++ * shape.heads + head) * dk * dv + column;
      if (inside)
#pragma unroll 8
        for (int x = warp; x < dk; x += kThreads / 32)
          to[static_cast<int64_t>(x) * dv] = from_float<T>(s[x * kColumns + c]);
    }
    const int64_t at_k = row * ldk + static_cast<int64_t>(head) * dk,
                  at_v = row * ldv + static_cast<int64_t>(head) * dv;
    const float logarithm = o.g[(row + min(static_cast<int>(threadIdx.x), n - 1)) * shape.heads + head];
    // The values of bf16 are read before the first is widened.
    T value[kChunk];
#pragma unroll
    for (int j = 0; j < kChunk; ++j)
      if (j >= filled && j < filled + n && inside) value[j] = o.v[at_v + (j - filled) * ldv + column];
    columns_of<kThreads>(0, n, dk, ldk, o.q + at_k, queries, o.k + at_k, keys, filled);
#pragma unroll
    for (int j = 0; j < kChunk; ++j)
      if (j >= filled && j < filled + n && inside) v[j] = to_float(value[j]);
    if (threadIdx.x < kChunk) {
      const float lane = filled != 0 ? state.decay[threadIdx.x] : 1.0f;
      const float kept = filled != 0 ? lane : 0.0f, gamma_kept = __shfl_sync(0xffffu, lane, kChunk - 1);
      decays_of(filled, n, math::exp(logarithm), threadIdx.x < kChunk - 1 ? kept : 0.0f, gamma_kept, since,
                gamma);
    }
    __syncthreads();

    float sum[kRows] = {};
    if (warp * kRows < n) {
#pragma unroll 8
      for (int x = 0; x < dk; ++x) {
        float q[kRows];
        read(queries + x * kLine + warp * kRows, q);
        const float s_x = s[x * kColumns + c];
#pragma unroll
        for (int r = 0; r < kRows; ++r) sum[r] = math::fma(q[r], s_x, sum[r]);
      }
    }
    if (threadIdx.x < 64 && threadIdx.x / 8 * 2 < n) {
      float p[2][2];
      scores_of(threadIdx.x, dk, queries, keys, p);
      const int at = threadIdx.x / 8 * 32 + threadIdx.x % 8 * 2;
      for (int i = 0; i < 2; ++i)
        for (int j = 0; j < 2; ++j) weights[at + 16 * i + j] = since[at + 16 * i + j] * p[i][j];
    }
    __syncthreads();
    const bool closes = filled + n == kChunk;
    if (closes)  // K decayed to the end of the chunk
      for (int x = threadIdx.x; x < dk; x += kThreads) {
        float k[kChunk], left[kChunk];
        read(keys + x * kLine, k);
        read(since + 16 * (n - 1), left);
#pragma unroll
        for (int j = 0; j < kChunk; ++j) keys[x * kLine + j] = left[j] * k[j];
      }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int i = warp * kRows + r;
      if (i >= n) break;
      float out = gamma[i] * sum[r], w[kChunk];
      read(weights + 16 * i, w);
#pragma unroll
      for (int j = 0; j < kChunk; ++j)
        if (j <= filled + i) out = math::fma(w[j], v[j], out);
      if (inside) o.out[at_v + i * ldv + column] = from_float<T>(out);
    }
    done += n;
    filled += n;
    if (closes) {
      __syncthreads();
      const float left = gamma[n - 1];
#pragma unroll 4
      for (int x = warp; x < dk; x += kThreads / 32) {
        float k[kChunk];
        read(keys + x * kLine, k);
        float t = left * s[x * kColumns + c];
#pragma unroll
        for (int j = 0; j < kChunk; ++j) t = math::fma(k[j], v[j], t);
        s[x * kColumns + c] = t;
      }
      changed = true;
      filled = 0;
    }
  }
  if (training || !inside) return;
  if (changed) {  // a thread wrote the same part of S that it stores
    for (int x = warp; x < dk; x += kThreads / 32)
      state.s[static_cast<int64_t>(x) * dv + column] = s[x * kColumns + c];
  }
#pragma unroll
  for (int j = 0; j < kChunk; ++j)
    if (j / kRows == warp) state.v[static_cast<int64_t>(j) * dv + column] = j < filled ? v[j] : 0.0f;
}

// The keys and decays as the slice leaves them. A kernel of its own, after the blocks of columns have all read the old ones.
template <class T>
__global__ void __launch_bounds__(kThreads)
    close_kernel(Shape shape, const T* k, const float* g, DeviceBatch batch, int64_t state_offset) {
  const int head = blockIdx.x, dk = shape.dk;
  const DeviceSlice slice = batch.slice[blockIdx.y];
  if (slice.count == 0) return;
  const HeadState state(batch.recurrent[blockIdx.y] + state_offset, shape, head);
  const int filled = (slice.position + slice.count) % kChunk;
  if (filled == 0) {
    for (int i = threadIdx.x; i < dk * kChunk; i += kThreads) state.k[i] = 0.0f;
    if (threadIdx.x < kChunk) state.decay[threadIdx.x] = 0.0f;
    return;
  }
  // The rows of the slice that lie in the chunk it leaves open.
  const int n = min(filled, slice.count), first = filled - n;
  const int64_t ld = static_cast<int64_t>(shape.heads) * dk,
                row = static_cast<int64_t>(slice.begin) + slice.count - n;
  for (int i = threadIdx.x; i < dk * kChunk; i += kThreads) {
    const int x = i / kChunk, j = i % kChunk;
    if (j >= first && j < filled)
      state.k[i] = to_float(k[(row + j - first) * ld + static_cast<int64_t>(head) * dk + x]);
    else if (first == 0)
      state.k[i] = 0.0f;
  }
  if (threadIdx.x < kChunk) {
    const int lane = threadIdx.x;
    // Lanes 0 .. 14 are L_j, the last is Gamma; neither the zeros of rows to come nor a 1 changes Gamma.
    float value = first == 0 ? (lane == kChunk - 1 ? 1.0f : 0.0f) : state.decay[lane];
    for (int i = 0; i < n; ++i) {
      value = value * math::exp(g[(row + i) * shape.heads + head]);
      if (lane == first + i) value = value + 1.0f;
    }
    state.decay[lane] = value;
  }
}

}  // namespace

template <class T>
int64_t ssd_state_bytes(const SsdShape& shape) {
  const int64_t floats = shape.heads * (shape.dk * shape.dv + kKdaChunk * (shape.dk + shape.dv + 1));
  return (floats * static_cast<int64_t>(sizeof(float)) + 255) / 256 * 256;
}
template int64_t ssd_state_bytes<float>(const SsdShape&);
template int64_t ssd_state_bytes<bf16>(const SsdShape&);

template <class T>
void ssd_forward(Device& dev, const SsdShape& shape, const T* q, const T* k, const T* v, const float* g,
                 const DeviceBatch& batch, int64_t state_offset, T* out, T* chunk_states) {
  PERIGEE_CHECK(shape.heads > 0 && shape.dk > 0 && shape.dv > 0);
  PERIGEE_CHECK(chunk_states == nullptr || batch.training());
  if (batch.rows == 0 || batch.slices == 0 || batch.max_count == 0) return;
  const Shape s{static_cast<int>(shape.heads), static_cast<int>(shape.dk), static_cast<int>(shape.dv)};
  const int bytes = shared_floats(s.dk) * static_cast<int>(sizeof(float));
  PERIGEE_CHECK(bytes <= 227 * 1024);
  allow_shared_memory(forward_kernel<T>, bytes);
  const unsigned slices = static_cast<unsigned>(batch.slices);
  const dim3 grid(blocks_for(s.dv, kColumns) * static_cast<unsigned>(s.heads), slices);
  forward_kernel<T>
      <<<grid, kThreads, bytes, dev.stream()>>>(s, {q, k, v, g, out, chunk_states}, batch, state_offset);
  PERIGEE_LAUNCHED();
  if (batch.training()) return;
  close_kernel<T><<<dim3(static_cast<unsigned>(s.heads), slices), kThreads, 0, dev.stream()>>>(s, k, g, batch,
                                                                                               state_offset);
  PERIGEE_LAUNCHED();
}
template void ssd_forward(Device&, const SsdShape&, const float*, const float*, const float*, const float*,
                          const DeviceBatch&, int64_t, float*, float*);
template void ssd_forward(Device&, const SsdShape&, const bf16*, const bf16*, const bf16*, const float*,
                          const DeviceBatch&, int64_t, bf16*, bf16*);

}  // namespace perigee::kernels
