// First kernel: what the scan needs to know of each chunk of each head, every chunk on its own. As KDA's
// (kernels/kda/kda_bf16_intra.cu): rows i and j meet at r, i with the bits below the highest in which they differ cleared.
// b_i reads before its row's decay, so keys and removals are decayed to r - 1, b_i from there to i - 1, q_i from there to i:
// products of factors at most 1, and on either side eight rows of two vectors: b and q by k and a.
#include "kernels/dplr/dplr_bf16.cuh"
#include "kernels/kda/kda_bf16_intra.cuh"

namespace perigee::kernels::dplr {

using namespace kda;

namespace {

constexpr int kThreads =
    64;  // a thread has two neighbouring channels of all rows; a warp has half of the channels
constexpr int kTeller = 32;   // the thread that stores records and announces them
constexpr int kPitch = 144;   // bytes between rows of 64 channels: rows start in different banks
constexpr int kProducts = 8;  // of the levels: by k and by a of each; four more are the diagonals

struct Shared {
  uint8_t record[Record::kBytes];
  uint8_t rows[2][32 * kPitch];
  float other_b[kProducts][2][32];  // sums over the second half of the channels, which the first warp adds
  float other_q[kProducts + 4][2][32];  // sums over the first half, which the second warp adds
  float e[kChunk][20];                  // e[j][i]
};

struct Rows {
  unsigned q[kChunk], k[kChunk], a[kChunk], b[kChunk];  // two channels each
  float2 decay[kChunk];                                 // exp(g)
};

// Rows [0, 16) by rows [16, 24) and [24, 32) of a warp's half of the channels: each one chain, channels ascending.
__device__ __forceinline__ void multiply(unsigned rows, int lane, C4 (&c)[2]) {
  c[0] = c[1] = {};
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {
    unsigned left[4], right[4];
    load_matrices(left, rows + (16 + (lane & 7)) * kPitch + pair * 64 + (lane >> 3) * 16);
    load_matrices(right, rows + (24 + (lane & 7)) * kPitch + pair * 64 + (lane >> 3) * 16);
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      A4 a;
      load_matrices(a.x, rows + (lane & 15) * kPitch + pair * 64 + step * 32 + (lane >> 4) * 16);
      mma(c[0], a, left[2 * step], left[2 * step + 1]);
      mma(c[1], a, right[2 * step], right[2 * step + 1]);
    }
  }
}

// b and q of the later rows by k (first product) and a (second) of the earlier ones.
template <int L>
__device__ __forceinline__ void level(const Rows& x, uint8_t* rows, unsigned rows_address, int lane,
                                      C4 (&c)[2]) {
  unsigned* at = reinterpret_cast<unsigned*>(rows) + lane;
  __syncwarp();
#pragma unroll
  for (int block = 0; block < 8 / L; ++block) {
    const int r = 2 * L * block + L;
    float2 s = {1.0f, 1.0f};
#pragma unroll
    for (int j = r - 1; j >= r - L; --j) {
      if (j == r - 2) s = x.decay[r - 1];
      if (j < r - 2) s = s * x.decay[j + 1];
      const int to = (16 + L * block + j - (r - L)) * (kPitch / 4);
      at[to] = j == r - 1 ? x.k[j] : scale(x.k[j], s);
      at[to + 8 * (kPitch / 4)] = j == r - 1 ? x.a[j] : scale(x.a[j], s);
    }
    s = x.decay[r];
    at[L * block * (kPitch / 4)] = x.b[r];
    at[(8 + L * block) * (kPitch / 4)] = scale(x.q[r], s);
#pragma unroll
    for (int i = r + 1; i < r + L; ++i) {
      at[(L * block + i - r) * (kPitch / 4)] = scale(x.b[i], s);
      s = s * x.decay[i];
      at[(8 + L * block + i - r) * (kPitch / 4)] = scale(x.q[i], s);
    }
  }
  __syncwarp();
  multiply(rows_address, lane, c);
}

// q of all rows by `right` of all rows, of which the diagonal is wanted.
__device__ __forceinline__ void diagonal(const Rows& x, const unsigned (&right)[kChunk], uint8_t* rows,
                                         unsigned rows_address, int lane, C4 (&c)[2]) {
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    reinterpret_cast<unsigned*>(rows)[i * (kPitch / 4) + lane] = x.q[i];
    reinterpret_cast<unsigned*>(rows)[(16 + i) * (kPitch / 4) + lane] = right[i];
  }
  __syncwarp();
  multiply(rows_address, lane, c);
}

