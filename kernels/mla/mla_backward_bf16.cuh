// What the gradients of latent attention add to kernels/gemm/hopper.cuh: products whose second operand lies in memory row by
// row, its rows being the summed dimension, so that one tile of rows serves both as keys (or queries) of the scores and
// as what the weights multiply.
#pragma once
#include "kernels/device/launch.cuh"
#include "kernels/gemm/hopper.cuh"

namespace perigee::kernels::mla_grad {

// Chunks of 64 columns (128-byte rows, swizzled), `chunk_bytes` apart; groups of eight rows 1024 bytes apart. The next
// sixteen rows are 2048 bytes further.
__device__ __forceinline__ uint64_t turned_operand(uint32_t address, uint32_t chunk_bytes) {
  return (uint64_t{1} << 62) | (uint64_t{64} << 32) | (uint64_t{chunk_bytes >> 4} << 16) |
         ((address & 0x3ffffu) >> 4);
}
inline constexpr uint64_t kTurnedStep = 2048 >> 4;

// The values of registers that products have been writing, from here on.
template <int N>
__device__ __forceinline__ void settle(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
__device__ __forceinline__ void store_shared(uint32_t address, uint32_t x) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}

// d [64, N] += a [64, 16] b [16, N], held as hopper::wgmma says.
template <int N>
__device__ __forceinline__ void wgmma_turned(float (&d)[N / 2], uint64_t a, uint64_t b);

#define PERIGEE_ACC4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define PERIGEE_ACC16(i) PERIGEE_ACC4(i), PERIGEE_ACC4(i + 4), PERIGEE_ACC4(i + 8), PERIGEE_ACC4(i + 12)
template <>
__device__ __forceinline__ void wgmma_turned<64>(float (&d)[32], uint64_t a, uint64_t b) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.eq.u32 p, 1, 1;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "%32, %33, p, 1, 1, 0, 1;\n}\n"
      : PERIGEE_ACC16(0), PERIGEE_ACC16(16)
      : "l"(a), "l"(b));
}
template <>
__device__ __forceinline__ void wgmma_turned<128>(float (&d)[64], uint64_t a, uint64_t b) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.eq.u32 p, 1, 1;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      " %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      " %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "%64, %65, p, 1, 1, 0, 1;\n}\n"
      : PERIGEE_ACC16(0), PERIGEE_ACC16(16), PERIGEE_ACC16(32), PERIGEE_ACC16(48)
      : "l"(a), "l"(b));
}
template <>
__device__ __forceinline__ void wgmma_turned<192>(float (&d)[96], uint64_t a, uint64_t b) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.eq.u32 p, 1, 1;\n"
      "wgmma.mma_async.sync.aligned.m64n192k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      " %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      " %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      " %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
      " %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
      " %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95}, "
      "%96, %97, p, 1, 1, 0, 1;\n}\n"
      : PERIGEE_ACC16(0), PERIGEE_ACC16(16), PERIGEE_ACC16(32), PERIGEE_ACC16(48), PERIGEE_ACC16(64),
        PERIGEE_ACC16(80)
      : "l"(a), "l"(b));
}
#undef PERIGEE_ACC16
#undef PERIGEE_ACC4

}  // namespace perigee::kernels::mla_grad
