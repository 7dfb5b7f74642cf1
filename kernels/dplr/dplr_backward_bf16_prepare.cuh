// First step of the bf16 backward: what of a chunk does not depend on the gradient of its last state, from the records of
// the forward's first kernel. One block of four warps per chunk and head. Included by dplr_backward_bf16.cu alone.
//   W = T ((Gamma B) S + C V),  X0 = Tᵀ Hᵀ dO,  Wa = Tᵀ A~  (T with the sign);  z = X0 + Wa dS'
#pragma once
#include "kernels/dplr/dplr_backward_bf16.cuh"

namespace perigee::kernels::dplr_grad::prepare {

struct Shared {
  std::byte s[kStateBytes];
  std::byte dout[kTileBytes], v[kTileBytes], wa[kTileBytes];
  std::byte forward[dplr::Record::kBytes];
};

// The address that this lane gives for sixteen channels of sixteen rows, where halves of the channels lie half_bytes apart.
__device__ __forceinline__ unsigned panel_address(unsigned rows, int half_bytes, int panel, int lane) {
  const int row = lane & 15, piece = 2 * (panel % 4) + (lane >> 4);
  return rows + panel / 4 * half_bytes + row * 128 + ((piece ^ (row & 7)) << 4);
}
// Of a matrix of 16 x 16 in four pieces of 8 x 8, the rows' first.
__device__ __forceinline__ unsigned small_address(unsigned matrix, int lane) {
  const int piece = lane >> 3;
  return matrix + ((piece & 1) * 2 + (piece >> 1)) * 128 + (lane & 7) * 16;
}

__device__ __forceinline__ void run(const Operands& o, std::byte* memory, int head, int slot) {
  Shared& m = *reinterpret_cast<Shared*>(memory);
  const int slice = o.table[slot].x;
  if (slice < 0) return;
  const Chunk chunk(o.batch.slice[slice], slice, slot);
  const int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, n = chunk.n;
  const int64_t ld_v = static_cast<int64_t>(o.heads) * o.dv,
                at = static_cast<int64_t>(slot - o.slot0) * o.heads + head;
  const int64_t at_v = chunk.row * ld_v + static_cast<int64_t>(head) * o.dv;
  const unsigned s = shared_address(m.s), dout = shared_address(m.dout), v = shared_address(m.v),
                 wa = shared_address(m.wa), forward = shared_address(m.forward);
  copy_tile(s, kDim, o.states + (static_cast<int64_t>(slot) * o.heads + head) * o.dk * o.dv, o.dv, o.dk,
            o.dv);
  copy_tile(v, kChunk, o.in.v + at_v, ld_v, n, o.dv);
  copy_tile(dout, kChunk, o.dout + at_v, ld_v, n, o.dv);
  copy_flat(forward, reinterpret_cast<const std::byte*>(o.forward) + at * dplr::Record::kBytes,
            dplr::Record::kBytes);
  copies_committed();
  copies_done<0>();
  __syncthreads();

  std::byte* const record = o.records + at * Record::kBytes;
  // Transposed products: the rows are sixteen columns of the values (for Wa: of the keys), the columns the chunk's rows.
  const Fragment t = load_block(small_address(forward + dplr::Record::kT, lane));
  const Fragment t_across = load_block_transposed(small_address(forward + dplr::Record::kT, lane));
  const Fragment c = load_block(small_address(forward + dplr::Record::kC, lane));
  const Fragment h = load_block_transposed(small_address(forward + dplr::Record::kH, lane));
  if (warp == 0) {
    const Fragment x = load_block_transposed(small_address(forward + dplr::Record::kC, lane));
    store_fragment(record + Record::kC, 0, lane, x.r[0], x.r[2], x.r[1], x.r[3]);
  } else if (warp == 1) {
    const Fragment x = load_block_transposed(small_address(forward + dplr::Record::kF, lane));
    store_fragment(record + Record::kF, 0, lane, x.r[0], x.r[2], x.r[1], x.r[3]);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int panel = 2 * warp + half;
    float y[2][4] = {}, w[2][4] = {}, dw[2][4] = {}, x0[2][4] = {}, a[2][4] = {};
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i) {
      const Fragment state = load_block_transposed(block_address(s, 16 * i, panel, lane));
      const Fragment b = load_block(panel_address(forward + dplr::Record::kGammaBQ, 4096, i, lane));
      multiply(y[0], state.r[0], state.r[2], state.r[1], state.r[3], b.r[0], b.r[2]);
      multiply(y[1], state.r[0], state.r[2], state.r[1], state.r[3], b.r[1], b.r[3]);
    }
    const Fragment vt = load_block_transposed(block_address(v, 0, panel, lane));
    multiply(y[0], vt.r[0], vt.r[2], vt.r[1], vt.r[3], c.r[0], c.r[2]);
    multiply(y[1], vt.r[0], vt.r[2], vt.r[1], vt.r[3], c.r[1], c.r[3]);
    const unsigned y0 = pack(y[0][0], y[0][1]), y1 = pack(y[0][2], y[0][3]), y2 = pack(y[1][0], y[1][1]),
                   y3 = pack(y[1][2], y[1][3]);
    multiply(w[0], y0, y1, y2, y3, t.r[0], t.r[2]);
    multiply(w[1], y0, y1, y2, y3, t.r[1], t.r[3]);
    store_fragment(record + Record::kR, panel, lane, transpose(pack(w[0][0], w[0][1])),
                   transpose(pack(w[1][0], w[1][1])), transpose(pack(w[0][2], w[0][3])),
                   transpose(pack(w[1][2], w[1][3])));

    const Fragment d = load_block_transposed(block_address(dout, 0, panel, lane));
    multiply(dw[0], d.r[0], d.r[2], d.r[1], d.r[3], h.r[0], h.r[1]);
    multiply(dw[1], d.r[0], d.r[2], d.r[1], d.r[3], h.r[2], h.r[3]);
    const unsigned u0 = pack(dw[0][0], dw[0][1]), u1 = pack(dw[0][2], dw[0][3]),
                   u2 = pack(dw[1][0], dw[1][1]), u3 = pack(dw[1][2], dw[1][3]);
    multiply(x0[0], u0, u1, u2, u3, t_across.r[0], t_across.r[1]);
    multiply(x0[1], u0, u1, u2, u3, t_across.r[2], t_across.r[3]);
    const Fragment removal =
        load_block_transposed(panel_address(forward + dplr::Record::kRemovalsAtEnd, 2048, panel, lane));
    multiply(a[0], removal.r[0], removal.r[2], removal.r[1], removal.r[3], t_across.r[0], t_across.r[1]);
    multiply(a[1], removal.r[0], removal.r[2], removal.r[1], removal.r[3], t_across.r[2], t_across.r[3]);
    std::byte* const values = record + Record::kHalf + panel / 4 * Record::kHalfBytes;
    store_fragment(values, panel % 4, lane, pack(x0[0][0], x0[0][1]), pack(x0[1][0], x0[1][1]),
                   pack(x0[0][2], x0[0][3]), pack(x0[1][2], x0[1][3]));
    store_fragment(values, 4 + panel % 4, lane, d.r[0], d.r[1], d.r[2], d.r[3]);
    store_block_transposed(block_address(wa, 0, panel, lane), pack(a[0][0], a[0][1]), pack(a[1][0], a[1][1]),
                           pack(a[0][2], a[0][3]), pack(a[1][2], a[1][3]));
    const Fragment key = load_block(panel_address(forward + dplr::Record::kKeysAtEnd, 2048, panel, lane));
    store_fragment(record + Record::kKeys, panel, lane, key.r[0], key.r[1], key.r[2], key.r[3]);
  }
  __syncthreads();
  // A row of a tile is the halves' rows one after the other: their pieces are exchanged alike.
  for (int i = tid; i < 3 * kTileBytes / 16; i += kThreads) {
    const int tile = i / (kTileBytes / 16), row = i / 16 % 16, half = i / 8 % 2, piece = i % 8;
    const std::byte* from =
        tile == 2 ? m.wa + i % (kTileBytes / 16) * 16
                  : m.forward + dplr::Record::kGammaBQ + half * 4096 + (16 * tile + row) * 128 + piece * 16;
    *reinterpret_cast<int4*>(record + i * 16) = *reinterpret_cast<const int4*>(from);
  }
  // The decay of channel tid; the forward's record has it per sixteen channels [t][n][2], of channels 8 n + 2 t.
  const int place = tid / 16 * 16 + tid / 2 % 4 * 4 + tid / 8 % 2 * 2 + tid % 2;
  reinterpret_cast<float*>(record + Record::kDecay)[tid] =
      reinterpret_cast<const float*>(m.forward + dplr::Record::kGamma)[place];
  if (tid < kChunk) reinterpret_cast<float*>(record + Record::kBeta)[tid] = -1.0f;
}

}  // namespace perigee::kernels::dplr_grad::prepare