__global__ void __maxnreg__(168) intra_kernel(const Problem p) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) uint8_t memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  wait_for_previous();
  let_next_start();  // the scan starts beside this kernel and waits for records one by one
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const int pair = 32 * warp + lane;
  const bool inside = 2 * pair < p.dk;
  const int64_t row_words = static_cast<int64_t>(p.heads) * p.dk / 2;
  uint8_t* const my_rows = shared.rows[warp];
  const unsigned rows_address = shared_address(my_rows);
  const int items = (p.slot_end - p.slot_begin) * p.heads;
  unsigned* pending = nullptr;
  // Where the next item stands is read while this one is computed.
  int2 next = {-1, 0};
  DeviceSlice next_slice = {};
  const auto look_up = [&](int item) {
    next.x = -1;
    if (item < items) next = p.table[p.slot_begin + item / p.heads];
    if (next.x >= 0) next_slice = p.batch.slice[next.x];
  };
  look_up(blockIdx.x);

  for (int item = blockIdx.x; item < items; item += gridDim.x) {
    const int slot = p.slot_begin + item / p.heads, head = item % p.heads;
    const int2 entry = next;
    const DeviceSlice slice = next_slice;
    look_up(item + static_cast<int>(gridDim.x));
    if (entry.x < 0) continue;
    const ChunkRows own(slice, entry.y);

    Rows x;
    {
      const int64_t at = own.row0 * row_words + head * (p.dk / 2) + pair;
      const unsigned *q = reinterpret_cast<const unsigned*>(p.q) + at,
                     *k = reinterpret_cast<const unsigned*>(p.k) + at;
      const unsigned *a = reinterpret_cast<const unsigned*>(p.a) + at,
                     *b = reinterpret_cast<const unsigned*>(p.b) + at;
      const float2* g = reinterpret_cast<const float2*>(p.g) + at;
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        x.q[i] = x.k[i] = x.a[i] = x.b[i] = 0;
        x.decay[i] = {0.0f, 0.0f};
        if (inside && i >= own.first && i < own.last) {
          x.q[i] = __ldg(q + i * row_words);
          x.k[i] = __ldg(k + i * row_words);
          x.a[i] = __ldg(a + i * row_words);
          x.b[i] = __ldg(b + i * row_words);
          x.decay[i] = __ldg(g + i * row_words);
        }
      }
    }
    if (own.first > 0) {
      const uint8_t* state = p.state(entry.x, head) + pair * 4;
#pragma unroll
      for (int i = 0; i < kChunk; ++i)
        if (i < own.first && inside) {
          x.k[i] = *reinterpret_cast<const unsigned*>(state + StateLayout::kKeys + i * 256);
          x.a[i] = *reinterpret_cast<const unsigned*>(state + StateLayout::kRemovals + i * 256);
          x.b[i] = *reinterpret_cast<const unsigned*>(state + StateLayout::kReads + i * 256);
          x.decay[i] = *reinterpret_cast<const float2*>(state + pair * 4 + StateLayout::kGates + i * 512);
        }
    }
    if (threadIdx.x == kTeller && pending != nullptr) announce(pending);  // while the rows come
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kChunk; ++i) x.decay[i] = {decay_of(x.decay[i].x), decay_of(x.decay[i].y)};

    // Gamma . B, Gamma . Q, and K and A at the end; a chunk that stays open leaves S as it is.
    const bool closes = own.last == kChunk;
    {
      const auto put = [&](int tile, int row, unsigned value) {
        *reinterpret_cast<unsigned*>(shared.record + tile + row * 128 + (((lane >> 2) ^ (row & 7)) << 4) +
                                     (lane & 3) * 4) = value;
      };
      float2 s = x.decay[0];
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        put(Record::kGammaBQ + 4096 * warp, i, i == 0 ? x.b[0] : scale(x.b[i], s));
        if (i > 0) s = s * x.decay[i];
        put(Record::kGammaBQ + 4096 * warp, i + 16, scale(x.q[i], s));
      }
      const int block = pair >> 3, t = pair & 3, high = (pair >> 2) & 1;
      *reinterpret_cast<float2*>(shared.record + Record::kGamma + (block * 16 + t * 4 + high * 2) * 4) =
          closes ? s : float2{1.0f, 1.0f};
      s = x.decay[15];
      put(Record::kKeysAtEnd + 2048 * warp, 15, closes ? x.k[15] : 0u);
      put(Record::kRemovalsAtEnd + 2048 * warp, 15, closes ? x.a[15] : 0u);
