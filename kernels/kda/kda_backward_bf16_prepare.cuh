// First step of the bf16 backward: what of a chunk does not depend on the gradient of its last state. One block of four
// warps per chunk and head. Included by kda_backward_bf16.cu alone.
//   A_ij = k_i . K~_j (j < i), B_ij = q_i . K~_j (j <= i)          K~_j: key j decayed to row i; products of exp(g) <= 1
//   R = (I + A beta)^-1 (V - (Gamma K) S)                          U = beta R
//   X0 = (I + beta A)^-T Bᵀ dO,  W = (I + beta A)^-T K~            dX = X0 + W dS', and beta dX is dV
// Within eight rows A and B are summed in float32 without the tensor cores; the inverses are by forward substitution.
#pragma once
#include "kernels/kda/kda_backward_bf16.cuh"

namespace perigee::kernels::kda_grad::prepare {

constexpr int kSmallRow = 24;  // bf16 between the rows of a 16x16 matrix

struct Shared {
  std::byte s[kStateBytes];
  // As a record begins; K~ becomes W.
  std::byte gk[kTileBytes], gq[kTileBytes], kt[kTileBytes];
  float decay[kDim], beta[kChunk];
  std::byte dout[kTileBytes], v[kTileBytes];  // dout: first the late rows of cross_products
  std::byte early[kTileBytes / 2];
  float alpha[kChunk][kDim];
  bf16 k[kChunk][kDim], q[kChunk][kDim];
  float a[kChunk][kChunk], b[kChunk][kChunk];
  bf16 m_inverse[kChunk][kSmallRow], l_inverse[kChunk][kSmallRow], b_small[kChunk][kSmallRow];
};
static_assert(offsetof(Shared, decay) - offsetof(Shared, gk) == Record::kDecay);
static_assert(offsetof(Shared, beta) - offsetof(Shared, gk) == Record::kBeta);

__device__ __forceinline__ unsigned small_address(const bf16 (&m)[kChunk][kSmallRow], int lane) {
  return shared_address(&m[lane & 15][(lane >> 4) * 8]);
}

// Sums of four values over the warp; lane 8 i has the sum of value i.
__device__ __forceinline__ float reduce4(const float (&v)[4], int lane) {
  float w[2];
  const bool h16 = lane & 16, h8 = lane & 8;
#pragma unroll
  for (int i = 0; i < 2; ++i)
    w[i] = (h16 ? v[i + 2] : v[i]) + __shfl_xor_sync(~0u, h16 ? v[i] : v[i + 2], 16);
  float x = (h8 ? w[1] : w[0]) + __shfl_xor_sync(~0u, h8 ? w[0] : w[1], 8);
  x += __shfl_xor_sync(~0u, x, 4);
  x += __shfl_xor_sync(~0u, x, 2);
  x += __shfl_xor_sync(~0u, x, 1);
  return x;
}

__device__ __forceinline__ float4 load_four(const bf16* p) {
  const uint2 x = *reinterpret_cast<const uint2*>(p);
  return {low_of(x.x), high_of(x.x), low_of(x.y), high_of(x.y)};
}

// A and B within the first and within the last eight rows: warp w has the columns w and w + 4 of each, a lane four
// channels.
__device__ __forceinline__ void inner_products(Shared& m, int warp, int lane) {
  float4 kd[2] = {};  // zero until row j, then k_j
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    if (i == 8) kd[0] = kd[1] = {};
    const float4 alpha = *reinterpret_cast<const float4*>(&m.alpha[i][4 * lane]);
    const float4 k = load_four(&m.k[i][4 * lane]), q = load_four(&m.q[i][4 * lane]);
    float sums[4];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const bool own = warp + 4 * c == i % 8;
      kd[c] = {own ? k.x : kd[c].x * alpha.x, own ? k.y : kd[c].y * alpha.y, own ? k.z : kd[c].z * alpha.z,
               own ? k.w : kd[c].w * alpha.w};
      const float a = __fmaf_rn(k.x, kd[c].x, k.y * kd[c].y) + __fmaf_rn(k.z, kd[c].z, k.w * kd[c].w);
      sums[c] = own ? 0.0f : a;
      sums[2 + c] = __fmaf_rn(q.x, kd[c].x, q.y * kd[c].y) + __fmaf_rn(q.z, kd[c].z, q.w * kd[c].w);
    }
    const float sum = reduce4(sums, lane);
    if (lane % 8 == 0) (lane < 16 ? m.a : m.b)[i][i / 8 * 8 + warp + (lane & 8) / 2] = sum;
  }
}

