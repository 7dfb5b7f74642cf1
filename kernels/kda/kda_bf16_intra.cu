// Prefill, first kernel: what the scan needs to know of each chunk of each head, every chunk on its own.
//
// The products k_i . K~_j and q_i . K~_j with K~_j = key j decayed from row j to row i, for j < i, by tensor cores and
// without overflow for any decay: let L be the highest bit in which i and j differ and r = i with the bits below L
// cleared, so j < r <= i. Row i is decayed from r to i, row j from j to r; both factors are products of decays, at most 1,
// and for a given L every row stands on one side: four products of sixteen rows (8 keys and 8 queries) by 8 rows.
#include "kernels/kda/kda_bf16_intra.cuh"
#include "kernels/kda/kda_bf16_scan.cuh"

namespace perigee::kernels::kda {
namespace {

constexpr int kThreads = 64;  // a thread has two neighbouring channels of all rows; a warp has half of the channels
constexpr int kTeller = 32;   // the thread that stores records and announces them
constexpr int kPitch = 144;   // bytes between rows of 64 channels: rows start in different banks

struct Shared {
  uint8_t record[Record::kBytes];
  uint8_t rows[2][32 * kPitch];
  float other_k[6][2][32];  // sums over the second half of the channels, which the first warp adds
  float other_q[6][2][32];  // sums over the first half, which the second warp adds
  float a[kChunk][20];      // a[j][i]
};

// Rows [0,16) by rows [16,24) of a warp's half of the channels: one chain, channels ascending.
__device__ __forceinline__ C4 multiply(unsigned rows, int lane) {
  C4 c = {};
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {
    unsigned b[4];
    load_matrices(b, rows + (16 + (lane & 7)) * kPitch + pair * 64 + (lane >> 3) * 16);
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      A4 a;
      load_matrices(a.x, rows + (lane & 15) * kPitch + pair * 64 + step * 32 + (lane >> 4) * 16);
      mma(c, a, b[2 * step], b[2 * step + 1]);
    }
  }
  return c;
}

struct Rows {
  unsigned k[kChunk], q[kChunk];  // two channels each
  float2 a[kChunk];               // exp(g)
};

template <int L>
__device__ __forceinline__ C4 level(const Rows& x, uint8_t* rows, unsigned rows_address, int lane) {
  unsigned* at = reinterpret_cast<unsigned*>(rows) + lane;
  __syncwarp();
#pragma unroll
  for (int block = 0; block < 8 / L; ++block) {
    const int r = 2 * L * block + L;
    float2 s = x.a[r];
#pragma unroll
    for (int j = r - 1; j >= r - L; --j) {
      if (j < r - 1) s = s * x.a[j + 1];
      at[(16 + L * block + j - (r - L)) * (kPitch / 4)] = scale(x.k[j], s);
    }
    at[L * block * (kPitch / 4)] = x.k[r];
    at[(8 + L * block) * (kPitch / 4)] = x.q[r];
#pragma unroll
    for (int i = r + 1; i < r + L; ++i) {
      s = i == r + 1 ? x.a[i] : s * x.a[i];
      at[(L * block + i - r) * (kPitch / 4)] = scale(x.k[i], s);
      at[(8 + L * block + i - r) * (kPitch / 4)] = scale(x.q[i], s);
    }
  }
  __syncwarp();
  return multiply(rows_address, lane);
}

__global__ void __maxnreg__(128) intra_kernel(const Problem p) {
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
    const uint8_t* state = own.first > 0 ? p.state(entry.x, head) : nullptr;

    Rows x;
    {
      const int64_t at = own.row0 * row_words + head * (p.dk / 2) + pair;
      const unsigned* k = reinterpret_cast<const unsigned*>(p.k) + at;
      const unsigned* q = reinterpret_cast<const unsigned*>(p.q) + at;
      const float2* g = reinterpret_cast<const float2*>(p.g) + at;
      if (inside && own.first == 0 && own.last == kChunk) {
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
          x.k[i] = __ldg(k + i * row_words);
          x.q[i] = __ldg(q + i * row_words);
          x.a[i] = __ldg(g + i * row_words);
        }
      } else {
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
          x.k[i] = x.q[i] = 0;
          x.a[i] = {0.0f, 0.0f};
          if (inside && i >= own.first && i < own.last) {
            x.k[i] = __ldg(k + i * row_words);
            x.q[i] = __ldg(q + i * row_words);
            x.a[i] = __ldg(g + i * row_words);
          }
        }
      }
    }
    float beta = 0.0f;
    const int column = lane & 15;
    if (column >= own.first && column < own.last) beta = __ldg(p.beta + (own.row0 + column) * p.heads + head);
    if (own.first > 0) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i)
        if (i < own.first) {
          x.k[i] = *(reinterpret_cast<const unsigned*>(state + StateLayout::kKeys) + i * 64 + pair);
          x.a[i] = *(reinterpret_cast<const float2*>(state + StateLayout::kGates) + i * 64 + pair);
        }
      if (column < own.first) beta = *(reinterpret_cast<const float*>(state + StateLayout::kT) + 17 * column);
    }
    if (threadIdx.x == kTeller && pending != nullptr) announce(pending);  // while the rows come
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kChunk; ++i) x.a[i] = {decay_of(x.a[i].x), decay_of(x.a[i].y)};

    // Gamma . K, Gamma . Q, and K at the end; rows of the state have been multiplied by S before, and a chunk that stays
    // open leaves S as it is.
    const bool closes = own.last == kChunk;
    {
      const auto put = [&](int tile, int row, unsigned pair) {
        *reinterpret_cast<unsigned*>(shared.record + tile + row * 128 + (((lane >> 2) ^ (row & 7)) << 4) + (lane & 3) * 4) = pair;
      };
      float2 s = x.a[0];
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        if (i > 0) s = s * x.a[i];
        put(Record::kGammaKQ + 4096 * warp, i, scale(x.k[i], s));
        put(Record::kGammaKQ + 4096 * warp, i + 16, scale(x.q[i], s));
      }
      const int block = pair >> 3, t = pair & 3, high = (pair >> 2) & 1;
      *reinterpret_cast<float2*>(shared.record + Record::kGamma + (block * 16 + t * 4 + high * 2) * 4) =
          closes ? s : float2{1.0f, 1.0f};
      s = x.a[15];
      put(Record::kKeysAtEnd + 2048 * warp, 15, x.k[15]);
