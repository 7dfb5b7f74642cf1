// Third step of the bf16 backward: the gradients of a chunk from its S, dS', V, W, z and dO. One block of four warps per
// chunk and head.
//   dV = K~ dS' + Fᵀ dO + Cᵀ z;  dC = z Vᵀ, dE = z Wᵀ, dF = dO Vᵀ, dH = dO Wᵀ;
//   dO Sᵀ, z Sᵀ, V dS'ᵀ, W dS'ᵀ [16, dk], rowsum(S . dS') [dk]                                      on the tensor cores
// then a thread takes one channel of the keys through the chain of decays and back in float32, as the float function
// does (kernels/dplr/backward.cpp).
#include "kernels/dplr/dplr_backward_bf16.cuh"

namespace perigee::kernels::dplr_grad {

namespace {

constexpr int kResultRow = kDim + 8;  // floats

struct Results {  // of the products
  float s_do[kChunk][kResultRow], s_z[kChunk][kResultRow], ds_v[kChunk][kResultRow], ds_w[kChunk][kResultRow];
  float4 inner[kChunk][kChunk];  // dc, de, df, dh
  float dgamma[kDim];
  std::byte dv[kTileBytes];
};
struct Shared {
  union {
    struct {
      std::byte s[kStateBytes];   // rows: keys
      std::byte ds[kStateBytes];  // fragments
    };
    Results results;  // once those have been read
  };
  std::byte dout[kTileBytes], v[kTileBytes];
  std::byte z[kTileBytes];  // fragments
};
static_assert(sizeof(Results) <= 2 * kStateBytes && 2 * (sizeof(Shared) + 1024) <= 228 * 1024);

__global__ void __launch_bounds__(kThreads, 2) finish_kernel(Operands o) {
  extern __shared__ __align__(1024) std::byte memory[];
  Shared& m = *reinterpret_cast<Shared*>(memory);
  const int head = blockIdx.x, slot = o.slot0 + static_cast<int>(blockIdx.y), slice = o.table[slot].x;
  if (slice < 0) return;
  const Chunk chunk(o.batch.slice[slice], slice, slot);
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, n = chunk.n;
  const int64_t ld_k = static_cast<int64_t>(o.heads) * o.dk, ld_v = static_cast<int64_t>(o.heads) * o.dv;
  const int64_t at_k = chunk.row * ld_k + static_cast<int64_t>(head) * o.dk + tid;
  const int64_t at_v = chunk.row * ld_v + static_cast<int64_t>(head) * o.dv;
  const int64_t at = static_cast<int64_t>(blockIdx.y) * o.heads + head;
  const std::byte* const record = o.records + at * Record::kBytes;
  const unsigned s = shared_address(m.s), dout = shared_address(m.dout), v = shared_address(m.v);
  copy_tile(s, kDim, o.states + (static_cast<int64_t>(slot) * o.heads + head) * o.dk * o.dv, o.dv, o.dk,
            o.dv);
  copy_flat(shared_address(m.ds), o.ds + at * kStateBytes, kStateBytes);
  copy_tile(dout, kChunk, o.dout + at_v, ld_v, n, o.dv);
  copy_tile(v, kChunk, o.in.v + at_v, ld_v, n, o.dv);
  copy_flat(shared_address(m.z), o.dx + at * kTileBytes, kTileBytes);
  copies_committed();
  float alpha[kChunk];              // first g
  unsigned ka[kChunk], bq[kChunk];  // k and b in the low half, a and q in the high
  const int row = lane / 4, pair = 2 * (lane % 4);
  Fragment w[kDim / 16];  // every warp needs all of it
#pragma unroll
  for (int i = 0; i < kDim / 16; ++i) w[i] = load_fragment(record + Record::kR, i, lane);
  {
    // All loads at once, of something present; then zeros for what is not.
    const int64_t from = at_k - tid + min(tid, o.dk - 1);
    unsigned short k[kChunk], a[kChunk], b[kChunk], q[kChunk];
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const int64_t at = from + min(i, n - 1) * ld_k;
      alpha[i] = o.in.g[at];
      k[i] = o.in.k[at].bits;
      a[i] = o.in.a[at].bits;
      b[i] = o.in.b[at].bits;
      q[i] = o.in.q[at].bits;
    }
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const bool present = i < n && tid < o.dk;
      alpha[i] = present ? alpha[i] : 0.0f;
      ka[i] = present ? k[i] | static_cast<unsigned>(a[i]) << 16 : 0u;
      bq[i] = present ? b[i] | static_cast<unsigned>(q[i]) << 16 : 0u;
    }
  }
  copies_done<0>();
  __syncthreads();

