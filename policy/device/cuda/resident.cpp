// Memory of a GPU that several processes map: the driver's virtual memory management, exported as a file descriptor.
// Its functions are found at run time, so that the program starts where there is no driver.
#include "policy/device/resident.h"

#include <cuda.h>
#include <cuda_runtime.h>

#include <unistd.h>

#include "kernels/device/runtime.h"

namespace perigee::policy {

kernels::DeviceInfo device_at_rest(int ordinal) {
  kernels::DeviceInfo info;
  {
    const kernels::Device device(ordinal, 1);
    info = device.info();
  }
  PERIGEE_CUDA(cudaSetDevice(ordinal));
  PERIGEE_CUDA(cudaDeviceReset());
  return info;
}

}  // namespace perigee::policy

namespace perigee::policy::device {
namespace {

template <class Function>
Function* driver(const char* name) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result);
#else
  const cudaError_t error = cudaGetDriverEntryPoint(name, &found, cudaEnableDefault, &result);
#endif
  if (error != cudaSuccess || found == nullptr) throw_environment("the NVIDIA driver has no {}: update the driver", name);
  return reinterpret_cast<Function*>(found);
}
#define PERIGEE_DRIVER(name) driver<decltype(name)>(#name)

void check(CUresult result, const char* what) {
  if (result == CUDA_SUCCESS) return;
  const char* text = nullptr;
  PERIGEE_DRIVER(cuGetErrorString)(result, &text);
  throw_environment("sharing weights on the GPU: {}: {} ({})", what, text != nullptr ? text : "unknown error",
                    static_cast<int>(result));
}

CUmemAllocationProp properties() {
  CUmemAllocationProp p{};
  int ordinal = 0;
  PERIGEE_CUDA(cudaGetDevice(&ordinal));
  p.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  p.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  p.location.id = ordinal;
  p.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
  return p;
}

int64_t round_up_to_granularity(int64_t bytes, const CUmemAllocationProp& p) {
  size_t step = 0;
  check(PERIGEE_DRIVER(cuMemGetAllocationGranularity)(&step, &p, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED), "its granularity");
  const auto g = static_cast<int64_t>(step);
  return (bytes + g - 1) / g * g;
}

std::byte* map_handle(CUmemGenericAllocationHandle handle, int64_t reserved, const CUmemAllocationProp& p,
                      CUmemAccess_flags access) {
  CUdeviceptr address = 0;
  const auto size = static_cast<size_t>(reserved);
  check(PERIGEE_DRIVER(cuMemAddressReserve)(&address, size, 0, 0, 0), "reserving addresses");
  check(PERIGEE_DRIVER(cuMemMap)(address, size, 0, handle, 0), "mapping");
  CUmemAccessDesc description{};
  description.location = p.location;
  description.flags = access;
  check(PERIGEE_DRIVER(cuMemSetAccess)(address, size, &description, 1), "access");
  // The mapping keeps the memory.
  check(PERIGEE_DRIVER(cuMemRelease)(handle), "releasing the handle");
  return reinterpret_cast<std::byte*>(address);
}

}  // namespace

Block create_block(kernels::Device& device, int64_t bytes) {
  device.synchronize();  // makes the device's context current on this thread
  const CUmemAllocationProp p = properties();
  Block block;
  block.reserved = round_up_to_granularity(bytes, p);
  CUmemGenericAllocationHandle handle{};
  const CUresult made = PERIGEE_DRIVER(cuMemCreate)(&handle, static_cast<size_t>(block.reserved), &p, 0);
  if (made == CUDA_ERROR_OUT_OF_MEMORY) {
    size_t free = 0, total = 0;
    cudaMemGetInfo(&free, &total);
    throw_environment("{} has no {} MiB left for the weights: {} of {} MiB are free; end what else uses it (nvidia-smi "
                      "lists it)", device.info().name,
                      (block.reserved >> 20) + 1, free >> 20, total >> 20);
  }
  check(made, "making memory");
  check(PERIGEE_DRIVER(cuMemExportToShareableHandle)(&block.descriptor, handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0),
        "exporting a descriptor");
  block.data = map_handle(handle, block.reserved, p, CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
  return block;
}

Block map_block(kernels::Device& device, int descriptor, int64_t bytes) {
  device.synchronize();
  const CUmemAllocationProp p = properties();
  Block block;
  block.reserved = round_up_to_granularity(bytes, p);
  CUmemGenericAllocationHandle handle{};
  check(PERIGEE_DRIVER(cuMemImportFromShareableHandle)(&handle, reinterpret_cast<void*>(static_cast<uintptr_t>(descriptor)),
                                                       CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR),
        "importing the descriptor");
  block.data = map_handle(handle, block.reserved, p, CU_MEM_ACCESS_FLAGS_PROT_READ);
  return block;
}

void unmap_block(std::byte* data, int64_t reserved) {
  // On the way out: what fails here fails because the device is lost, and its memory with it.
  const auto address = reinterpret_cast<CUdeviceptr>(data);
  cudaDeviceSynchronize();
  try {
    PERIGEE_DRIVER(cuMemUnmap)(address, static_cast<size_t>(reserved));
    PERIGEE_DRIVER(cuMemAddressFree)(address, static_cast<size_t>(reserved));
  } catch (const Error&) {
  }
}

}  // namespace perigee::policy::device
