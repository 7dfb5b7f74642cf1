// From the accumulators of a warpgroup to memory: see matmul_bf16.cuh.
#pragma once
#include "kernels/gemm/matmul_bf16_units.cuh"

namespace perigee::kernels::products {

// The threads of one of the warpgroups that compute.
__device__ __forceinline__ void meet(int member) {
  if (member == 0)
    asm volatile("bar.sync 1, 128;" ::: "memory");
  else
    asm volatile("bar.sync 2, 128;" ::: "memory");
}

// Four by four registers of a product, of outputs by tokens, as rows of tokens in shared memory.
__device__ __forceinline__ void store_transposed(uint32_t to, const float* d) {
  const __nv_bfloat162 low = __floats2bfloat162_rn(d[0], d[1]), high = __floats2bfloat162_rn(d[2], d[3]);
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(to),
               "r"(*reinterpret_cast<const uint32_t*>(&low)), "r"(*reinterpret_cast<const uint32_t*>(&high))
               : "memory");
}

// The first `left` of eight outputs.
__device__ __forceinline__ void store8(bf16* to, uint4 v, int left, bool vector) {
  if (left >= 8 && vector) {
    *reinterpret_cast<uint4*>(to) = v;
  } else {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (i < left) to[i].bits = static_cast<uint16_t>(words[i / 2] >> (16 * (i & 1)));
  }
}

// A warpgroup's [64 outputs, kTokens] to bf16 y by the copy engine, so that the products of the next unit need not wait
// for memory: 32 rows at a time through three buffers. Chunk `turn` goes through buffer turn % 3 and is sent by warp
// turn % 4, which also waits until the buffer has been read. Rows of another unit that follow within a chunk (an
// expert's neighbours) must not be written: such a chunk is stored by the threads.
template <int kTokens>
__device__ __forceinline__ void send_unit(const Group& g, const Unit& unit, float (&acc)[kTokens / 2],
                                          char* buffers, int& turn, int thread, int member) {
  const int warp = thread >> 5, lane = thread & 31;
  const int row = lane & 7, half = (lane >> 3) & 1;
#pragma unroll
  for (int first = 0; first < kTokens; first += 32) {
    if (first >= unit.tokens) break;
    char* const buffer = buffers + turn % 3 * 4096;
    const uint32_t at = hopper::shared_address(buffer);
#pragma unroll
    for (int j = 0; j < 4; ++j)
      store_transposed(at + (j * 8 + row) * 128 + (((warp * 2 + half) ^ row) << 4),
                       &acc[(first / 8 + j) * 4]);
    hopper::fence_async();
    // The next chunk's buffer was sent two chunks ago.
    if (warp == ((turn + 2) & 3)) hopper::bulk_wait_read();
    meet(member);
    if (first + 32 <= unit.tokens || unit.row + unit.tokens == g.rows) {
      if (thread == (turn & 3) * 32) {
        hopper::tensor_store(&g.y_map, at, unit.m, unit.row + first, unit.z_out);
        hopper::bulk_commit();
      }
    } else {
      const int piece = thread & 7, left = g.n - unit.m - piece * 8;
      bf16* y = reinterpret_cast<bf16*>(unit.y) + (unit.row + first) * g.ldy + unit.m + piece * 8;
      for (int t = thread >> 3; first + t < unit.tokens; t += 16) {
        const uint4 v = *reinterpret_cast<const uint4*>(buffer + t * 128 + ((piece ^ (t & 7)) << 4));
        store8(y + t * g.ldy, v, left, true);
      }
    }
    ++turn;
  }
}

// A warpgroup's [64 outputs, kTokens] to y, through shared memory (two buffers) to make whole lines of it.
template <int kTokens>
inline constexpr int kBufferBytes = kTokens < 32 ? kTokens * 256 : 8192;
template <int kTokens>
__device__ __forceinline__ void store_unit(const Group& g, const Unit& unit, float (&acc)[kTokens / 2],
                                           char* buffers, int& turn, int thread, int member) {
  const int warp = thread >> 5, lane = thread & 31;
  const int outputs = min(unit.outputs, g.n - unit.m);
  if (g.store == static_cast<int>(Store::kAct)) {
    constexpr int kChunk = kTokens < 64 ? kTokens : 64;
    bf16* y = reinterpret_cast<bf16*>(unit.y) + unit.row * g.ldy + unit.m;
#pragma unroll
    for (int first = 0; first < kTokens; first += kChunk) {
      if (first >= unit.tokens) break;
      char* buffer = buffers + (turn & 1) * kBufferBytes<kTokens>;
      ++turn;
      const uint32_t base = hopper::shared_address(buffer);
#pragma unroll
      for (int j = 0; j < kChunk / 8; ++j) {
        const float* d = &acc[(first / 8 + j) * 4];
        const int token = lane & 7, half = (lane >> 3) & 1;
        store_transposed(base + (j * 8 + token) * 128 + (((warp * 2 + half) ^ token) << 4), d);
      }
      meet(member);
      const int piece = thread & 7, left = outputs - piece * 8;
#pragma unroll 4
      for (int t = thread >> 3; t < kChunk; t += 16) {
        if (first + t >= unit.tokens || left <= 0) break;
        const uint4 v = *reinterpret_cast<const uint4*>(buffer + t * 128 + ((piece ^ (t & 7)) << 4));
        store8(y + (first + t) * g.ldy + piece * 8, v, left, g.vector);
      }
    }
  } else {
    constexpr int kChunk = kTokens < 32 ? kTokens : 32;
    const bool add = g.store == static_cast<int>(Store::kAddF32);
    float* y = reinterpret_cast<float*>(unit.y) + unit.row * g.ldy + unit.m;
#pragma unroll
    for (int first = 0; first < kTokens; first += kChunk) {
      if (first >= unit.tokens) break;
      float* buffer = reinterpret_cast<float*>(buffers + (turn & 1) * kBufferBytes<kTokens>);
      ++turn;
#pragma unroll
      for (int j = 0; j < kChunk / 8; ++j) {
        const float* d = &acc[(first / 8 + j) * 4];
        const int q = lane & 3, output = warp * 16 + (lane >> 2), token = j * 8 + 2 * q;
        buffer[token * 64 + (output ^ (q * 8))] = d[0];
        buffer[(token + 1) * 64 + (output ^ (q * 8))] = d[1];
        buffer[token * 64 + ((output + 8) ^ (q * 8))] = d[2];
        buffer[(token + 1) * 64 + ((output + 8) ^ (q * 8))] = d[3];
      }
      meet(member);
      const int piece = thread & 15, left = outputs - piece * 4;
#pragma unroll 4
      for (int t = thread >> 4; t < kChunk; t += 8) {
        if (first + t >= unit.tokens || left <= 0) break;
        const float4 v =
            *reinterpret_cast<const float4*>(buffer + t * 64 + ((piece * 4) ^ (((t >> 1) & 3) * 8)));
        float* to = y + (first + t) * g.ldy + piece * 4;
        if (left >= 4 && g.vector) {
          // Nobody else adds to these: the sum is that of a load, an addition and a store, without the wait.
          if (add)
            hopper::add4(to, v);
          else
            *reinterpret_cast<float4*>(to) = v;
        } else {
          const float values[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
          for (int i = 0; i < 4; ++i)
            if (i < left) to[i] = add ? to[i] + values[i] : values[i];
        }
      }
    }
  }
}

}  // namespace perigee::kernels::products
