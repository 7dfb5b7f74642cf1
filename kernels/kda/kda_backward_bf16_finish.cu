// Third step of the bf16 backward: the gradients of a chunk from its S, dS', U, dX and dO. One block of four warps per
// chunk and head.
//   dB = dO Uᵀ, dA = -(beta dX) Uᵀ;  dO Sᵀ, -(beta dX) Sᵀ, U dS'ᵀ [16, dk], rowsum(S . dS') [dk]   on the tensor cores
// then a thread takes one channel of the keys through the chain of decays and back in float32, as the float function
// does (kernels/kda/backward.cpp). No difference of large sums is formed, so dg is as exact as its terms.
#include "kernels/kda/kda_backward_bf16.cuh"

namespace perigee::kernels::kda_grad {

namespace {

constexpr int kResultRow = kDim + 8;  // floats

struct Results {  // of the products
  float s_do[kChunk][kResultRow], s_w[kChunk][kResultRow], ds_u[kChunk][kResultRow];
  float2 da_db[kChunk][kChunk];
  float dgamma[kDim], dbeta[4][kChunk];  // dbeta: a part from each warp
};
struct Shared {
  union {
    std::byte s[kStateBytes];  // rows: keys
    Results results;           // once S has been read
  };
  std::byte ds[kStateBytes];  // fragments; dV, a tile, once they have been read
  std::byte dout[kTileBytes];
  std::byte dx[kTileBytes];  // fragments
  float beta[kChunk];
};
static_assert(sizeof(Results) <= kStateBytes && 3 * (sizeof(Shared) + 1024) <= 228 * 1024);

__global__ void __launch_bounds__(kThreads, 3) finish_kernel(Operands o) {
  extern __shared__ __align__(1024) std::byte memory[];
  Shared& m = *reinterpret_cast<Shared*>(memory);
  const int head = blockIdx.x, slot = o.slot0 + static_cast<int>(blockIdx.y), slice = o.slice_of[slot] - 1;
  if (slice < 0) return;
  const Chunk chunk(o.batch.slice[slice], slice, slot);
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, n = chunk.n;
  const int64_t ld_k = static_cast<int64_t>(o.heads) * o.dk, ld_v = static_cast<int64_t>(o.heads) * o.dv;
  const int64_t at_k = chunk.row * ld_k + static_cast<int64_t>(head) * o.dk + tid;
  const int64_t at_v = chunk.row * ld_v + static_cast<int64_t>(head) * o.dv;
  const int64_t at = static_cast<int64_t>(blockIdx.y) * o.heads + head;
  const unsigned s = shared_address(m.s), ds = shared_address(m.ds), dout = shared_address(m.dout),
                 dx = shared_address(m.dx);
  copy_tile(s, kDim, o.states + (static_cast<int64_t>(slot) * o.heads + head) * o.dk * o.dv, o.dv, o.dk,
            o.dv);
  copy_flat(ds, o.ds + at * kStateBytes, kStateBytes);
  copy_tile(dout, kChunk, o.dout + at_v, ld_v, n, o.dv);
  copy_flat(dx, o.dx + at * kTileBytes, kTileBytes);
  copies_committed();
  if (tid < kChunk) m.beta[tid] = tid < n ? o.beta[(chunk.row + tid) * o.heads + head] : 0.0f;
  float alpha[kChunk];  // first g
  unsigned kq[kChunk];  // k in the low half, q in the high
  // R comes as fragments: every warp needs all of it.
  const int row = lane / 4, pair = 2 * (lane % 4);
  Fragment r[kDim / 16];
#pragma unroll
  for (int i = 0; i < kDim / 16; ++i)
    r[i] = load_fragment(o.records + at * Record::kBytes + Record::kR, i, lane);
  {
    // All loads at once, of something present; then zeros for what is not.
    const int64_t from = at_k - tid + min(tid, o.dk - 1);
    unsigned short k[kChunk], q[kChunk];
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const int64_t at = from + min(i, n - 1) * ld_k;
      alpha[i] = o.g[at];
      k[i] = o.k[at].bits;
      q[i] = o.q[at].bits;
    }
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const bool present = i < n && tid < o.dk;
      alpha[i] = present ? alpha[i] : 0.0f;
      kq[i] = present ? k[i] | static_cast<unsigned>(q[i]) << 16 : 0u;
    }
  }
  copies_done<0>();
  __syncthreads();

