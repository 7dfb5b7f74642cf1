// Matrices in device memory, described to the copy engine. For .cu files.
#pragma once
#include <cuda.h>

#include <cstdint>

#include "kernels/device/launch.cuh"

namespace perigee::kernels {

using EncodeTensorMap = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                     const cuuint64_t*, const cuuint32_t*, const cuuint32_t*,
                                     CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                                     CUtensorMapFloatOOBfill);
// The driver's function; the runtime finds it, so nothing links to the driver.
inline EncodeTensorMap encode_tensor_map() {
  static const EncodeTensorMap function = [] {
    void* f = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    PERIGEE_CUDA(
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault, &found));
#else
    PERIGEE_CUDA(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &f, cudaEnableDefault, &found));
#endif
    PERIGEE_CHECK(found == cudaDriverEntryPointSuccess && f != nullptr);
    return reinterpret_cast<EncodeTensorMap>(f);
  }();
  return function;
}

// x [rows, 64 chunks] in boxes of box_rows rows by `box_chunks` chunks of 64 columns. Coordinates: 0, row, chunk. The
// chunks of a box arrive one after the other, rows of 128 bytes swizzled; what lies past the last row is zero.
inline CUtensorMap describe_chunks(const bf16* x, int64_t rows, int64_t chunks, int box_rows,
                                   int box_chunks) {
  CUtensorMap map;
  const cuuint64_t sizes[3] = {64, static_cast<cuuint64_t>(rows), static_cast<cuuint64_t>(chunks)};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(chunks) * 128, 128};
  const cuuint32_t box[3] = {64, static_cast<cuuint32_t>(box_rows), static_cast<cuuint32_t>(box_chunks)},
                   ones[3] = {1, 1, 1};
  const CUresult result =
      encode_tensor_map()(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, const_cast<bf16*>(x), sizes, strides,
                          box, ones, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                          CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  PERIGEE_CHECK(result == CUDA_SUCCESS);
  return map;
}

}  // namespace perigee::kernels