#pragma unroll
      for (int j = 14; j >= 0; --j) {
        if (j < 14) s = s * x.a[j + 1];
        put(Record::kKeysAtEnd + 2048 * warp, j, scale(x.k[j], s));
      }
      if (own.first > 0)
#pragma unroll 1
        for (int i = 0; i < own.first; ++i) put(Record::kGammaKQ + 4096 * warp, i, 0);
      if (!closes)
#pragma unroll 1
        for (int i = 0; i < kChunk; ++i) put(Record::kKeysAtEnd + 2048 * warp, i, 0);
    }

    // Of each product the first warp finishes the part of the keys, the second that of the queries.
    float mine[6][2];
    const auto exchange = [&](int l, const C4& c, int keys) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        mine[l][e] = warp == 0 ? c.x[keys + e] : c.x[2 - keys + e];
        (warp == 0 ? shared.other_q : shared.other_k)[l][e][lane] = warp == 0 ? c.x[2 - keys + e] : c.x[keys + e];
      }
    };
    if (next.x >= 0) {  // the next item's rows come nearer: 16 rows x 8 lines, two lines a thread
      const ChunkRows rows(next_slice, next.y);
      const int row = threadIdx.x >> 2, line = threadIdx.x & 3;
      const int64_t at = (rows.row0 + row) * p.heads * p.dk + (item + gridDim.x) % p.heads * p.dk;
      if (row >= rows.first && row < rows.last && 32 * line < p.dk) {
        prefetch_l2(p.g + at + 32 * line);
        if (64 * (line & 1) < p.dk) prefetch_l2((line < 2 ? p.k : p.q) + at + 64 * (line & 1));
      }
    }
    exchange(0, level<8>(x, my_rows, rows_address, lane), 0);
    exchange(1, level<4>(x, my_rows, rows_address, lane), 0);
    exchange(2, level<2>(x, my_rows, rows_address, lane), 0);
    exchange(3, level<1>(x, my_rows, rows_address, lane), 0);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      reinterpret_cast<unsigned*>(my_rows)[i * (kPitch / 4) + lane] = x.q[i];
      reinterpret_cast<unsigned*>(my_rows)[(16 + i) * (kPitch / 4) + lane] = x.k[i];
    }
    __syncwarp();
    C4 diagonal[2] = {};  // q_i . k_i: of the first, rows 0..7 count, of the second rows 8..15
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      unsigned b[2][4];
#pragma unroll
      for (int n = 0; n < 2; ++n) load_matrices(b[n], rows_address + (16 + 8 * n + (lane & 7)) * kPitch + part * 64 + (lane >> 3) * 16);
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        A4 a;
        load_matrices(a.x, rows_address + (lane & 15) * kPitch + part * 64 + step * 32 + (lane >> 4) * 16);
        mma(diagonal[0], a, b[0][2 * step], b[0][2 * step + 1]);
        mma(diagonal[1], a, b[1][2 * step], b[1][2 * step + 1]);
      }
    }
    exchange(4, diagonal[0], 2);
    exchange(5, diagonal[1], 0);
    if (warp == 1) *reinterpret_cast<uint4*>(shared.record + Record::kQ + lane * 16) = make_uint4(0, 0, 0, 0);
    __syncthreads();
    if (warp == 0) {
      elements<8>(lane, [&](int i, int j, int e) { shared.a[j][i] = mine[0][e] + shared.other_k[0][e][lane]; });
      elements<4>(lane, [&](int i, int j, int e) { shared.a[j][i] = mine[1][e] + shared.other_k[1][e][lane]; });
      elements<2>(lane, [&](int i, int j, int e) { shared.a[j][i] = mine[2][e] + shared.other_k[2][e][lane]; });
      elements<1>(lane, [&](int i, int j, int e) { shared.a[j][i] = mine[3][e] + shared.other_k[3][e][lane]; });
      __syncwarp();
      // Column by column: T_i = beta_i (e_i - sum over j < i of A_ij T_j), j ascending.
      float row[kChunk];
#pragma unroll
      for (int i = 0; i < kChunk; ++i) row[i] = i == column ? 1.0f : 0.0f;
#pragma unroll
      for (int j = 0; j < kChunk; ++j) {
        row[j] = __shfl_sync(0xffffffffu, beta, j) * row[j];
#pragma unroll
        for (int i = (j + 1) & ~3; i < kChunk; i += 4) {
          const float4 a = *reinterpret_cast<const float4*>(&shared.a[j][i]);
          if (i > j) row[i] = __fmaf_rn(-a.x, row[j], row[i]);
          if (i + 1 > j) row[i + 1] = __fmaf_rn(-a.y, row[j], row[i + 1]);
          if (i + 2 > j) row[i + 2] = __fmaf_rn(-a.z, row[j], row[i + 2]);
          if (i + 3 > j) row[i + 3] = __fmaf_rn(-a.w, row[j], row[i + 3]);
        }
      }
      if (lane < 16) {
#pragma unroll
        for (int i = 0; i < kChunk; ++i) put_half(shared.record + Record::kT, i, column, row[i]);
        if (own.last < kChunk && p.batch.recurrent != nullptr) {
          float* last = p.last_t + (static_cast<int64_t>(entry.x) * p.heads + head) * 256 + column;
#pragma unroll
          for (int i = 0; i < kChunk; ++i) last[16 * i] = row[i];
        }
      }
    } else {
      elements<8>(lane, [&](int i, int j, int e) {
        put_half(shared.record + Record::kQ, i, j, shared.other_q[0][e][lane] + mine[0][e]);
      });
      elements<4>(lane, [&](int i, int j, int e) {
        put_half(shared.record + Record::kQ, i, j, shared.other_q[1][e][lane] + mine[1][e]);
      });
      elements<2>(lane, [&](int i, int j, int e) {
        put_half(shared.record + Record::kQ, i, j, shared.other_q[2][e][lane] + mine[2][e]);
      });
      elements<1>(lane, [&](int i, int j, int e) {
        put_half(shared.record + Record::kQ, i, j, shared.other_q[3][e][lane] + mine[3][e]);
      });
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int g = lane >> 2;
        if (g == 2 * (lane & 3) + e) {
          put_half(shared.record + Record::kQ, g, g, shared.other_q[4][e][lane] + mine[4][e]);
          put_half(shared.record + Record::kQ, g + 8, g + 8, shared.other_q[5][e][lane] + mine[5][e]);
        }
      }
    }
    if (own.last < kChunk) __threadfence();  // last_t, before the record is announced
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

