// ssd_backward: the CPU's chains of operations (kernels/ssd/backward.cpp, whose names these are) over float and over widened
// bf16. A block takes one head of one slice through its chunks from last to first; sums over both dimensions of S and dS
// keep it from being shared by more.
#include "kernels/ssd/ssd_chunk.cuh"

namespace perigee::kernels {
namespace {

using namespace ssd_device;

constexpr int kThreads = 512, kHalf = kChunk / 2, kQuarter = kChunk / 4;

template <class T>
struct Operands {
  const T *q, *k, *v;
  const float* g;
  const T *chunk_states, *dout;
  T *dq, *dk, *dv;
  float* dg;
};

// In shared memory.
struct Buffers {
  float *q, *k;          // [dk, kLine]  columns of the chunk's rows; q times Gamma_i in the end
  float *dout, *v;       // [dvp, kLine]
  float *s_dout, *ds_v;  // [dk, kLine]  columns of S do_i, of dS v_j
  float* ds_k;           // [dvp, kLine] columns of dSᵀ k_j
  float *since, *weights, *dscores, *shares;  // [16, 16]: L, W, D, W dW
  float *gamma, *through_q, *through_k;       // [16]
  float* along;                               // [dk]  <S, dS> of a row
  float* tile;                                // [dk, tile + 1]  columns of S
  float* ds;                                  // [dk, dvp + 1]  in shared memory where it fits

