// kda_backward over float: the CPU's bits (kernels/kda/backward.cpp, whose names these are). A block takes one head of
// one slice through its chunks from last to first; the sums over the columns of S keep it from being shared by more.
#include "kernels/kda/kda_device.h"
#include "kernels/kda/kda_f32_chunk.cuh"

namespace perigee::kernels {

namespace {

using namespace kda_f32;

struct Operands {
  const float *q, *k, *v, *g, *beta, *chunk_states, *dout;
  float *dq, *dk, *dv, *dg, *dbeta;
};

__host__ __device__ inline int round_up16(int n) {
  return (n + 15) / 16 * 16;
}

// In shared memory. Rows of values are ldv floats apart: dv rounded up to 16, what lies past dv computed from zeros as
// the CPU does, and one more, so that a column of a product meets different banks.
struct Buffers {
  float* residual;  // [16, ldv]    u_i = beta_i residual_i
  float* u;         // [16, ldv]
  float* w_do;      // [2*16, ldv]  -w in the even rows, do in the odd
  float* du;        // [16, ldv]    first (K~_i)ᵀ dS'
  float* da_db;     // [2*16, 16]
  float* s_w_do;    // [32, dk]     S times the rows -w, then S times the rows do
  float* ds_u;      // [16, dk]     dS' u_j, then the gradient of K~_j on its way back
  float* dgamma;    // [dk]
  float* ds;        // [dk, dvp]    in shared memory where it fits

  __host__ __device__ static int floats(int dk, int dv) { return 80 * (round_up16(dv) + 1) + 512 + 49 * dk; }
  __device__ Buffers(float* memory, int dk, int dv) {
    const int ldv = round_up16(dv) + 1;
    residual = memory;
    u = residual + 16 * ldv;
    w_do = u + 16 * ldv;
    du = w_do + 32 * ldv;
    da_db = du + 16 * ldv;
    s_w_do = da_db + 512;
    ds_u = s_w_do + 32 * dk;
    dgamma = ds_u + 16 * dk;
    ds = dgamma + dk;
  }
};

// c[r][column] = the chain over i < depth of a[r*lda + i*step] b(i, column), for 16 rows.
template <class B>
__device__ void multiply16(int depth, int columns, const float* a, int lda, int step, B b, float* c,
                           int ldc) {
  for (int item = threadIdx.x; item < 2 * columns; item += kThreads) {
    const int column = item % columns, r0 = item / columns * 8;
    float sum[8];
    for (int r = 0; r < 8; ++r) sum[r] = 0.0f;
    for (int i = 0; i < depth; ++i) {
      const float b_i = b(i, column);
#pragma unroll
      for (int r = 0; r < 8; ++r) sum[r] = math::fma(a[(r0 + r) * lda + i * step], b_i, sum[r]);
    }
    for (int r = 0; r < 8; ++r) c[(r0 + r) * ldc + column] = sum[r];
  }
  __syncthreads();
}

// dq, dk, dg of all rows in channel x: the chain of decayed keys forwards, then its gradient backwards.
__device__ void key_gradients(const Operands& o, int64_t at, int64_t ld, int n, int dk, int x,
                              const Rows& rows, const Buffers& m) {
  float decayed[16][16], gamma[16], dkey[16];  // all indices are constants once the loops are unrolled
  float product = 1.0f;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    if (i < n) {
      const float alpha = rows.alpha[i * dk + x];
      product = product * alpha;
      gamma[i] = product;
#pragma unroll
      for (int j = 0; j < 16; ++j)
        if (j < i) decayed[i][j] = decayed[i - 1][j] * alpha;
      decayed[i][i] = rows.kq[2 * i * dk + x];
      dkey[i] = m.ds_u[i * dk + x];
    }
  }
  float dgamma = m.dgamma[x];
#pragma unroll
  for (int i = 15; i >= 0; --i) {
    if (i < n) {
      const float alpha = rows.alpha[i * dk + x], k = decayed[i][i], q = rows.kq[(2 * i + 1) * dk + x];
      const float dgk = m.s_w_do[i * dk + x], dgq = m.s_w_do[(16 + i) * dk + x];
      const float *da = m.da_db + 32 * i, *db = da + 16;
      float dq = math::fma(gamma[i], dgq, db[i] * k);
      float dkey_i = math::fma(gamma[i], dgk, math::fma(db[i], q, dkey[i]));
      dgamma = math::fma(k, dgk, math::fma(q, dgq, dgamma));
      float dg = dgamma * gamma[i];
      dgamma = dgamma * alpha;
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        if (j < i) {
          dq = math::fma(db[j], decayed[i][j], dq);
          dkey_i = math::fma(da[j], decayed[i][j], dkey_i);
          dkey[j] = math::fma(da[j], k, math::fma(db[j], q, dkey[j]));
          dg = math::fma(dkey[j], decayed[i][j], dg);
          dkey[j] = dkey[j] * alpha;
        }
      }
      o.dq[at + i * ld + x] = dq;
      o.dk[at + i * ld + x] = dkey_i;
      o.dg[at + i * ld + x] = dg;
    }
  }
}