  // Rows of the chunk by 32 keys of this warp; and eight columns of dB (warps 0, 1) or dA (warps 2, 3).
  float s_do[4][4] = {}, s_w[4][4] = {}, ds_u[4][4] = {}, small[4] = {}, dgamma[4] = {}, dbeta[2] = {};
  Fragment dv[2];  // beta dX, two panels of this warp
  const float beta0 = m.beta[lane / 4], beta1 = m.beta[8 + lane / 4];
#pragma unroll
  for (int i = 0; i < kDim / 16; ++i) {
    const Fragment d = load_block(block_address(dout, 0, i, lane));
    Fragment u, w = load_fragment(m.dx, i, lane);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (i / 2 == warp)
        dbeta[e % 2] = __fmaf_rn(low_of(w.r[e]), low_of(r[i].r[e]),
                                 __fmaf_rn(high_of(w.r[e]), high_of(r[i].r[e]), dbeta[e % 2]));
      u.r[e] = scale(r[i].r[e], e % 2 == 0 ? beta0 : beta1);
      w.r[e] = scale(w.r[e], e % 2 == 0 ? -beta0 : -beta1);
      if (i / 2 == warp) dv[i % 2].r[e] = w.r[e] ^ 0x80008000u;
    }
    const unsigned b0 = warp % 2 == 0 ? u.r[0] : u.r[1], b1 = warp % 2 == 0 ? u.r[2] : u.r[3];
    if (warp < 2)
      multiply(small, d.r[0], d.r[1], d.r[2], d.r[3], b0, b1);
    else
      multiply(small, w.r[0], w.r[1], w.r[2], w.r[3], b0, b1);
#pragma unroll
    for (int p = 0; p < 2; ++p) {
      const Fragment a = load_block(block_address(s, 32 * warp + 16 * p, i, lane));
      const Fragment b = load_fragment(m.ds, i * (kDim / 16) + 2 * warp + p, lane);
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const unsigned a0 = a.r[t], a1 = a.r[2 + t], b0 = transpose(b.r[2 * t]),
                       b1 = transpose(b.r[2 * t + 1]);
        multiply(s_do[2 * p + t], d.r[0], d.r[1], d.r[2], d.r[3], a0, a1);
        multiply(s_w[2 * p + t], w.r[0], w.r[1], w.r[2], w.r[3], a0, a1);
        multiply(ds_u[2 * p + t], u.r[0], u.r[1], u.r[2], u.r[3], b0, b1);
        float& sum = dgamma[2 * p + t];
        sum = __fmaf_rn(low_of(a0), low_of(b0), sum);
        sum = __fmaf_rn(high_of(a0), high_of(b0), sum);
        sum = __fmaf_rn(low_of(a1), low_of(b1), sum);
        sum = __fmaf_rn(high_of(a1), high_of(b1), sum);
      }
    }
  }
  __syncthreads();  // S and dS' have been read: the results and dV take their places
#pragma unroll
  for (int p = 0; p < 2; ++p)
    store_block(block_address(ds, 0, 2 * warp + p, lane), dv[p].r[0], dv[p].r[1], dv[p].r[2], dv[p].r[3]);
  Results& results = m.results;
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    const int x = 32 * warp + 8 * t + pair;
    *reinterpret_cast<float2*>(&results.s_do[row][x]) = {s_do[t][0], s_do[t][1]};
    *reinterpret_cast<float2*>(&results.s_do[row + 8][x]) = {s_do[t][2], s_do[t][3]};
    *reinterpret_cast<float2*>(&results.s_w[row][x]) = {s_w[t][0], s_w[t][1]};
    *reinterpret_cast<float2*>(&results.s_w[row + 8][x]) = {s_w[t][2], s_w[t][3]};
    *reinterpret_cast<float2*>(&results.ds_u[row][x]) = {ds_u[t][0], ds_u[t][1]};
    *reinterpret_cast<float2*>(&results.ds_u[row + 8][x]) = {ds_u[t][2], ds_u[t][3]};
    dgamma[t] += __shfl_xor_sync(~0u, dgamma[t], 1);
    dgamma[t] += __shfl_xor_sync(~0u, dgamma[t], 2);
    if (lane % 4 == 0) results.dgamma[32 * warp + 8 * t + row] = dgamma[t];
  }
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    dbeta[e] += __shfl_xor_sync(~0u, dbeta[e], 1);
    dbeta[e] += __shfl_xor_sync(~0u, dbeta[e], 2);
    if (lane % 4 == 0) results.dbeta[warp][row + 8 * e] = dbeta[e];
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    float2& to = results.da_db[row + e / 2 * 8][warp % 2 * 8 + pair + e % 2];
    (warp < 2 ? to.y : to.x) = small[e];
  }
  __syncthreads();

