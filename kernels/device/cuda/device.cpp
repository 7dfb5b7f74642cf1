#include "kernels/device/device.h"

#include <cuda_runtime.h>

#include <cstdlib>

#include "kernels/device/cuda/host_copy.h"
#include "kernels/device/features.h"
#include "kernels/device/runtime.h"

namespace perigee::kernels {

void cuda_failed(cudaError_t error, const char* what, const char* file, int line) {
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    size_t free = 0, total = 0;
    const std::string numbers = cudaMemGetInfo(&free, &total) == cudaSuccess
                                    ? fmt::format("{} of {} MiB are free", free >> 20, total >> 20)
                                    : std::string("too little is free to open it");
    throw_environment("the GPU has no memory left at {} ({}:{}): {}; end what else uses it (nvidia-smi lists it)", what, file,
                      line, numbers);
  }
  throw_environment("the GPU failed at {} ({}:{}): {} ({}); what is on the disk is whole: start again, a run with perigee resume",
                    what, file, line, cudaGetErrorString(error), cudaGetErrorName(error));
}

void* DeviceScratch::take_bytes(size_t bytes) {
  bytes = (bytes + 1023) / 1024 * 1024;
  if (used_ + bytes > capacity_)
    throw_environment(
        "a step needs more than the {} MiB set aside for temporary buffers on the GPU; lower the batch, the prefill "
        "chunk or the micro-batch",
        capacity_ >> 20);
  void* p = base_ + used_;
  used_ += bytes;
  if (used_ > peak_) peak_ = used_;
  return p;
}