  // dV of 32 values of this warp.
  Fragment dv[2];
  {
    float sum[2][2][4] = {};
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i) {
      const Fragment k = load_fragment(record + Record::kKeys, i, lane);
#pragma unroll
      for (int p = 0; p < 2; ++p) {
        const Fragment d = load_fragment(m.ds, (2 * warp + p) * (kDim / 16) + i, lane);
        multiply(sum[p][0], k.r[0], k.r[1], k.r[2], k.r[3], d.r[0], d.r[2]);
        multiply(sum[p][1], k.r[0], k.r[1], k.r[2], k.r[3], d.r[1], d.r[3]);
      }
    }
    const Fragment c = load_fragment(record + Record::kC, 0, lane),
                   f = load_fragment(record + Record::kF, 0, lane);
#pragma unroll
    for (int p = 0; p < 2; ++p) {
      const Fragment d = load_block_transposed(block_address(dout, 0, 2 * warp + p, lane));
      const Fragment z = load_fragment(m.z, 2 * warp + p, lane);
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        multiply(sum[p][t], f.r[0], f.r[1], f.r[2], f.r[3], d.r[2 * t], d.r[2 * t + 1]);
        multiply(sum[p][t], c.r[0], c.r[1], c.r[2], c.r[3], transpose(z.r[2 * t]), transpose(z.r[2 * t + 1]));
        dv[p].r[2 * t] = pack(sum[p][t][0], sum[p][t][1]);
        dv[p].r[2 * t + 1] = pack(sum[p][t][2], sum[p][t][3]);
      }
    }
  }
  // Rows of the chunk by 32 keys of this warp; and one of the inner products.
  float s_do[4][4] = {}, s_z[4][4] = {}, ds_v[4][4] = {}, ds_w[4][4] = {}, inner[2][4] = {}, dgamma[4] = {};
#pragma unroll
  for (int i = 0; i < kDim / 16; ++i) {
    const Fragment d = load_block(block_address(dout, 0, i, lane)), z = load_fragment(m.z, i, lane);
    const Fragment values = load_block(block_address(v, 0, i, lane));
    const Fragment left = warp < 2 ? z : d, right = warp % 2 == 0 ? values : w[i];
    multiply(inner[0], left.r[0], left.r[1], left.r[2], left.r[3], right.r[0], right.r[2]);
    multiply(inner[1], left.r[0], left.r[1], left.r[2], left.r[3], right.r[1], right.r[3]);
#pragma unroll
    for (int p = 0; p < 2; ++p) {
      const Fragment a = load_block(block_address(s, 32 * warp + 16 * p, i, lane));
      const Fragment b = load_fragment(m.ds, i * (kDim / 16) + 2 * warp + p, lane);
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const unsigned a0 = a.r[t], a1 = a.r[2 + t], b0 = transpose(b.r[2 * t]),
                       b1 = transpose(b.r[2 * t + 1]);
        multiply(s_do[2 * p + t], d.r[0], d.r[1], d.r[2], d.r[3], a0, a1);
        multiply(s_z[2 * p + t], z.r[0], z.r[1], z.r[2], z.r[3], a0, a1);
        multiply(ds_v[2 * p + t], values.r[0], values.r[1], values.r[2], values.r[3], b0, b1);
        multiply(ds_w[2 * p + t], w[i].r[0], w[i].r[1], w[i].r[2], w[i].r[3], b0, b1);
        float& sum = dgamma[2 * p + t];
        sum = __fmaf_rn(low_of(a0), low_of(b0), sum);
        sum = __fmaf_rn(high_of(a0), high_of(b0), sum);
        sum = __fmaf_rn(low_of(a1), low_of(b1), sum);
        sum = __fmaf_rn(high_of(a1), high_of(b1), sum);
      }
    }
  }
  __syncthreads();  // S and dS' have been read: the results take their places
  Results& results = m.results;
  const unsigned dv_tile = shared_address(results.dv);
#pragma unroll
  for (int p = 0; p < 2; ++p)
    store_block(block_address(dv_tile, 0, 2 * warp + p, lane), dv[p].r[0], dv[p].r[1], dv[p].r[2],
                dv[p].r[3]);
