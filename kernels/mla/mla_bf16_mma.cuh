// Products of a warp, 16 x 8 x 16, over what lies in shared memory. Chains of them have the bits of chains of warpgroup
// products over the same k, so that a few rows need not fill an instruction of 64.
// With lane = 4 g + t: a sum holds (row g, columns 2t and 2t + 1), then those of row g + 8.
#pragma once
#include "kernels/mla/mla_bf16.cuh"

namespace perigee::kernels::mla {

#if defined(PERIGEE_HOPPER)

__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void load_matrices_turned(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ uint32_t turn(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// Where this lane reads A, rows [row, row + 16) of a tile of 128-byte rows, k from 16 `step` on.
__device__ __forceinline__ uint32_t rows_address(uint32_t tile, int row, int step, int lane) {
  const int r = row + lane % 16;
  return tile + r * 128 + (((2 * step + lane / 16) ^ (r % 8)) * 16);
}
// The same of a tile on its side: A is columns [column, column + 16), k are rows 16 `step` and on.
__device__ __forceinline__ uint32_t columns_address(uint32_t tile, int column, int step, int lane) {
  const int r = 16 * step + lane / 16 * 8 + lane % 8;
  return tile + r * 128 + ((column / 8 + lane / 8 % 2) ^ (r % 8)) * 16;
}
// Where this lane reads B for two steps of k: eight rows of elements, `pitch` bytes apart.
__device__ __forceinline__ uint32_t right_address(uint32_t rows, int pitch, int k, int lane) {
  return rows + lane % 8 * pitch + k * 2 + lane / 8 * 16;
}

// Other blocks of the cluster.
__device__ __forceinline__ uint32_t of_rank(uint32_t address, int rank) {
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}
__device__ __forceinline__ void store_there(uint32_t address, float x, float y) {
  asm volatile("st.shared::cluster.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(x), "f"(y) : "memory");
}
__device__ __forceinline__ void store_there(uint32_t address, const uint32_t (&x)[4]) {
  asm volatile("st.shared::cluster.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x[0]), "r"(x[1]),
               "r"(x[2]), "r"(x[3])
               : "memory");
}
__device__ __forceinline__ void cluster_arrive() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

#endif  // PERIGEE_HOPPER

}  // namespace perigee::kernels::mla
