// Rotary positions on the device. rope.h says what is computed; over float these are its bits. Over bf16 the same on the
// widened values, rounded once.
#pragma once
#include <cstdint>
#include <span>

#include "kernels/device/batch.h"
#include "kernels/device/device.h"

namespace perigee::kernels {

inline constexpr int64_t kRopeMostDim = 256;

// In place on the slices' rows: head h of row t is the dim values at x + t * row_stride + h * head_stride. steps: host
// memory, dim / 2 of them (rope_steps), copied into the launch. dim even, at most kRopeMostDim.
template <class T>
void rope_forward(Device& device, const DeviceBatch& batch, int64_t heads, int64_t dim,
                  std::span<const uint64_t> steps, T* x, int64_t head_stride, int64_t row_stride);

// The gradient: rotation by the negative angle.
template <class T>
void rope_backward(Device& device, const DeviceBatch& batch, int64_t heads, int64_t dim,
                   std::span<const uint64_t> steps, T* x, int64_t head_stride, int64_t row_stride);

}  // namespace perigee::kernels
