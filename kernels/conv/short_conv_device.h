// The short convolutions of the linear mixers on the device: width 4, SiLU, and the L2 normalisation of queries and keys, in
// one pass; or SiLU alone in the place of the convolution, or no normalisation (docs/mixers.md).
// CPU: short_conv_forward of kernels/conv/short_conv.h, then l2norm_forward of kernels/kda/kda.h.
//
// T, the type of activations and windows, is float (the bits of the CPU) or bf16 (between input and output all is
// float32: the raw q and k are not rounded). An output row is a function of its own input row and the three before it,
// by the same operations whatever the split of the sequence. Nothing may alias. Arrays are aligned to 16 bytes.
#pragma once
#include <cstdint>

#include "kernels/device/batch.h"
#include "kernels/device/device.h"

namespace perigee::kernels {

struct ConvShape {
  int64_t heads = 0;
  int64_t d = 0;  // of a head, at most 128
  bool normalise = true;  // q and k
  int64_t wide() const { return heads * d; }
  int64_t window_elements() const { return 3 * 3 * wide(); }  // of T, per sequence and layer
};

// qkv    in    T [rows, 3*wide]  the three projections
// w      in    f32 [3*wide, 4]   taps, the last for the row itself; null: no convolution and no window, SiLU alone
// batch  the window of slice i lies window_offset bytes (a multiple of 16) into batch.recurrent[i]: T [3, 3*wide], the
//        three inputs before the slice, oldest first; left holding the last three. Training: zeros before each slice.
// q      out   T [rows, wide]    normalised over each head, times d^-1/2 (if shape.normalise)
// k      out   T [rows, wide]    normalised over each head (if shape.normalise)
// v      out   T [rows, wide]
// Rows of no slice are not written.
template <class T>
void conv_forward(Device& device, const ConvShape& shape, const T* qkv, const float* w, const DeviceBatch& batch,
                  int64_t window_offset, T* q, T* k, T* v);

// For sequences that start at position 0. The raw q and k are computed again from qkv.
// dq, dk, dv in T [rows, wide]; dqkv out T [rows, 3*wide]; dw f32 [3*wide, 4] accumulated (null where w is).
// Rows of no slice are not written.
template <class T>
void conv_backward(Device& device, const ConvShape& shape, const T* qkv, const float* w, const DeviceBatch& batch,
                   const T* dq, const T* dk, const T* dv, T* dqkv, float* dw);

}  // namespace perigee::kernels
