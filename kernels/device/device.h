// One GPU as the kernels see it: a stream, temporaries, and memory. The header needs no CUDA, so that code above
// kernels/ includes it in every build; in a build without CUDA count() is 0 and the constructor throws.
//
// A device kernel is a function whose first argument is a Device&. It launches on the device's stream and returns;
// pointers are device memory unless the contract says host. It never allocates, frees or synchronises, and all that
// depends on host arguments is in the launch, so every one of them may be captured into a CUDA graph.
//
// NUMERICS: functions over float give the bits of the CPU's function of the same name (explicit fused
// multiply-adds, the same order of every reduction, the elementary functions of kernels/device/math.cuh). Functions
// over bf16 keep weights and activations in bfloat16 and everything summed, normalised or carried in float32; a row's
// result is a function of the row's own inputs, the weights and the shapes (n, k), never of the batch.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <utility>

#include "base/error.h"

struct CUstream_st;     // cudaStream_t is CUstream_st*
struct CUgraphExec_st;  // cudaGraphExec_t is CUgraphExec_st*

namespace perigee::kernels {

// A bfloat16 in memory; kernels/gemm/gemm.h converts.
struct bf16 {
  uint16_t bits;
};

class Device;

// Temporary device memory, taken and given back in stack order from one block that the device allocates at its
// construction. Aligned to 1024 bytes; holds garbage. What a capture took must not be given to others while the graph
// lives: capture under a mark and keep the block's layout the same (docs/architecture.md, "The device").
class DeviceScratch {
 public:
  class Mark {
   public:
    explicit Mark(DeviceScratch& s) : scratch_(s), used_(s.used_) {}
    ~Mark() { scratch_.used_ = used_; }
    Mark(const Mark&) = delete;
    Mark& operator=(const Mark&) = delete;

   private:
    DeviceScratch& scratch_;
    size_t used_;
  };

  template <class T>
  T* take(int64_t count) {
    return static_cast<T*>(take_bytes(static_cast<size_t>(count) * sizeof(T)));
  }
  size_t capacity_bytes() const { return capacity_; }
  size_t peak_bytes() const { return peak_; }  // most ever taken at once

 private:
  friend class Device;
  void* take_bytes(size_t bytes);
  std::byte* base_ = nullptr;
  size_t capacity_ = 0, used_ = 0, peak_ = 0;
};

struct DeviceInfo {
  std::string name;  // "NVIDIA H200"
  int capability = 0;  // 90 for 9.0
  int multiprocessors = 0;
  int64_t memory_bytes = 0, free_bytes = 0;
};

class Device {
 public:
  // Usable devices; 0 without a driver, without a device, or in a build without CUDA. why_none says which, in a line.
  static int count();
  static std::string why_none();
  // Throws Error(kEnvironment) when there is no such device or not enough memory for the scratch block, with numbers.
  explicit Device(int ordinal, int64_t scratch_bytes);
  // Whether kernels over bf16 run there: they are for compute capability 9.0 (H100, H200), in builds with its code
  // (PERIGEE_CUDA_ARCH=90a). Kernels over float run on 8.0 and newer. REQUIRES ordinal < count().
  static bool runs_bf16(int ordinal);
  ~Device();
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  const DeviceInfo& info() const { return info_; }
  CUstream_st* stream() const { return stream_; }
  // Waits for everything launched; throws Error(kEnvironment) when any of it failed.
  void synchronize();

  // Memory that outlives a call. allocate throws Error(kEnvironment) naming the sizes; release waits for the device.
  void* allocate(int64_t bytes);
  void release(void* memory);
  template <class T>
  T* allocate_array(int64_t count) {
    return static_cast<T*>(allocate(count * static_cast<int64_t>(sizeof(T))));
  }
  int64_t allocated_bytes() const { return allocated_; }  // the scratch block included

  // In stream order. copy_in returns when the host memory may be reused; copy_out when it holds the data.
  void copy_in(void* device, const void* host, int64_t bytes);
  void copy_out(void* host, const void* device, int64_t bytes);
  void copy(void* to, const void* from, int64_t bytes);
  void zero(void* memory, int64_t bytes);
  // rows pieces of width bytes, ld_to and ld_from bytes apart. All sizes and addresses are multiples of 4. Not for
  // weights: products read those ahead (kernels/gemm/gemm_device.h), as this launch lets its successor begin early.
  void copy_2d(void* to, int64_t ld_to, const void* from, int64_t ld_from, int64_t width, int64_t rows);

  DeviceScratch scratch;

 private:
  int ordinal_ = 0;
  CUstream_st* stream_ = nullptr;
  DeviceInfo info_;
  int64_t allocated_ = 0;
};

// Host memory that the device copies from and to at full speed.
class PinnedMemory {
 public:
  PinnedMemory() = default;
  explicit PinnedMemory(int64_t bytes);
  PinnedMemory(PinnedMemory&& other) noexcept : data_(std::exchange(other.data_, nullptr)), bytes_(other.bytes_) {}
  PinnedMemory& operator=(PinnedMemory&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~PinnedMemory();
  std::byte* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  std::byte* data_ = nullptr;
  int64_t bytes_ = 0;
};

// Work recorded once and replayed with one launch.
class DeviceGraph {
 public:
  DeviceGraph() = default;
  // Runs `work`, whose launches on the device's stream are recorded, not executed. What it takes from the device's
  // scratch is taken again at the same addresses by every replay: launch under the same state of the scratch.
  DeviceGraph(Device& device, const std::function<void()>& work);
  DeviceGraph(DeviceGraph&& other) noexcept : executable_(std::exchange(other.executable_, nullptr)) {}
  DeviceGraph& operator=(DeviceGraph&& other) noexcept {
    std::swap(executable_, other.executable_);
    return *this;
  }
  ~DeviceGraph();
  void launch(Device& device) const;

 private:
  CUgraphExec_st* executable_ = nullptr;
};

}  // namespace perigee::kernels