// far_ds: null, or [blocks][dk, dvp] for dS where shared memory is too small.
__global__ void __launch_bounds__(kThreads)
    backward_kernel(Shape shape, Operands o, DeviceBatch batch, float* far_ds) {
  extern __shared__ float memory[];
  const int head = blockIdx.x, slice_index = blockIdx.y, dk = shape.dk, dv = shape.dv;
  const int dvp = round_up16(dv), ldv = dvp + 1, tid = threadIdx.x;
  const DeviceSlice slice = batch.slice[slice_index];
  const Rows rows(memory, dk);
  Buffers m(memory + Rows::floats(dk), dk, dv);
  if (far_ds != nullptr) m.ds = far_ds + (static_cast<int64_t>(slice_index) * shape.heads + head) * dk * dvp;
  float* const ds = m.ds;
  for (int i = tid; i < dk * dvp; i += kThreads) ds[i] = 0.0f;
  const int64_t ld_k = static_cast<int64_t>(shape.heads) * dk, ld_v = static_cast<int64_t>(shape.heads) * dv;
  const int chunks = (slice.count + kChunk - 1) / kChunk;
  for (int c = chunks - 1; c >= 0; --c) {
    const int64_t row = slice.begin + static_cast<int64_t>(c) * kChunk;
    const int n = min(kChunk, slice.count - c * kChunk);
    const bool last = c == chunks - 1;
    const int64_t at_k = row * ld_k + static_cast<int64_t>(head) * dk,
                  at_v = row * ld_v + static_cast<int64_t>(head) * dv;
    const float* s =
        o.chunk_states + (kda_chunk_slot(slice.begin, slice_index, c) * shape.heads + head) * dk * dv;

    // The forward of the chunk, without the outputs.
    __syncthreads();
    open_chunk(dk, rows);
    prepare_rows(n, dk, o.q + at_k, o.k + at_k, o.g + at_k, ld_k, rows);
    inner_products(0, n, dk, rows);
    multiply16(
        dk, dvp, rows.gkq, 2 * dk, 1,
        [&](int i, int x) { return x < dv ? s[static_cast<int64_t>(i) * dv + x] : 0.0f; }, m.residual, ldv);
    if (!last)
      multiply16(
          dk, dvp, rows.k_decayed, 1, 16, [&](int i, int x) { return ds[i * dvp + x]; }, m.du, ldv);

    // u, dv; a column to a thread.
    for (int x = tid; x < dvp; x += kThreads) {
      for (int i = 0; i < n; ++i) {
        float t = (x < dv ? o.v[at_v + i * ld_v + x] : 0.0f) - m.residual[i * ldv + x];
        for (int j = 0; j < i; ++j) t = math::fnma(rows.a[16 * i + j], m.u[j * ldv + x], t);
        m.residual[i * ldv + x] = t;
        m.u[i * ldv + x] = o.beta[(row + i) * shape.heads + head] * t;
      }
      for (int i = n - 1; i >= 0; --i) {
        const float d = x < dv ? o.dout[at_v + i * ld_v + x] : 0.0f;
        float du = last ? 0.0f : m.du[i * ldv + x];
        du = math::fma(rows.b[16 * i + i], d, du);
        for (int r = i + 1; r < n; ++r) {
          du = math::fma(rows.b[16 * r + i], m.w_do[(2 * r + 1) * ldv + x], du);
          du = math::fma(rows.a[16 * r + i], m.w_do[2 * r * ldv + x], du);
        }
        const float w = o.beta[(row + i) * shape.heads + head] * du;
        if (x < dv) o.dv[at_v + i * ld_v + x] = w;
        m.du[i * ldv + x] = du;
        m.w_do[2 * i * ldv + x] = 0.0f - w;
        m.w_do[(2 * i + 1) * ldv + x] = d;
      }
    }
    __syncthreads();
    {
      const int i = tid / 16, lane = tid % 16;
      float dbeta = 0.0f;
      if (i < n)
        for (int x = lane; x < dvp; x += 16)
          dbeta = math::fma(m.du[i * ldv + x], m.residual[i * ldv + x], dbeta);
      dbeta = math::reduce_add16(dbeta);
      if (i < n && lane == 0) o.dbeta[(row + i) * shape.heads + head] = dbeta;
    }

    // Products with u, S and dS'.
    for (int item = tid; item < 32 * 16; item += kThreads) {
      const int r = item / 16, j = item % 16;
      float sum = 0.0f;
      if (r < 2 * n && j < n)
        for (int x = 0; x < dv; ++x) sum = math::fma(m.w_do[r * ldv + x], m.u[j * ldv + x], sum);
      m.da_db[item] = sum;
    }
    const int half = tid / 128;
    for (int x = tid % 128; x < dk; x += 128) {
      float sum[16];
      for (int r = 0; r < 16; ++r) sum[r] = 0.0f;
      for (int y = 0; y < dv; ++y) {
        const float s_y = s[static_cast<int64_t>(x) * dv + y];
#pragma unroll
        for (int r = 0; r < 16; ++r)
          if (r < n) sum[r] = math::fma(s_y, m.w_do[(2 * r + half) * ldv + y], sum[r]);
      }
      for (int r = 0; r < 16; ++r) m.s_w_do[(16 * half + r) * dk + x] = sum[r];
      for (int r = 0; r < 8; ++r) sum[r] = 0.0f;
      if (!last)
        for (int y = 0; y < dv; ++y) {
          const float ds_y = ds[x * dvp + y];
#pragma unroll
          for (int r = 0; r < 8; ++r)
            if (8 * half + r < n) sum[r] = math::fma(ds_y, m.u[(8 * half + r) * ldv + y], sum[r]);
        }
      for (int r = 0; r < 8; ++r) m.ds_u[(8 * half + r) * dk + x] = sum[r];
    }
    for (int x0 = 0; x0 < dk; x0 += kThreads / 16) {
      const int x = min(x0 + tid / 16, dk - 1);  // the last one again, so that whole warps exchange
      float sum = 0.0f;
      if (!last)
        for (int y = tid % 16; y < dvp; y += 16)
          sum = y < dv ? math::fma(s[static_cast<int64_t>(x) * dv + y], ds[x * dvp + y], sum)
                       : math::fma(0.0f, 0.0f, sum);
      sum = math::reduce_add16(sum);
      if (tid % 16 == 0) m.dgamma[x] = sum;
    }
    __syncthreads();

    for (int x = tid; x < dk; x += kThreads) key_gradients(o, at_k, ld_k, n, dk, x, rows, m);
    if (c == 0) break;
    const int groups = (dk + 7) / 8;
    for (int item = tid; item < groups * dvp; item += kThreads) {
      const int y = item % dvp, x0 = item / dvp * 8;
      float sum[8];
#pragma unroll
      for (int x = 0; x < 8; ++x) sum[x] = x0 + x < dk ? rows.gamma[x0 + x] * ds[(x0 + x) * dvp + y] : 0.0f;
      for (int r = 0; r < 2 * n; ++r) {
        const float right = m.w_do[r * ldv + y];
#pragma unroll
        for (int x = 0; x < 8; ++x)
          if (x0 + x < dk) sum[x] = math::fma(rows.gkq[r * dk + x0 + x], right, sum[x]);
      }
#pragma unroll
      for (int x = 0; x < 8; ++x)
        if (x0 + x < dk) ds[(x0 + x) * dvp + y] = sum[x];
    }
  }
}

}  // namespace

