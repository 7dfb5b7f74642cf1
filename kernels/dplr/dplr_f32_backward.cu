// dplr_backward over float: the CPU's bits (kernels/dplr/backward.cpp, whose names these are). A block takes
// one head of one slice through its chunks from last to first; the sums over the columns of S keep it from being shared by
// more.
#include "kernels/dplr/dplr_f32_chunk.cuh"

namespace perigee::kernels {

namespace {

using namespace dplr;

// In shared memory. Rows of values are ldv floats apart, an odd number, so that a column of a product meets different
// banks.
struct Buffers {
  float* vw;      // [2*16, ldv]  v, then w
  float* z_do;    // [2*16, ldv]  z in the even rows, do in the odd
  float* ka_ds;   // [2*16, ldv]  K~ᵀ dS', A~ᵀ dS'
  float* inner;   // [32, 32]     dc, de in row 2i, df, dh in row 2i+1
  float* s_z_do;  // [32, dk]     S times the rows z, then S times the rows do
  float* ds_vw;   // [32, dk]     dS' v_j, dS' w_j
  float* dgamma;  // [dk]
  float* ds;      // [dk, dv]     in shared memory where it fits

  // s_z_do and ds_vw lie where the tile of the inner products was.
  __host__ __device__ static int key_floats(int dk) { return 64 * dk > kTileFloats ? 64 * dk : kTileFloats; }
  __host__ __device__ static int floats(int dk, int dv) { return key_floats(dk) + 96 * (dv | 1) + 1024 + dk; }
  __device__ Buffers(float* memory, int dk, int dv) {
    const int ldv = dv | 1;
    s_z_do = memory;
    ds_vw = s_z_do + 32 * dk;
    vw = memory + key_floats(dk);
    z_do = vw + 32 * ldv;
    ka_ds = z_do + 32 * ldv;
    inner = ka_ds + 32 * ldv;
    dgamma = inner + 1024;
    ds = dgamma + dk;
  }
};

// use(r, column, sum): the chain over i < depth of a[r*lda + i*step] b(i, column), for 32 rows.
template <class B, class Use>
__device__ void multiply32(int depth, int columns, const float* a, int lda, int step, B b, Use use) {
  for (int item = threadIdx.x; item < 4 * columns; item += kThreads) {
    const int column = item % columns, r0 = item / columns * 8;
    float sum[8];
    for (int r = 0; r < 8; ++r) sum[r] = 0.0f;
    for (int i = 0; i < depth; ++i) {
      const float b_i = b(i, column);
#pragma unroll
      for (int r = 0; r < 8; ++r) sum[r] = math::fma(a[(r0 + r) * lda + i * step], b_i, sum[r]);
    }
    for (int r = 0; r < 8; ++r) use(r0 + r, column, sum[r]);
  }
  __syncthreads();
}

// dq, dk, da, db, dg of all rows in channel x: the chains of decayed vectors forwards, then their gradients backwards.
__device__ void key_gradients(const DplrDeviceGradients<float>& out, int64_t at, int64_t ld, int n, int dk,
                              int x, const DeviceRows& rows, const Buffers& m) {
  float k_decayed[16][16], a_decayed[16][16];  // all indices are constants once the loops are unrolled
  float gamma[17], dkey[16], dremoval[16];
  gamma[0] = 1.0f;
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    if (i < n) {
      const float alpha = rows.alpha[i * dk + x];
      gamma[i + 1] = gamma[i] * alpha;
#pragma unroll
      for (int j = 0; j < 16; ++j)
        if (j < i) {
          k_decayed[i][j] = k_decayed[i - 1][j] * alpha;
          a_decayed[i][j] = a_decayed[i - 1][j] * alpha;
        }
      k_decayed[i][i] = rows.ka[2 * i * dk + x];
      a_decayed[i][i] = rows.ka[(2 * i + 1) * dk + x];
      dkey[i] = m.ds_vw[i * dk + x];
      dremoval[i] = m.ds_vw[(16 + i) * dk + x];
    }
  }
  float dgamma = m.dgamma[x];
#pragma unroll
  for (int i = 15; i >= 0; --i) {
    if (i < n) {
      const float alpha = rows.alpha[i * dk + x];
      const float b = rows.bq[2 * i * dk + x], q = rows.bq[(2 * i + 1) * dk + x];
      const float dgb = m.s_z_do[i * dk + x], dgq = m.s_z_do[(16 + i) * dk + x];
      const float *dce = m.inner + 64 * i, *dfh = dce + 32;
      // After the decay: what q read.
      float dq = gamma[i + 1] * dgq;
#pragma unroll
      for (int j = 0; j < 16; ++j)
        if (j <= i) {
          dq = math::fma(dfh[j], k_decayed[i][j], math::fma(dfh[16 + j], a_decayed[i][j], dq));
          dkey[j] = math::fma(dfh[j], q, dkey[j]);
          dremoval[j] = math::fma(dfh[16 + j], q, dremoval[j]);
        }
      dgamma = math::fma(q, dgq, dgamma);
      const float dk_i = dkey[i], da_i = dremoval[i];
      // The decay.
      float dg = dgamma * gamma[i + 1];
#pragma unroll
      for (int j = 0; j < 16; ++j)
        if (j < i) {
          dg = math::fma(dkey[j], k_decayed[i][j], math::fma(dremoval[j], a_decayed[i][j], dg));
          dkey[j] = dkey[j] * alpha;
          dremoval[j] = dremoval[j] * alpha;
        }
      dgamma = dgamma * alpha;
      // Before it: what b read.
      float db = gamma[i] * dgb;
#pragma unroll
      for (int j = 0; j < 16; ++j)
        if (j < i) {
          db = math::fma(dce[j], k_decayed[i - 1][j], math::fma(dce[16 + j], a_decayed[i - 1][j], db));
          dkey[j] = math::fma(dce[j], b, dkey[j]);
          dremoval[j] = math::fma(dce[16 + j], b, dremoval[j]);
        }
      dgamma = math::fma(b, dgb, dgamma);
      const int64_t to = at + i * ld + x;
      out.dq[to] = dq;
      out.dk[to] = dk_i;
      out.da[to] = da_i;
      out.db[to] = db;
      out.dg[to] = dg;
    }
  }
}

// far_ds: null, or [blocks][dk, dv] for dS where shared memory is too small.
__global__ void __launch_bounds__(kThreads)
    backward_kernel(Shape shape, DplrDeviceInputs<float> in, const float* chunk_states, const float* dout,
                    DplrDeviceGradients<float> out, DeviceBatch batch, float* far_ds) {
  extern __shared__ float memory[];
  const int head = blockIdx.x, slice_index = blockIdx.y, dk = shape.dk, dv = shape.dv;
  const int ldv = dv | 1, tid = threadIdx.x;
  const DeviceSlice slice = batch.slice[slice_index];
  Buffers m(memory + DeviceRows::floats(dk), dk, dv);
  const DeviceRows rows(memory, m.s_z_do, dk);
  if (far_ds != nullptr) m.ds = far_ds + (static_cast<int64_t>(slice_index) * shape.heads + head) * dk * dv;
  float* const ds = m.ds;
  for (int i = tid; i < dk * dv; i += kThreads) ds[i] = 0.0f;
  const int64_t ld_k = static_cast<int64_t>(shape.heads) * dk, ld_v = static_cast<int64_t>(shape.heads) * dv;
  const int chunks = (slice.count + kChunk - 1) / kChunk;
  for (int c = chunks - 1; c >= 0; --c) {
    const int64_t row = slice.begin + static_cast<int64_t>(c) * kChunk;
    const int n = min(kChunk, slice.count - c * kChunk);
    const bool last = c == chunks - 1;
    const int64_t at_k = row * ld_k + static_cast<int64_t>(head) * dk,
                  at_v = row * ld_v + static_cast<int64_t>(head) * dv;
    const float* s =
        chunk_states + (kda_chunk_slot(slice.begin, slice_index, c) * shape.heads + head) * dk * dv;

    // The forward of the chunk, without the outputs.
    __syncthreads();
    open_chunk(dk, rows);
    prepare_rows(n, dk, in, at_k, ld_k, rows);
    inner_products(0, n, dk, rows);
    for (int item = tid; item < 16 * dv; item += kThreads) {
      const int i = item / dv, x = item % dv;
      m.vw[i * ldv + x] = i < n ? in.v[at_v + i * ld_v + x] : 0.0f;
      m.vw[(16 + i) * ldv + x] = 0.0f;
    }
    // (Gamma . b_i)ᵀ S, in the rows that z takes below.
    for (int item = tid; item < 2 * dv; item += kThreads) {
      const int x = item % dv, i0 = item / dv * 8;
      float sum[8];
      for (int i = 0; i < 8; ++i) sum[i] = 0.0f;
      for (int y = 0; y < dk; ++y) {
        const float s_y = s[static_cast<int64_t>(y) * dv + x];
#pragma unroll
        for (int i = 0; i < 8; ++i)
          if (i0 + i < n) sum[i] = math::fma(rows.gbq[2 * (i0 + i) * dk + y], s_y, sum[i]);
      }
      for (int i = 0; i < 8; ++i)
        if (i0 + i < n) m.z_do[2 * (i0 + i) * ldv + x] = sum[i];
    }
    __syncthreads();
    if (!last)
      multiply32(
          dk, dv, rows.ka_decayed, 1, 32, [&](int i, int x) { return ds[i * dv + x]; },
          [&](int r, int x, float sum) { m.ka_ds[r * ldv + x] = sum; });

    // w, then dv and z; a column to a thread.
    for (int x = tid; x < dv; x += kThreads) {
      for (int i = 0; i < n; ++i) {
        float t = m.z_do[2 * i * ldv + x];
        for (int j = 0; j < i; ++j) {
          t = math::fma(rows.ce[32 * i + j], m.vw[j * ldv + x], t);
          t = math::fma(rows.ce[32 * i + 16 + j], m.vw[(16 + j) * ldv + x], t);
        }
        m.vw[(16 + i) * ldv + x] = 0.0f - t;
      }
      for (int i = n - 1; i >= 0; --i) {
        const float d = dout[at_v + i * ld_v + x];
        float dv_i = last ? 0.0f : m.ka_ds[i * ldv + x], dw_i = last ? 0.0f : m.ka_ds[(16 + i) * ldv + x];
        dv_i = math::fma(rows.fh[32 * i + i], d, dv_i);
        dw_i = math::fma(rows.fh[32 * i + 16 + i], d, dw_i);
        for (int r = i + 1; r < n; ++r) {
          const float z_r = m.z_do[2 * r * ldv + x], do_r = m.z_do[(2 * r + 1) * ldv + x];
          const float *ce = rows.ce + 32 * r, *fh = rows.fh + 32 * r;
          dv_i = math::fma(ce[i], z_r, math::fma(fh[i], do_r, dv_i));
          dw_i = math::fma(ce[16 + i], z_r, math::fma(fh[16 + i], do_r, dw_i));
        }
        out.dv[at_v + i * ld_v + x] = dv_i;
        m.z_do[2 * i * ldv + x] = 0.0f - dw_i;
        m.z_do[(2 * i + 1) * ldv + x] = d;
      }
    }
    __syncthreads();

    // Products with v and w, S and dS'.
    for (int item = tid; item < 32 * 32; item += kThreads) {
      const int r = item / 32, j = item % 32;
      float sum = 0.0f;
      if (r < 2 * n)
        for (int y = 0; y < dv; ++y) sum = math::fma(m.z_do[r * ldv + y], m.vw[j * ldv + y], sum);
      m.inner[item] = sum;
    }
    const int half = tid / 128;
    for (int x = tid % 128; x < dk; x += 128) {
      float sum[16];
      for (int r = 0; r < 16; ++r) sum[r] = 0.0f;
      for (int y = 0; y < dv; ++y) {
        const float s_y = s[static_cast<int64_t>(x) * dv + y];
#pragma unroll
        for (int r = 0; r < 16; ++r)
          if (r < n) sum[r] = math::fma(s_y, m.z_do[(2 * r + half) * ldv + y], sum[r]);
      }
      for (int r = 0; r < 16; ++r) m.s_z_do[(16 * half + r) * dk + x] = sum[r];
      for (int r = 0; r < 16; ++r) sum[r] = 0.0f;
      if (!last)
        for (int y = 0; y < dv; ++y) {
          const float ds_y = ds[x * dv + y];
#pragma unroll
          for (int r = 0; r < 16; ++r) sum[r] = math::fma(ds_y, m.vw[(16 * half + r) * ldv + y], sum[r]);
        }
      for (int r = 0; r < 16; ++r) m.ds_vw[(16 * half + r) * dk + x] = sum[r];
    }
    for (int x0 = 0; x0 < dk; x0 += kThreads / 16) {
      const int x = min(x0 + tid / 16, dk - 1);  // the last one again, so that whole warps exchange
      float sum = 0.0f;
      if (!last)
        for (int y = tid % 16; y < (dv + 15) / 16 * 16; y += 16)
          sum = y < dv ? math::fma(s[static_cast<int64_t>(x) * dv + y], ds[x * dv + y], sum)
                       : math::fma(0.0f, 0.0f, sum);
      sum = math::reduce_add16(sum);
      if (tid % 16 == 0) m.dgamma[x] = sum;
    }
    __syncthreads();

    for (int x = tid; x < dk; x += kThreads) key_gradients(out, at_k, ld_k, n, dk, x, rows, m);
    if (c == 0) break;
    const int groups = (dk + 7) / 8;
    for (int item = tid; item < groups * dv; item += kThreads) {
      const int y = item % dv, x0 = item / dv * 8;
      float sum[8];
#pragma unroll
      for (int x = 0; x < 8; ++x) sum[x] = x0 + x < dk ? rows.gamma[x0 + x] * ds[(x0 + x) * dv + y] : 0.0f;
      for (int r = 0; r < 2 * n; ++r) {
        const float right = m.z_do[r * ldv + y];
#pragma unroll
        for (int x = 0; x < 8; ++x)
          if (x0 + x < dk) sum[x] = math::fma(rows.gbq[r * dk + x0 + x], right, sum[x]);
      }
#pragma unroll
      for (int x = 0; x < 8; ++x)
        if (x0 + x < dk) ds[(x0 + x) * dv + y] = sum[x];
    }
  }
}

}  // namespace

template <>
void dplr_backward<float>(Device& dev, const DplrShape& shape, const DplrDeviceInputs<float>& in,
                          const float* chunk_states, const DeviceBatch& batch, const float* dout,
                          const DplrDeviceGradients<float>& gradients) {
  PERIGEE_CHECK(shape.heads > 0 && shape.dk > 0 && shape.dv > 0, "heads {} dk {} dv {}", shape.heads,
                shape.dk, shape.dv);
  PERIGEE_CHECK(batch.training(), "the backward takes whole sequences");
  if (batch.rows == 0 || batch.slices == 0 || batch.max_count == 0) return;
  const Shape s{static_cast<int>(shape.heads), static_cast<int>(shape.dk), static_cast<int>(shape.dv)};
  const int ds_floats = s.dk * s.dv, most = 227 * 1024 / static_cast<int>(sizeof(float));
  int floats = DeviceRows::floats(s.dk) + Buffers::floats(s.dk, s.dv);
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
                    bytes, dev.stream()>>>(s, in, chunk_states, dout, gradients, batch, far_ds);
  PERIGEE_LAUNCHED();
}

}  // namespace perigee::kernels