int Device::count() {
  // Kernels are loaded at the start: loading one at its first use would break the recording of a graph.
  static const int eager = setenv("CUDA_MODULE_LOADING", "EAGER", 0);
  (void)eager;
  int n = 0;
  if (cudaGetDeviceCount(&n) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return n;
}

std::string Device::why_none() {
  int n = 0;
  const cudaError_t error = cudaGetDeviceCount(&n);
  if (error == cudaSuccess) return n > 0 ? "" : "no CUDA device";
  cudaGetLastError();
  int driver = 0;
  cudaDriverGetVersion(&driver);
  if (error == cudaErrorInsufficientDriver && driver > 0)
    return fmt::format("the NVIDIA driver supports CUDA {}.{}, this program needs {}.{}: update the driver", driver / 1000,
                       driver % 1000 / 10, CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
  if (error == cudaErrorNoDevice || error == cudaErrorInsufficientDriver || error == cudaErrorStubLibrary)
    return "no CUDA device";
  return fmt::format("no CUDA device: {}", cudaGetErrorString(error));
}

bool Device::runs_bf16(int ordinal) {
  PERIGEE_CUDA(cudaSetDevice(ordinal));
  return features_here().tensor_kernels;
}

Device::Device(int ordinal, int64_t scratch_bytes) : ordinal_(ordinal) {
  const int n = count();
  if (n == 0) throw_environment("{}; use --device cpu", why_none());
  if (ordinal < 0 || ordinal >= n) throw_input("there is no GPU {}: this machine has {}", ordinal, n);
  PERIGEE_CUDA(cudaSetDevice(ordinal));
  cudaDeviceProp properties;
  PERIGEE_CUDA(cudaGetDeviceProperties(&properties, ordinal));
  info_.name = properties.name;
  info_.capability = properties.major * 10 + properties.minor;
  info_.multiprocessors = properties.multiProcessorCount;
  if (info_.capability < kLeastCapability)
    throw_environment("{} has compute capability {}.{}; {}.{} is the least supported: use --device cpu", info_.name,
                      properties.major, properties.minor, kLeastCapability / 10, kLeastCapability % 10);
  if (!features_here().runs)
    throw_environment("{} has compute capability {}.{}, for which this program has no code: build it with "
                      "-DPERIGEE_CUDA_ARCH={}{}", info_.name, properties.major, properties.minor, properties.major,
                      properties.minor);
  PERIGEE_CUDA(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
  size_t free = 0, total = 0;
  PERIGEE_CUDA(cudaMemGetInfo(&free, &total));
  info_.memory_bytes = static_cast<int64_t>(total);
  info_.free_bytes = static_cast<int64_t>(free);
  scratch.base_ = static_cast<std::byte*>(allocate(scratch_bytes));
  scratch.capacity_ = static_cast<size_t>(scratch_bytes);
}

Device::~Device() {
  cudaSetDevice(ordinal_);
  cudaStreamSynchronize(stream_);
  cudaFree(scratch.base_);
  cudaStreamDestroy(stream_);
}

void Device::synchronize() {
  PERIGEE_CUDA(cudaStreamSynchronize(stream_));
}

void* Device::allocate(int64_t bytes) {
  void* p = nullptr;
  const cudaError_t error = cudaMalloc(&p, static_cast<size_t>(bytes > 0 ? bytes : 1));
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    size_t free = 0, total = 0;
    cudaMemGetInfo(&free, &total);
    throw_environment("{} has no {} MiB left: {} of {} MiB are free, this program holds {} MiB; end what else uses it "
                      "(nvidia-smi lists it), or give this less (engine.memory_mib, --memory-mib)", info_.name,
                      (bytes >> 20) + 1, free >> 20, total >> 20, allocated_ >> 20);
  }
  PERIGEE_CUDA(error);
  allocated_ += bytes;
  return p;
}

void Device::release(void* memory) {
  PERIGEE_CUDA(cudaStreamSynchronize(stream_));
  PERIGEE_CUDA(cudaFree(memory));
}

void Device::copy_in(void* device, const void* host, int64_t bytes) {
  if (bytes == 0) return;
  if (bytes >= kLargeCopy) {
    synchronize();
    if (copy_large(ordinal_, device, host, bytes, cudaMemcpyHostToDevice)) return;
  }
  // From pageable memory the copy is staged before the call returns, so the host memory is free again.
  PERIGEE_CUDA(cudaMemcpyAsync(device, host, static_cast<size_t>(bytes), cudaMemcpyHostToDevice, stream_));
}

void Device::copy_out(void* host, const void* device, int64_t bytes) {
  if (bytes == 0) return;
  if (bytes >= kLargeCopy) {
    synchronize();
    if (copy_large(ordinal_, host, device, bytes, cudaMemcpyDeviceToHost)) return;
  }
  PERIGEE_CUDA(cudaMemcpyAsync(host, device, static_cast<size_t>(bytes), cudaMemcpyDeviceToHost, stream_));
  synchronize();
}

void Device::copy(void* to, const void* from, int64_t bytes) {
  if (bytes == 0) return;
  PERIGEE_CUDA(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDeviceToDevice, stream_));
}

void Device::copy_2d(void* to, int64_t ld_to, const void* from, int64_t ld_from, int64_t width, int64_t rows) {
  PERIGEE_CHECK(width % 4 == 0 && ld_to % 4 == 0 && ld_from % 4 == 0);
  if (width > 0 && rows > 0) copy_pieces(stream_, to, ld_to, from, ld_from, width, rows);
}

void Device::zero(void* memory, int64_t bytes) {
  if (bytes == 0) return;
  PERIGEE_CUDA(cudaMemsetAsync(memory, 0, static_cast<size_t>(bytes), stream_));
}

PinnedMemory::PinnedMemory(int64_t bytes) : bytes_(bytes) {
  void* p = nullptr;
  PERIGEE_CUDA(cudaMallocHost(&p, static_cast<size_t>(bytes > 0 ? bytes : 1)));
  data_ = static_cast<std::byte*>(p);
}

PinnedMemory::~PinnedMemory() {
  if (data_ != nullptr) cudaFreeHost(data_);
}

DeviceGraph::DeviceGraph(Device& device, const std::function<void()>& work) {
  cudaStream_t stream = device.stream();
  PERIGEE_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  cudaGraph_t graph = nullptr;
  try {
    work();
  } catch (...) {
    cudaStreamEndCapture(stream, &graph);
    if (graph != nullptr) cudaGraphDestroy(graph);
    throw;
  }
  PERIGEE_CUDA(cudaStreamEndCapture(stream, &graph));
  const cudaError_t error = cudaGraphInstantiate(&executable_, graph, 0);
  cudaGraphDestroy(graph);
  PERIGEE_CUDA(error);
}

DeviceGraph::~DeviceGraph() {
  if (executable_ != nullptr) cudaGraphExecDestroy(executable_);
}

void DeviceGraph::launch(Device& device) const {
  PERIGEE_CUDA(cudaGraphLaunch(executable_, device.stream()));
}

}  // namespace perigee::kernels