// A and B of the last eight rows with the first eight, on the tensor cores: both sides decay to the end of row 7, the
// late rows forwards, the early ones backwards, so the factors are at most 1.
__device__ __forceinline__ void cross_products(Shared& m, int lane) {
  float c[4] = {};
#pragma unroll
  for (int i = 0; i < kDim / 16; ++i) {
    const Fragment late = load_block(block_address(shared_address(m.dout), 0, i, lane));
    const Fragment early = load_block(block_address(shared_address(m.early), 0, i, lane & 23));
    multiply(c, late.r[0], late.r[1], late.r[2], late.r[3], early.r[0], early.r[2]);
  }
  const int row = 8 + lane / 4, column = 2 * (lane % 4);
  m.a[row][column] = c[0];
  m.a[row][column + 1] = c[1];
  m.b[row][column] = c[2];
  m.b[row][column + 1] = c[3];
}

// Lanes 0 to 15: the columns of (I + A beta)^-1; lanes 16 to 31: those of (I + beta A)^-1.
__device__ __forceinline__ void invert(Shared& m, int lane) {
  const int column = lane & 15;
  const bool left = lane >= 16;
  float x[kChunk];  // for A beta: beta times the element
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    float4 a[4];
#pragma unroll
    for (int j = 0; j < i; j += 4) a[j / 4] = *reinterpret_cast<const float4*>(&m.a[i][j]);
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < i; ++j) {
      const float4& four = a[j / 4];
      sum = __fmaf_rn(j % 4 == 0 ? four.x : j % 4 == 1 ? four.y : j % 4 == 2 ? four.z : four.w, x[j], sum);
    }
    const float beta = m.beta[i], e = (i == column ? 1.0f : 0.0f) - (left ? beta * sum : sum);
    (left ? m.l_inverse : m.m_inverse)[i][column] = from_float<bf16>(e);
    x[i] = left ? e : beta * e;
  }
}

__device__ __forceinline__ void run(const Operands& o, std::byte* memory, int head, int slot) {
  Shared& m = *reinterpret_cast<Shared*>(memory);
  const int slice = o.slice_of[slot] - 1;
  if (slice < 0) return;
  const Chunk chunk(o.batch.slice[slice], slice, slot);
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, n = chunk.n;
  const int64_t ld_k = static_cast<int64_t>(o.heads) * o.dk, ld_v = static_cast<int64_t>(o.heads) * o.dv;
  const int64_t at_k = chunk.row * ld_k + static_cast<int64_t>(head) * o.dk;
  const int64_t at_v = chunk.row * ld_v + static_cast<int64_t>(head) * o.dv;
  const unsigned s = shared_address(m.s), gk = shared_address(m.gk), kt = shared_address(m.kt),
                 dout = shared_address(m.dout), v = shared_address(m.v);
  copy_tile(v, kChunk, o.v + at_v, ld_v, n, o.dv);
  copy_tile(s, kDim, o.states + (static_cast<int64_t>(slot) * o.heads + head) * o.dk * o.dv, o.dv, o.dk,
            o.dv);
  copies_committed();
  if (tid < kChunk) m.beta[tid] = tid < n ? o.beta[(chunk.row + tid) * o.heads + head] : 0.0f;
  {
    float alpha[kChunk], k[kChunk], q[kChunk];
    // All loads at once, of something present; then zeros for what is not.
    const int column = min(tid, o.dk - 1);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const int64_t at = at_k + min(i, n - 1) * ld_k + column;
      alpha[i] = o.g[at];
      k[i] = to_float(o.k[at]);
      q[i] = to_float(o.q[at]);
    }
#pragma unroll
    for (int i = 0; i < kChunk; ++i)
      if (i >= n || tid >= o.dk) alpha[i] = k[i] = q[i] = 0.0f;
    float gamma = 1.0f;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      alpha[i] = __expf(alpha[i]);
      gamma *= alpha[i];
      m.alpha[i][tid] = alpha[i];
      m.k[i][tid] = from_float<bf16>(k[i]);
      m.q[i][tid] = from_float<bf16>(q[i]);
      const int at = tile_offset(i, tid / 8) + tid % 8 * 2;
      *reinterpret_cast<bf16*>(m.gk + at) = from_float<bf16>(gamma * k[i]);
      *reinterpret_cast<bf16*>(m.gq + at) = from_float<bf16>(gamma * q[i]);
    }
    const auto at = [&](int row) { return tile_offset(row, tid / 8) + tid % 8 * 2; };
    float late = 1.0f, early = 1.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      late *= alpha[8 + i];
      *reinterpret_cast<bf16*>(m.dout + at(i)) = from_float<bf16>(late * k[8 + i]);
      *reinterpret_cast<bf16*>(m.dout + at(8 + i)) = from_float<bf16>(late * q[8 + i]);
    }
#pragma unroll
    for (int i = 7; i >= 0; --i) {
      *reinterpret_cast<bf16*>(m.early + at(i)) = from_float<bf16>(early * k[i]);
      early *= alpha[i];
    }
    m.decay[tid] = gamma;
    float rest = 1.0f;