#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int i = tid / 8, piece = tid % 8 + 8 * e;
    if (i < n && piece * 8 < o.dv)
      *reinterpret_cast<uint4*>(o.dv_ + at_v + i * ld_v + piece * 8) =
          *reinterpret_cast<const uint4*>(m.ds + tile_offset(i, piece));
  }
  if (tid < n)
    o.dbeta[(chunk.row + tid) * o.heads + head] =
        (results.dbeta[0][tid] + results.dbeta[1][tid]) + (results.dbeta[2][tid] + results.dbeta[3][tid]);

  // A channel of the keys to a thread.
  float dq[kChunk], dk[kChunk], dg[kChunk];
  float gamma = 1.0f;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    alpha[i] = __expf(alpha[i]);
    gamma *= alpha[i];
    dg[i] = gamma;
  }
  float flow = results.dgamma[tid];  // the gradient of Gamma_i
#pragma unroll
  for (int i = kChunk - 1; i >= 0; --i) {
    const float dgq = results.s_do[i][tid], dgk = results.s_w[i][tid], db = results.da_db[i][i].y;
    flow = __fmaf_rn(low_of(kq[i]), dgk, __fmaf_rn(high_of(kq[i]), dgq, flow));
    dq[i] = __fmaf_rn(dg[i], dgq, db * low_of(kq[i]));
    dk[i] = __fmaf_rn(dg[i], dgk, db * high_of(kq[i]));
    dg[i] *= flow;
    flow *= alpha[i];
  }
#pragma unroll
  for (int j = 0; j < kChunk; ++j) {
    float decayed[kChunk];  // K~_j as row i reads it
    decayed[j] = low_of(kq[j]);
#pragma unroll
    for (int i = j + 1; i < kChunk; ++i) decayed[i] = decayed[i - 1] * alpha[i];
    float dkey = results.ds_u[j][tid];
#pragma unroll
    for (int i = kChunk - 1; i > j; --i) {
      const float2 d = results.da_db[i][j];
      dq[i] = __fmaf_rn(d.y, decayed[i], dq[i]);
      dk[i] = __fmaf_rn(d.x, decayed[i], dk[i]);
      dkey = __fmaf_rn(d.x, low_of(kq[i]), __fmaf_rn(d.y, high_of(kq[i]), dkey));
      dg[i] = __fmaf_rn(dkey, decayed[i], dg[i]);
      dkey *= alpha[i];
    }
    dk[j] += dkey;
  }
  if (tid >= o.dk) return;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    if (i >= n) break;
    o.dq[at_k + i * ld_k] = from_float<bf16>(dq[i]);
    o.dk_[at_k + i * ld_k] = from_float<bf16>(dk[i]);
    o.dg[at_k + i * ld_k] = dg[i];
  }
}

}  // namespace

void launch_finish(Device& dev, const Operands& o) {
  allow_shared_memory(finish_kernel, sizeof(Shared));
  finish_kernel<<<dim3(static_cast<unsigned>(o.heads), static_cast<unsigned>(o.slot1 - o.slot0)), kThreads,
                  sizeof(Shared), dev.stream()>>>(o);
  PERIGEE_LAUNCHED();
}

}  // namespace perigee::kernels::kda_grad