  // width: of the tile of S
  __host__ __device__ static int floats(int dk, int dv, int width) {
    return 4 * dk * kLine + 3 * round_up16(dv) * kLine + 4 * 256 + 3 * 16 + dk + dk * (width + 1);
  }
  __device__ Buffers(float* memory, int dk, int dv, int width) {
    const int dvp = round_up16(dv);
    q = memory;
    k = q + dk * kLine;
    s_dout = k + dk * kLine;
    ds_v = s_dout + dk * kLine;
    dout = ds_v + dk * kLine;
    v = dout + dvp * kLine;
    ds_k = v + dvp * kLine;
    since = ds_k + dvp * kLine;
    weights = since + 256;
    dscores = weights + 256;
    shares = dscores + 256;
    gamma = shares + 256;
    through_q = gamma + 16;
    through_k = through_q + 16;
    along = through_k + 16;
    tile = along + dk;
    ds = tile + dk * (width + 1);
  }
};

// simd::dot of columns i of a and b [n, kLine] by sixteen threads.
__device__ inline float dot_columns(int n, const float* a, const float* b, int i, int lane) {
  float sum = 0.0f;
  for (int x = lane; x < round_up16(n); x += 16)
    sum = x < n ? math::fma(a[x * kLine + i], b[x * kLine + i], sum) : math::fma(0.0f, 0.0f, sum);
  return math::reduce_add16(sum);
}

// to[x * ldto + y] = from[x * ld + y] for x < dk, y < width, many read before the first is stored.
template <class T>
__device__ void load_tile(int dk, int width, const T* from, int64_t ld, float* to, int ldto) {
  constexpr int kEach = 16, kWarps = kThreads / 32;
  const int warp = threadIdx.x / 32;
  for (int y = threadIdx.x % 32; y < width; y += 32)
    for (int x0 = warp; x0 < dk; x0 += kEach * kWarps) {
      T held[kEach];
#pragma unroll
      for (int r = 0; r < kEach; ++r)
        if (x0 + r * kWarps < dk) held[r] = from[(x0 + r * kWarps) * ld + y];
#pragma unroll
      for (int r = 0; r < kEach; ++r)
        if (x0 + r * kWarps < dk) to[(x0 + r * kWarps) * ldto + y] = to_float(held[r]);
    }
}

// S do_i and, row by row, <S, dS>; S goes through `tile` so that it is read along its rows.
template <class T>
__device__ void through_s(int dk, int dv, int tile, int ldds, bool last, const T* s, const Buffers& m) {
  const int tid = threadIdx.x, items = 4 * dk;
  for (int x0 = 0; x0 < items; x0 += kThreads) {
    const int item = x0 + tid, x = item >> 2, quarter = item & 3;
    float sum[kQuarter] = {};
    for (int y0 = 0; y0 < dv; y0 += tile) {
      const int width = min(tile, dv - y0);
      __syncthreads();
      load_tile(dk, width, s + y0, dv, m.tile, tile + 1);
      __syncthreads();
      if (item < items) {
#pragma unroll 8
        for (int y = 0; y < width; ++y) {
          float d[kQuarter];
          read(m.dout + (y0 + y) * kLine + quarter * kQuarter, d);
          const float s_y = m.tile[x * (tile + 1) + y];
#pragma unroll
          for (int r = 0; r < kQuarter; ++r) sum[r] = math::fma(s_y, d[r], sum[r]);
        }
      }
    }
    if (item < items)
      for (int r = 0; r < kQuarter; ++r) m.s_dout[x * kLine + quarter * kQuarter + r] = sum[r];
  }
  if (last) return;
  for (int x0 = 0; x0 < dk; x0 += kThreads / 16) {
    const int x = min(x0 + tid / 16, dk - 1);  // the last one again, so that whole warps exchange
    float sum = 0.0f;
#pragma unroll 8
    for (int y = tid % 16; y < round_up16(dv); y += 16)
      sum = y < dv ? math::fma(tile == dv ? m.tile[x * (tile + 1) + y]
                                          : to_float(s[static_cast<int64_t>(x) * dv + y]),
                               m.ds[x * ldds + y], sum)
                   : math::fma(0.0f, 0.0f, sum);
    sum = math::reduce_add16(sum);
    if (tid % 16 == 0) m.along[x] = sum;
  }
}

// dS v_j and dSᵀ k_j, zero for the last chunk.
__device__ void through_ds(int dk, int dv, int ldds, bool last, const Buffers& m) {
  for (int item = threadIdx.x; item < 2 * (dk + dv); item += kThreads) {
    const bool keys = item < 2 * dk;
    const int at = keys ? item >> 1 : (item - 2 * dk) % dv, half = keys ? item & 1 : (item - 2 * dk) / dv;
    const float* from = (keys ? m.v : m.k) + half * kHalf;
    const float* ds = m.ds + (keys ? at * ldds : at);
    const int step = keys ? 1 : ldds, depth = last ? 0 : keys ? dv : dk;
    float sum[kHalf] = {};
#pragma unroll 4
    for (int y = 0; y < depth; ++y) {
      float d[kHalf];
      read(from + y * kLine, d);
      const float ds_y = ds[y * step];
#pragma unroll
      for (int r = 0; r < kHalf; ++r) sum[r] = math::fma(ds_y, d[r], sum[r]);
    }
    float* to = (keys ? m.ds_v : m.ds_k) + at * kLine + half * kHalf;
    for (int r = 0; r < kHalf; ++r) to[r] = sum[r];
  }
}

// sum over j of weights[j] columns[j], the chain from `start`; j in [from, to).
__device__ __forceinline__ float combine(float start, const float* weights, int step,
                                         const float (&columns)[kChunk], int from, int to) {
#pragma unroll
  for (int j = 0; j < kChunk; ++j)
    if (j >= from && j < to) start = math::fma(weights[j * step], columns[j], start);
  return start;
}

template <class T>
__device__ void store_rows(const Operands<T>& o, int n, int dk, int dv, int64_t at_k, int64_t ldk,
                           int64_t at_v, int64_t ldv, const Buffers& m) {
  const float* left = m.since + 16 * (n - 1);  // L_nj
  for (int item = threadIdx.x; item < 2 * dk; item += kThreads) {
    const int x = item % dk;
    const bool query = item < dk;
    float columns[kChunk], start[kChunk];
    read((query ? m.k : m.q) + x * kLine, columns);
    read((query ? m.s_dout : m.ds_v) + x * kLine, start);
    T* to = (query ? o.dq : o.dk) + at_k + x;
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      if (i < n) {
        const float sum = query ? combine(m.gamma[i] * start[i], m.dscores + 16 * i, 1, columns, 0, i + 1)
                                : combine(left[i] * start[i], m.dscores + i, 16, columns, i, n);
        to[i * ldk] = from_float<T>(sum);
      }
  }
  for (int y = threadIdx.x; y < dv; y += kThreads) {
    float columns[kChunk], start[kChunk];
    read(m.dout + y * kLine, columns);
    read(m.ds_k + y * kLine, start);
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      if (i < n)
        o.dv[at_v + i * ldv + y] =
            from_float<T>(combine(left[i] * start[i], m.weights + i, 16, columns, i, n));
  }
}

// dg. Threads 0..255: sixteen lanes a row.
__device__ void store_decays(int n, int dk, bool last, float* dg, int64_t ld, const Buffers& m) {
  const int lane = threadIdx.x % 16, row = threadIdx.x / 16;
  float sum = 0.0f;
  if (!last) {
    float all = 0.0f;
    for (int x = lane; x < round_up16(dk); x += 16) all = all + (x < dk ? m.along[x] : 0.0f);
    sum = m.gamma[n - 1] * math::reduce_add16(all);
  }
  float earlier = m.through_k[lane];
#pragma unroll
  for (int i = kChunk - 1; i >= 0; --i)
    if (i < n && i >= row) {
      sum = sum + m.through_q[i];
      earlier = earlier + m.shares[16 * i + lane];
    }
  const float before = math::reduce_add16(lane < row ? earlier : 0.0f);
  if (lane == 0 && row < n) dg[row * ld] = sum + before;
}

// far_ds: null, or [blocks][dk, dvp + 1] for dS where shared memory is too small.
template <class T>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(Shape shape, Operands<T> o, DeviceBatch batch, int tile, float* far_ds) {
  extern __shared__ float4 aligned[];
  const int head = blockIdx.x, slice_index = blockIdx.y, dk = shape.dk, dv = shape.dv, tid = threadIdx.x;
  const int dvp = round_up16(dv), ldds = dvp + 1;
  const DeviceSlice slice = batch.slice[slice_index];
  Buffers m(reinterpret_cast<float*>(aligned), dk, dv, tile);
  if (far_ds != nullptr) m.ds = far_ds + (static_cast<int64_t>(slice_index) * shape.heads + head) * dk * ldds;
  for (int i = tid; i < dk * ldds; i += kThreads) m.ds[i] = 0.0f;
  const int64_t ldk = static_cast<int64_t>(shape.heads) * dk, ldv = static_cast<int64_t>(shape.heads) * dv;
  const int chunks = (slice.count + kChunk - 1) / kChunk;
  for (int c = chunks - 1; c >= 0; --c) {
    const int64_t row = slice.begin + static_cast<int64_t>(c) * kChunk;
    const int n = min(kChunk, slice.count - c * kChunk);
    const bool last = c == chunks - 1;
    const int64_t at_k = row * ldk + static_cast<int64_t>(head) * dk,
                  at_v = row * ldv + static_cast<int64_t>(head) * dv;
    const T* s =
        o.chunk_states + (kda_chunk_slot(slice.begin, slice_index, c) * shape.heads + head) * dk * dv;
    __syncthreads();
    if (last && n < kChunk) {  // what lies past the rows is multiplied by zeros
      for (int i = tid; i < 4 * dk * kLine + 3 * dvp * kLine; i += kThreads) m.q[i] = 0.0f;
      __syncthreads();
    }
    const float logarithm = o.g[(row + min(tid, n - 1)) * shape.heads + head];
    columns_of<kThreads>(0, n, dk, ldk, o.q + at_k, m.q, o.k + at_k, m.k, 0);
    columns_of<kThreads>(0, n, dv, ldv, o.dout + at_v, m.dout, o.v + at_v, m.v, 0);
    if (tid < kChunk) decays_of(0, n, math::exp(logarithm), 0.0f, 1.0f, m.since, m.gamma);
    __syncthreads();

    // Scores by the first two warps, their gradients by the next two.
    float p[2][2];
    const int at = tid % 64 / 8 * 32 + tid % 8 * 2;
    if (tid < 64) {
      scores_of(tid, dk, m.q, m.k, p);
      for (int i = 0; i < 4; ++i)
        m.weights[at + i / 2 * 16 + i % 2] = m.since[at + i / 2 * 16 + i % 2] * p[i / 2][i % 2];
    } else if (tid < 128) {
      scores_of(tid - 64, dv, m.dout, m.v, p);
      for (int i = 0; i < 4; ++i) {
        m.dscores[at + i / 2 * 16 + i % 2] = m.since[at + i / 2 * 16 + i % 2] * p[i / 2][i % 2];
        m.shares[at + i / 2 * 16 + i % 2] = p[i / 2][i % 2];
      }
    }
    through_ds(dk, dv, ldds, last, m);
    through_s(dk, dv, tile, ldds, last, s, m);
    __syncthreads();
    if (tid < 256) {
      m.shares[tid] = m.weights[tid] * m.shares[tid];
      const int i = tid / 16, lane = tid % 16;
      const float tq = dot_columns(dk, m.q, m.s_dout, i, lane), tk = dot_columns(dk, m.k, m.ds_v, i, lane);
      if (lane == 0) {
        m.through_q[i] = i < n ? m.gamma[i] * tq : 0.0f;
        m.through_k[i] = i < n && !last ? m.since[16 * (n - 1) + i] * tk : 0.0f;
      }
    }
    store_rows(o, n, dk, dv, at_k, ldk, at_v, ldv, m);
    __syncthreads();
    if (tid < 256) store_decays(n, dk, last, o.dg + row * shape.heads + head, shape.heads, m);
    if (c == 0) break;
    for (int e = tid; e < dk * kChunk; e += kThreads) {
      float& q = m.q[e / kChunk * kLine + e % kChunk];
      q = m.gamma[min(e % kChunk, n - 1)] * q;
    }
    __syncthreads();
    const float left = m.gamma[n - 1];
    const int across = kThreads / 32;
    for (int y = tid % 32; y < dv; y += 32) {
      float d[kChunk];
      read(m.dout + y * kLine, d);
#pragma unroll 2
      for (int x = tid / 32; x < dk; x += across) {
        float q[kChunk];
        read(m.q + x * kLine, q);
        float t = left * m.ds[x * ldds + y];
#pragma unroll
        for (int r = 0; r < kChunk; ++r)
          if (r < n) t = math::fma(q[r], d[r], t);
        m.ds[x * ldds + y] = t;
      }
    }
  }
}

}  // namespace

template <class T>
void ssd_backward(Device& dev, const SsdShape& shape, const T* q, const T* k, const T* v, const float* g,
                  const T* chunk_states, const DeviceBatch& batch, const T* dout, T* dq, T* dk_, T* dv_,
                  float* dg) {
  PERIGEE_CHECK(shape.heads > 0 && shape.dk > 0 && shape.dv > 0);
  PERIGEE_CHECK(batch.training());
  if (batch.rows == 0 || batch.slices == 0 || batch.max_count == 0) return;
  const Shape s{static_cast<int>(shape.heads), static_cast<int>(shape.dk), static_cast<int>(shape.dv)};
  const int ds_floats = s.dk * (round_up16(s.dv) + 1), most = 227 * 1024 / static_cast<int>(sizeof(float));
  int tile = s.dv;  // all of S beside dS, or some of its columns at a time
  if (Buffers::floats(s.dk, s.dv, tile) + ds_floats > most) tile = 32;
  int floats = Buffers::floats(s.dk, s.dv, tile);
  PERIGEE_CHECK(floats <= most);
  const DeviceScratch::Mark mark(dev.scratch);
  float* far_ds = nullptr;
  if (floats + ds_floats <= most)
    floats += ds_floats;
  else
    far_ds = dev.scratch.take<float>(static_cast<int64_t>(ds_floats) * s.heads * batch.slices);
  const int bytes = floats * static_cast<int>(sizeof(float));
  allow_shared_memory(backward_kernel<T>, bytes);
  backward_kernel<T>
      <<<dim3(static_cast<unsigned>(s.heads), static_cast<unsigned>(batch.slices)), kThreads, bytes,
         dev.stream()>>>(s, {q, k, v, g, chunk_states, dout, dq, dk_, dv_, dg}, batch, tile, far_ds);
  PERIGEE_LAUNCHED();
}
template void ssd_backward(Device&, const SsdShape&, const float*, const float*, const float*, const float*,
                           const float*, const DeviceBatch&, const float*, float*, float*, float*, float*);
template void ssd_backward(Device&, const SsdShape&, const bf16*, const bf16*, const bf16*, const float*,
                           const bf16*, const DeviceBatch&, const bf16*, bf16*, bf16*, bf16*, float*);

}  // namespace perigee::kernels