#pragma unroll
      for (int j = 14; j >= 0; --j) {
        if (j < 14) s = s * x.decay[j + 1];
        put(Record::kKeysAtEnd + 2048 * warp, j, closes ? scale(x.k[j], s) : 0u);
        put(Record::kRemovalsAtEnd + 2048 * warp, j, closes ? scale(x.a[j], s) : 0u);
      }
    }

    // Of each product the first warp finishes the rows of b, the second those of q.
    float mine[kProducts + 4][2];
    const auto exchange = [&](int l, const C4& c) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        mine[l][e] = warp == 0 ? c.x[e] : c.x[2 + e];
        (warp == 0 ? shared.other_q : shared.other_b)[l][e][lane] = warp == 0 ? c.x[2 + e] : c.x[e];
      }
    };
    if (next.x >= 0) {  // the next item's rows come nearer: 16 rows x 12 lines, three lines a thread
      const ChunkRows rows(next_slice, next.y);
      const int row = threadIdx.x >> 2, line = threadIdx.x & 3;
      const int64_t at = (rows.row0 + row) * p.heads * p.dk + (item + gridDim.x) % p.heads * p.dk;
      if (row >= rows.first && row < rows.last && 32 * line < p.dk) {
        prefetch_l2(p.g + at + 32 * line);
        if (64 * (line & 1) < p.dk) {
          prefetch_l2((line < 2 ? p.k : p.q) + at + 64 * (line & 1));
          prefetch_l2((line < 2 ? p.a : p.b) + at + 64 * (line & 1));
        }
      }
    }
    C4 c[2];
    level<8>(x, my_rows, rows_address, lane, c);
    exchange(0, c[0]), exchange(1, c[1]);
    level<4>(x, my_rows, rows_address, lane, c);
    exchange(2, c[0]), exchange(3, c[1]);
    level<2>(x, my_rows, rows_address, lane, c);
    exchange(4, c[0]), exchange(5, c[1]);
    level<1>(x, my_rows, rows_address, lane, c);
    exchange(6, c[0]), exchange(7, c[1]);
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      diagonal(x, which == 0 ? x.k : x.a, my_rows, rows_address, lane, c);
#pragma unroll
      for (int half = 0; half < 2; ++half)  // of the second product the rows 8..15 count
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          mine[kProducts + 2 * which + half][e] = c[half].x[2 * half + e];
          if (warp == 0) shared.other_q[kProducts + 2 * which + half][e][lane] = c[half].x[2 * half + e];
        }
    }
    // What is above the diagonals is zero.
    if (warp == 0) {
      *reinterpret_cast<uint4*>(shared.record + Record::kC + lane * 16) = make_uint4(0, 0, 0, 0);
    } else {
      *reinterpret_cast<uint4*>(shared.record + Record::kF + lane * 16) = make_uint4(0, 0, 0, 0);
      *reinterpret_cast<uint4*>(shared.record + Record::kH + lane * 16) = make_uint4(0, 0, 0, 0);
    }
    __syncthreads();
    if (warp == 0) {
      const auto add_level = [&](auto level_rows, int l) {
        elements<decltype(level_rows)::value>(lane, [&](int i, int j, int e) {
          put_half(shared.record + Record::kC, i, j, mine[l][e] + shared.other_b[l][e][lane]);
          shared.e[j][i] = mine[l + 1][e] + shared.other_b[l + 1][e][lane];
        });
      };
      add_level(std::integral_constant<int, 8>(), 0), add_level(std::integral_constant<int, 4>(), 2);
      add_level(std::integral_constant<int, 2>(), 4), add_level(std::integral_constant<int, 1>(), 6);
      __syncwarp();
      // Column by column: T_i = e_i - sum over j < i of E_ij T_j, j ascending.
      const int column = lane & 15;
      float row[kChunk];
#pragma unroll
      for (int i = 0; i < kChunk; ++i) row[i] = i == column ? 1.0f : 0.0f;
#pragma unroll
      for (int j = 0; j < kChunk - 1; ++j) {
#pragma unroll
        for (int i = (j + 1) & ~3; i < kChunk; i += 4) {
          const float4 e = *reinterpret_cast<const float4*>(&shared.e[j][i]);
          if (i > j) row[i] = __fmaf_rn(-e.x, row[j], row[i]);
          if (i + 1 > j) row[i + 1] = __fmaf_rn(-e.y, row[j], row[i + 1]);
          if (i + 2 > j) row[i + 2] = __fmaf_rn(-e.z, row[j], row[i + 2]);
          if (i + 3 > j) row[i + 3] = __fmaf_rn(-e.w, row[j], row[i + 3]);
        }
      }
      if (lane < 16)
#pragma unroll
        for (int i = 0; i < kChunk; ++i) put_half(shared.record + Record::kT, i, column, -row[i]);
    } else {
      const auto add_level = [&](auto level_rows, int l) {
        elements<decltype(level_rows)::value>(lane, [&](int i, int j, int e) {
          put_half(shared.record + Record::kF, i, j, shared.other_q[l][e][lane] + mine[l][e]);
          put_half(shared.record + Record::kH, i, j, shared.other_q[l + 1][e][lane] + mine[l + 1][e]);
        });
      };
      add_level(std::integral_constant<int, 8>(), 0), add_level(std::integral_constant<int, 4>(), 2);
      add_level(std::integral_constant<int, 2>(), 4), add_level(std::integral_constant<int, 1>(), 6);
#pragma unroll
      for (int which = 0; which < 4; ++which)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int i = (lane >> 2) + 8 * (which & 1), l = kProducts + which;
          if ((lane >> 2) == 2 * (lane & 3) + e)
            put_half(shared.record + (which < 2 ? Record::kF : Record::kH), i, i,
                     shared.other_q[l][e][lane] + mine[l][e]);
        }
    }
    fence_shared_for_copy();
    __syncthreads();
    if (threadIdx.x == kTeller) {
      const int64_t place = static_cast<int64_t>(slot - p.slot_begin) * p.heads + head;
      bulk_store(p.records + place * Record::kBytes, shared.record, Record::kBytes);
      pending = p.ready + static_cast<int64_t>(slot) * p.heads + head;
    }
  }
  if (threadIdx.x == kTeller && pending != nullptr) announce(pending);
#endif
}

}  // namespace

void launch_intra(Device& dev, const Problem& p) {
  allow_shared_memory(intra_kernel, sizeof(Shared));
  PERIGEE_CUDA(cudaFuncSetAttribute(intra_kernel, cudaFuncAttributePreferredSharedMemoryCarveout, 100));
  const int64_t items = static_cast<int64_t>(p.slot_end - p.slot_begin) * p.heads;
  // As many blocks as stand on the chip at once. Two on a multiprocessor would leave room for the scan beside them, which
  // takes as long in all.
  const int64_t blocks = int64_t{6} * dev.info().multiprocessors;
  launch_dependent(intra_kernel, dim3(static_cast<unsigned>(items < blocks ? items : blocks)), dim3(kThreads),
                   sizeof(Shared), dev.stream(), p);
}

}  // namespace perigee::kernels::dplr
