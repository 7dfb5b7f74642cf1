// What a step on a GPU reads from the host: blocks of pinned memory, each with its copy on the device. Private to
// policy/device.
#pragma once
#include <cstdint>
#include <span>
#include <utility>

#include "kernels/device/batch.h"
#include "kernels/device/device.h"
#include "kernels/device/pinned.h"
#include "kernels/sampling/sampling_device.h"
#include "policy/device/layers.h"
#include "policy/engine/backend.h"

namespace perigee::policy {

// The first of least, 2 least, 4 least, ... that is not below n.
inline int64_t power_of_two(int64_t n, int64_t least) {
  while (least < n) least *= 2;
  return least;
}

// A block of device memory that the host fills at once.
class InputBlock {
 public:
  explicit InputBlock(kernels::Device& device) : device_(device) {}
  ~InputBlock() {
    if (memory_ != nullptr) device_.release(memory_);
  }
  InputBlock(const InputBlock&) = delete;
  InputBlock& operator=(const InputBlock&) = delete;
  // Makes room for `bytes`, losing what is there; true when the address changed.
  bool reserve(int64_t bytes) {
    used_ = 0;
    // What was sent last may still wait behind a pass: the host runs ahead of the device.
    if (std::exchange(sent_, false)) device_.synchronize();
    if (bytes <= host_.bytes()) return false;
    // What there is stays whole when there is no memory for more.
    kernels::PinnedMemory host(power_of_two(bytes, 1 << 16));
    void* const memory = device_.allocate(host.bytes());
    if (memory_ != nullptr) device_.release(memory_);
    host_ = std::move(host);
    memory_ = memory;
    return true;
  }
  // Room for count things: where the host writes them, and in *on_device where the device reads them.
  template <class T>
  T* place(int64_t count, const T** on_device) {
    used_ = (used_ + 63) / 64 * 64;
    const int64_t at = used_;
    used_ += count * static_cast<int64_t>(sizeof(T));
    PERIGEE_CHECK(used_ <= host_.bytes(), "{} of {}", used_, host_.bytes());
    *on_device = reinterpret_cast<const T*>(static_cast<std::byte*>(memory_) + at);
    return reinterpret_cast<T*>(host_.data() + at);
  }
  void send() {
    kernels::fetch(device_, memory_, host_.data(), used_);
    sent_ = true;
  }
  // send() is a kernel, which a graph may hold: sent() after each of its launches.
  bool by_kernel() const { return used_ <= kernels::kMostFetched; }
  void sent() { sent_ = true; }
  // All that was sent has been read: the host waited for the device.
  void settle() { sent_ = false; }

 private:
  kernels::Device& device_;
  kernels::PinnedMemory host_;
  void* memory_ = nullptr;
  int64_t used_ = 0;
  bool sent_ = false;
};

// What a pass reads, as it lies in an input block.
struct Inputs {
  kernels::DeviceBatch batch;
  const int32_t* tokens = nullptr;  // [rows]
  const int32_t* active = nullptr;  // [1]
  const int32_t* last = nullptr;    // [slices] the row whose logits are wanted, for the first `wanted`
  const device::Expanded* expanded = nullptr;
};

// Of place_inputs(), at most.
inline int64_t input_bytes(int64_t rows, int64_t slices, int64_t pages) {
  return rows * 4 + slices * (static_cast<int64_t>(sizeof(kernels::DeviceSlice)) + 8 + 4) +
         slices * pages * 8 + 8 * 64;
}
int64_t most_pages(std::span<const SequenceSlice> slices);
// rows >= tokens.size() and slots >= slices.size(): the others are padding, which has no rows and touches no memory. Where
// things lie in the block depends on rows, slots and pages alone.
Inputs place_inputs(InputBlock& block, std::span<const int32_t> tokens, std::span<const SequenceSlice> slices,
                    int64_t rows, int64_t slots, int64_t pages, std::span<const int32_t> last);

// What draws read, as it lies in an input block.
struct DrawInputs {
  const kernels::DeviceSampling* params = nullptr;
  const kernels::SeenToken* seen = nullptr;
  const kernels::TokenBias* bias = nullptr;
  bool plain = true;  // as sample_tokens takes it
};
// Makes room in the block and fills it.
DrawInputs place_draws(InputBlock& block, std::span<const Backend::Draw> draws, int64_t vocab);

}  // namespace perigee::policy
