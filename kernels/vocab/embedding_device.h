// The embedding on the device. CPU: kernels/vocab/vocab.h. T, the type of the table, is float or bf16.
#pragma once
#include <cstdint>

#include "kernels/device/device.h"

namespace perigee::kernels {

// table T row-major [vocab, d]; tokens device [rows]; x f32 [rows, d]. A token outside the vocabulary gives zeros: so may
// padding rows be marked, and the host cannot look.
template <class T>
void embedding_forward(Device& device, int64_t rows, int64_t d, int64_t vocab, const T* table, const int32_t* tokens,
                       float* x);
// dtable f32 [vocab, d] += dx rows, in the order of rows for each token: the bits of the CPU. Tokens outside the
// vocabulary are passed over.
void embedding_backward(Device& device, int64_t rows, int64_t d, int64_t vocab, const int32_t* tokens, const float* dx,
                        float* dtable);

}  // namespace perigee::kernels
