// A packed batch on the device: what kernels/sequence.h's slices are to the CPU. All arrays lie at fixed addresses in
// device memory and are filled before a step, so that a captured graph serves every batch of the same shape.
#pragma once
#include <cstddef>
#include <cstdint>

namespace perigee::kernels {

// Rows [begin, begin + count) are the tokens at positions [position, position + count) of one sequence.
struct DeviceSlice {
  int32_t begin = 0;
  int32_t count = 0;     // 0: a padding entry, to be passed over
  int32_t position = 0;
  int32_t reserved = 0;
};

// Passed to kernels by value. A decoding batch has max_count 1: slice i is row i.
struct DeviceBatch {
  int32_t rows = 0;       // of the activations, padding rows included
  int32_t slices = 0;     // entries, padding included
  int32_t max_count = 0;  // no slice has more rows
  int32_t max_pages = 0;  // entries of a page table
  const DeviceSlice* slice = nullptr;       // device [slices]
  std::byte* const* recurrent = nullptr;    // device [slices]: each sequence's recurrent memory (KDA states, windows)
  std::byte* const* pages = nullptr;        // device [slices, max_pages]: blocks of kLatentPage tokens, in order
  // Training: whole sequences from position 0 without memory of their own (recurrent and pages are null), and the
  // kernels start them from zero.
  bool training() const { return recurrent == nullptr; }
};

}  // namespace perigee::kernels