// One block fills the table of slots; all blocks clear the marks.
__global__ void __launch_bounds__(512) plan_kernel(const Problem p, int slots) {
  const int64_t marks = static_cast<int64_t>(slots) * p.heads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < marks;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x)
    p.ready[i] = 0;
  if (blockIdx.x != 0) return;
  for (int i = threadIdx.x; i < slots; i += blockDim.x) p.table[i] = make_int2(-1, 0);
  __syncthreads();
  const int lanes = p.batch.slices > 8 ? 32 : static_cast<int>(blockDim.x);
  for (int i = threadIdx.x / lanes; i < p.batch.slices; i += blockDim.x / lanes) {
    const DeviceSlice s = p.batch.slice[i];
    const int chunks = chunk_count(s), base = slot_base(s, i);
    for (int c = threadIdx.x % lanes; c < chunks; c += lanes) {
      const int slot = p.round > 0 ? c / p.round * p.batch.slices * p.round + i * p.round + c % p.round : base + c;
      p.table[slot] = make_int2(i, c);
    }
  }
}

}  // namespace

void launch_plan(Device& dev, const Problem& p, int slots) {
  plan_kernel<<<32, 512, 0, dev.stream()>>>(p, slots);
  PERIGEE_LAUNCHED();
}

void launch_intra(Device& dev, const Problem& p) {
  allow_shared_memory(intra_kernel, sizeof(Shared));
  PERIGEE_CUDA(cudaFuncSetAttribute(intra_kernel, cudaFuncAttributePreferredSharedMemoryCarveout, 100));
  const int64_t items = static_cast<int64_t>(p.slot_end - p.slot_begin) * p.heads;
  // All blocks stand on the chip at once: with room for the scan beside them where that has few blocks and is what takes
  // the time, otherwise as many as do the work fastest. Of two sequences, one after the other in segments, few blocks of
  // the wide scan are busy too.
  const int64_t wide_blocks = static_cast<int64_t>(p.batch.slices) * p.heads * ((p.dv + 63) / 64);
  const bool in_turns = p.segments > 1 && p.round == 0;
  const int each = long_scan_blocks(p) <= dev.info().multiprocessors                                        ? 3
                   : !takes_long_scan(dev, p) && in_turns && wide_blocks <= dev.info().multiprocessors ? 2
                                                                                                       : 7;
  const int64_t blocks = int64_t{each} * dev.info().multiprocessors;
  launch_dependent(intra_kernel, dim3(static_cast<unsigned>(items < blocks ? items : blocks)), dim3(kThreads),
                   sizeof(Shared), dev.stream(), p);
}

}  // namespace perigee::kernels::kda
