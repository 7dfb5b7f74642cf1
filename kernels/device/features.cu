#include "kernels/device/features.h"

#include "kernels/device/launch.cuh"

namespace perigee::kernels {
namespace {

__global__ void features(int* tensor_kernels) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  *tensor_kernels = 1;
#else
  *tensor_kernels = 0;
#endif
}

}  // namespace

Features features_here() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, features);
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
    cudaGetLastError();
    return {};
  }
  PERIGEE_CUDA(error);
  int* flag = nullptr;
  int value = 0;
  PERIGEE_CUDA(cudaMalloc(&flag, sizeof value));
  features<<<1, 1>>>(flag);
  PERIGEE_LAUNCHED();
  PERIGEE_CUDA(cudaMemcpy(&value, flag, sizeof value, cudaMemcpyDeviceToHost));
  PERIGEE_CUDA(cudaFree(flag));
  return {true, value == 1};
}

}  // namespace perigee::kernels