#pragma unroll
    for (int i = kChunk - 1; i >= 0; --i) {
      *reinterpret_cast<bf16*>(m.kt + tile_offset(i, tid / 8) + tid % 8 * 2) = from_float<bf16>(rest * k[i]);
      rest *= alpha[i];
    }
  }
  __syncthreads();
  if (warp == 3) cross_products(m, lane);
  inner_products(m, warp, lane);
  __syncthreads();
  copy_tile(dout, kChunk, o.dout + at_v, ld_v, n, o.dv);
  copies_committed();
  if (warp == 0) {
    invert(m, lane);
  } else {
    for (int i = tid - 32; i < kChunk * kChunk; i += kThreads - 32)
      m.b_small[i / kChunk][i % kChunk] =
          from_float<bf16>(i % kChunk <= i / kChunk ? m.b[i / kChunk][i % kChunk] : 0.0f);
  }
  copies_done<0>();
  __syncthreads();

  std::byte* record = o.records + (static_cast<int64_t>(slot - o.slot0) * o.heads + head) * Record::kBytes;
  // Transposed products: the rows are sixteen columns of the values (for W: of the keys), the columns the chunk's rows.
  const Fragment m_inverse = load_block(small_address(m.m_inverse, lane));
  const Fragment l_inverse = load_block_transposed(small_address(m.l_inverse, lane));
  const Fragment b_small = load_block_transposed(small_address(m.b_small, lane));
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int panel = 2 * warp + half;
    float y[2][4] = {}, r[2][4] = {}, du[2][4] = {}, x0[2][4] = {}, w[2][4] = {};
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i) {
      const Fragment a = load_block_transposed(block_address(s, 16 * i, panel, lane));
      const Fragment b = load_block(block_address(gk, 0, i, lane));
      multiply(y[0], a.r[0], a.r[2], a.r[1], a.r[3], b.r[0], b.r[2]);
      multiply(y[1], a.r[0], a.r[2], a.r[1], a.r[3], b.r[1], b.r[3]);
    }
    const Fragment vt = load_block_transposed(block_address(v, 0, panel, lane));
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      y[t][0] = low_of(vt.r[t]) - y[t][0];
      y[t][1] = high_of(vt.r[t]) - y[t][1];
      y[t][2] = low_of(vt.r[2 + t]) - y[t][2];
      y[t][3] = high_of(vt.r[2 + t]) - y[t][3];
    }
    const unsigned y0 = pack(y[0][0], y[0][1]), y1 = pack(y[0][2], y[0][3]), y2 = pack(y[1][0], y[1][1]),
                   y3 = pack(y[1][2], y[1][3]);
    multiply(r[0], y0, y1, y2, y3, m_inverse.r[0], m_inverse.r[2]);
    multiply(r[1], y0, y1, y2, y3, m_inverse.r[1], m_inverse.r[3]);
    store_fragment(record + Record::kR, panel, lane, transpose(pack(r[0][0], r[0][1])),
                   transpose(pack(r[1][0], r[1][1])), transpose(pack(r[0][2], r[0][3])),
                   transpose(pack(r[1][2], r[1][3])));

    const Fragment d = load_block_transposed(block_address(dout, 0, panel, lane));
    multiply(du[0], d.r[0], d.r[2], d.r[1], d.r[3], b_small.r[0], b_small.r[1]);
    multiply(du[1], d.r[0], d.r[2], d.r[1], d.r[3], b_small.r[2], b_small.r[3]);
    const unsigned u0 = pack(du[0][0], du[0][1]), u1 = pack(du[0][2], du[0][3]),
                   u2 = pack(du[1][0], du[1][1]), u3 = pack(du[1][2], du[1][3]);
    multiply(x0[0], u0, u1, u2, u3, l_inverse.r[0], l_inverse.r[1]);
    multiply(x0[1], u0, u1, u2, u3, l_inverse.r[2], l_inverse.r[3]);
    const Fragment k = load_block_transposed(block_address(kt, 0, panel, lane));
    multiply(w[0], k.r[0], k.r[2], k.r[1], k.r[3], l_inverse.r[0], l_inverse.r[1]);
    multiply(w[1], k.r[0], k.r[2], k.r[1], k.r[3], l_inverse.r[2], l_inverse.r[3]);
    std::byte* const values = record + Record::kHalf + panel / 4 * Record::kHalfBytes;
    store_fragment(values, panel % 4, lane, pack(x0[0][0], x0[0][1]), pack(x0[1][0], x0[1][1]),
                   pack(x0[0][2], x0[0][3]), pack(x0[1][2], x0[1][3]));
    store_fragment(values, 4 + panel % 4, lane, d.r[0], d.r[1], d.r[2], d.r[3]);
    __syncwarp();  // all lanes have read the block of K~
    store_block_transposed(block_address(kt, 0, panel, lane), pack(w[0][0], w[0][1]), pack(w[1][0], w[1][1]),
                           pack(w[0][2], w[0][3]), pack(w[1][2], w[1][3]));
  }
  __syncthreads();
  for (int i = tid * 16; i < Record::kKeyBytes; i += kThreads * 16)
    *reinterpret_cast<int4*>(record + i) = *reinterpret_cast<const int4*>(m.gk + i);
}

}  // namespace perigee::kernels::kda_grad::prepare
