// Routing, dispatch and combination of experts on the device. CPU: kernels/moe/moe.h. Reference: tests/kernels/moe/moe_ref.h
//
// Routing is float32 and has the bits of the CPU. T, the type of activations, is float (the bits of the CPU) or bf16
// (sums in float32, choices ascending). Nothing here waits for the host: how many slots are in use is
// offsets[experts], on the device. A choice of -1 belongs to a padding row: it has no slot (-1) and counts nowhere.
// Arrays are aligned to 16 bytes.
#pragma once
#include <cstdint>

#include "kernels/device/device.h"
#include "kernels/moe/shape.h"

namespace perigee::kernels {

// logits f32 [rows, experts], bias f32 [experts] -> chosen [rows, top_k] ascending by expert, weights [rows, top_k].
// active: null, or device [1]: rows from *active on are padding and get chosen -1 and weight 0.
// REQUIRES experts <= 1024.
void route_forward(Device& device, const RouterShape& shape, int64_t rows, const float* logits, const float* bias,
                   int32_t* chosen, float* weights, const int32_t* active = nullptr);
// dlogits [rows, experts] overwritten (zero where not chosen). G is float or bf16.
template <class G>
void route_backward(Device& device, const RouterShape& shape, int64_t rows, const float* logits, const int32_t* chosen,
                    const float* dweights, G* dlogits);

// Sorts the (row, choice) pairs by expert, keeping the order of rows inside an expert. REQUIRES the experts of a row
// distinct, as route_forward chooses them.
//   offsets  [experts + 1]    first slot of each expert; the last is the number of slots in use
//   source   [rows * top_k]   slot -> row; 0 past the slots in use
//   slot     [rows, top_k]    (row, choice) -> slot, or -1
void moe_dispatch(Device& device, int64_t rows, int64_t top_k, int64_t experts, const int32_t* chosen, int32_t* offsets,
                  int32_t* source, int32_t* slot);

// Both of these, in one launch when the batch is small.
void route_and_dispatch(Device& device, const RouterShape& shape, int64_t rows, const float* logits, const float* bias,
                        int32_t* chosen, float* weights, int32_t* offsets, int32_t* source, int32_t* slot,
                        const int32_t* active = nullptr);

// dispatched[s] = x[source[s]] for all rows * top_k slots, for callers that do not gather while multiplying.
template <class T>
void moe_gather(Device& device, int64_t slots, int64_t d, const T* x, const int32_t* source, T* dispatched);
// dx[row] += sum over its choices, ascending, of ddispatched[slot]. ddispatched T [slots, d], dx f32 [rows, d].
template <class T>
void moe_gather_backward(Device& device, int64_t rows, int64_t top_k, int64_t d, const T* ddispatched,
                         const int32_t* slot, float* dx);

// x[row] += shared[row] + sum over choices, ascending, of weights[row][j] * expert_out[slot[row][j]]: the sum first,
// then the shared experts, then the residual stream, as moe_combine and add_inplace do on the CPU.
//   expert_out T [slots, d], shared null or T [rows, d], x f32 [rows, d] the residual stream
template <class T>
void moe_combine(Device& device, int64_t rows, int64_t top_k, int64_t d, const T* expert_out, const int32_t* slot,
                 const float* weights, const T* shared, float* x);
// The same, and y = rms_norm_forward(x) with norm_w and eps (norm_device.h), in one launch and with the same bits. False,
// and nothing done, where there is no such kernel: for T = float, and unless d is a multiple of 8 up to 8192.
template <class T>
bool moe_combine_norm(Device& device, int64_t rows, int64_t top_k, int64_t d, const T* expert_out, const int32_t* slot,
                      const float* weights, const T* shared, float* x, const float* norm_w, float eps, T* y);
// dx f32 [rows, d], the gradient of the sum -> dexpert_out T [slots, d], dweights f32 [rows, top_k] (0 for padding) and
// dshared T [rows, d] (null: not wanted), all overwritten.
template <class T>
void moe_combine_backward(Device& device, int64_t rows, int64_t top_k, int64_t d, const T* expert_out,
                          const int32_t* slot, const float* weights, const float* dx, T* dexpert_out, float* dweights,
                          T* dshared);

}  // namespace perigee::kernels