template <>
void kda_backward<float>(Device& dev, const KdaShape& shape, const float* q, const float* k, const float* v,
                         const float* g, const float* beta, const float* chunk_states,
                         const DeviceBatch& batch, const float* dout, float* dq, float* dk_, float* dv_,
                         float* dg, float* dbeta) {
  PERIGEE_CHECK(shape.heads > 0 && shape.dk > 0 && shape.dv > 0, "heads {} dk {} dv {}", shape.heads,
                shape.dk, shape.dv);
  PERIGEE_CHECK(batch.training(), "the backward takes whole sequences");
  if (batch.rows == 0 || batch.slices == 0 || batch.max_count == 0) return;
  const Shape s{static_cast<int>(shape.heads), static_cast<int>(shape.dk), static_cast<int>(shape.dv)};
  const int ds_floats = s.dk * round_up16(s.dv), most = 227 * 1024 / static_cast<int>(sizeof(float));
  int floats = Rows::floats(s.dk) + Buffers::floats(s.dk, s.dv);
  PERIGEE_CHECK(floats <= most, "dk {} dv {} need {} floats of shared memory", s.dk, s.dv, floats);
  const DeviceScratch::Mark mark(dev.scratch);
  float* far_ds = nullptr;
  if (floats + ds_floats <= most)
    floats += ds_floats;
  else
    far_ds = dev.scratch.take<float>(static_cast<int64_t>(ds_floats) * s.heads * batch.slices);
  const int bytes = floats * static_cast<int>(sizeof(float));
  allow_shared_memory(backward_kernel, bytes);
  backward_kernel<<<dim3(static_cast<unsigned>(s.heads), static_cast<unsigned>(batch.slices)), kThreads,
                    bytes, dev.stream()>>>(s, {q, k, v, g, beta, chunk_states, dout, dq, dk_, dv_, dg, dbeta},
                                           batch, far_ds);
  PERIGEE_LAUNCHED();
}

}  // namespace perigee::kernels