#pragma unroll
  for (int t = 0; t < 4; ++t) {
    const int x = 32 * warp + 8 * t + pair;
    const auto put = [&](float(&to)[kChunk][kResultRow], const float(&from)[4]) {
      *reinterpret_cast<float2*>(&to[row][x]) = {from[0], from[1]};
      *reinterpret_cast<float2*>(&to[row + 8][x]) = {from[2], from[3]};
    };
    put(results.s_do, s_do[t]), put(results.s_z, s_z[t]), put(results.ds_v, ds_v[t]),
        put(results.ds_w, ds_w[t]);
    dgamma[t] += __shfl_xor_sync(~0u, dgamma[t], 1);
    dgamma[t] += __shfl_xor_sync(~0u, dgamma[t], 2);
    if (lane % 4 == 0) results.dgamma[32 * warp + 8 * t + row] = dgamma[t];
  }
#pragma unroll
  for (int t = 0; t < 2; ++t)
#pragma unroll
    for (int e = 0; e < 4; ++e)
      reinterpret_cast<float*>(&results.inner[row + e / 2 * 8][8 * t + pair + e % 2])[warp] = inner[t][e];
  __syncthreads();

#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int i = tid / 8, piece = tid % 8 + 8 * e;
    if (i < n && piece * 8 < o.dv)
      *reinterpret_cast<uint4*>(o.out.dv + at_v + i * ld_v + piece * 8) =
          *reinterpret_cast<const uint4*>(results.dv + tile_offset(i, piece));
  }

  // A channel of the keys to a thread.
  float dq[kChunk], db[kChunk], dg[kChunk];
  float gamma = 1.0f;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    db[i] = gamma * results.s_z[i][tid];
    alpha[i] = __expf(alpha[i]);
    gamma *= alpha[i];
    dg[i] = gamma;
  }
  float flow = results.dgamma[tid];  // the gradient of Gamma after row i, then before it
#pragma unroll
  for (int i = kChunk - 1; i >= 0; --i) {
    const float dgq = results.s_do[i][tid];
    flow = __fmaf_rn(high_of(bq[i]), dgq, flow);
    dq[i] = dg[i] * dgq;
    dg[i] *= flow;
    flow = __fmaf_rn(low_of(bq[i]), results.s_z[i][tid], flow * alpha[i]);
  }
  const bool mine = tid < o.dk;
#pragma unroll
  for (int j = 0; j < kChunk; ++j) {
    float key[kChunk], removal[kChunk];  // K~_j and A~_j after row i's decay
    key[j] = low_of(ka[j]);
    removal[j] = high_of(ka[j]);
#pragma unroll
    for (int i = j + 1; i < kChunk; ++i) {
      key[i] = key[i - 1] * alpha[i];
      removal[i] = removal[i - 1] * alpha[i];
    }
    float dkey = results.ds_v[j][tid], dremoval = results.ds_w[j][tid];
#pragma unroll
    for (int i = kChunk - 1; i >= j; --i) {
      const float4 d = results.inner[i][j];
      const float b = low_of(bq[i]), q = high_of(bq[i]);
      dq[i] = __fmaf_rn(d.z, key[i], __fmaf_rn(d.w, removal[i], dq[i]));
      dkey = __fmaf_rn(d.z, q, dkey);
      dremoval = __fmaf_rn(d.w, q, dremoval);
      if (i == j) break;
      dg[i] = __fmaf_rn(dkey, key[i], __fmaf_rn(dremoval, removal[i], dg[i]));
      db[i] = __fmaf_rn(d.x, key[i - 1], __fmaf_rn(d.y, removal[i - 1], db[i]));
      dkey = __fmaf_rn(d.x, b, dkey * alpha[i]);
      dremoval = __fmaf_rn(d.y, b, dremoval * alpha[i]);
    }
    if (mine && j < n) {
      o.out.dk[at_k + j * ld_k] = from_float<bf16>(dkey);
      o.out.da[at_k + j * ld_k] = from_float<bf16>(dremoval);
    }
  }
  if (!mine) return;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    if (i >= n) break;
    o.out.dq[at_k + i * ld_k] = from_float<bf16>(dq[i]);
    o.out.db[at_k + i * ld_k] = from_float<bf16>(db[i]);
    o.out.dg[at_k + i * ld_k] = dg[i];
  }
}

}  // namespace

void launch_finish(Device& dev, const Operands& o) {
  allow_shared_memory(finish_kernel, sizeof(Shared));
  finish_kernel<<<dim3(static_cast<unsigned>(o.heads), static_cast<unsigned>(o.slot1 - o.slot0)), kThreads,
                  sizeof(Shared), dev.stream()>>>(o);
  PERIGEE_LAUNCHED();
}

}  // namespace perigee::kernels::dplr_grad
