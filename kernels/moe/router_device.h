// The router's product on the device: logits = h Wᵀ in float32, the weight in float32 panels (gemm.h) for both
// activation types. Deep dive: docs/kernels/gemm_grad.md
//
// NUMERICS. float: the bits of matmul on the CPU. bf16: the weight is split exactly into three bfloat16 terms, whose
// products with h are exact; pieces of 64 inputs are summed by the tensor cores (mma.m16n8k16, the smallest term first)
// and the pieces are added in ascending order. Same bits for any number of rows and any place of a row.
// REQUIRES (bf16) d a multiple of 8, h aligned to 16 bytes. The weight is read ahead: see gemm_device.h.
#pragma once
#include "kernels/gemm/gemm_device.h"

namespace perigee::kernels {

// h [rows, d]; w_panels: float32 panels of [experts, d]; logits [rows, experts], overwritten.
// Takes scratch of at most router_scratch_bytes(experts, d).
template <class T>
void router_logits(Device& device, int64_t rows, int64_t experts, int64_t d, const T* h, const float* w_panels,
                   float* logits);
// h = rms_norm_forward(x) with norm_w and eps (norm_device.h), then the same, in one launch and with the same bits. False,
// and nothing done, where there is no such kernel: T = float, more than four rows, d above 2304 or not a multiple of 8. unknown: device memory set to kRowUnknown (row_device.h).
template <class T>
bool norm_router_logits(Device& device, int64_t rows, int64_t experts, int64_t d, const float* x, const float* norm_w,
                        float eps, const float* w_panels, T* h, float* logits, std::span<int32_t> unknown = {});
template <>
bool norm_router_logits<float>(Device&, int64_t, int64_t, int64_t, const float*, const float*, float, const float*, float*,
                               float*, std::span<int32_t>);
template <>
bool norm_router_logits<bf16>(Device&, int64_t, int64_t, int64_t, const float*, const float*, float, const float*, bf16*,
                              float*, std::span<int32_t>);
int64_t router_scratch_bytes(int64_t experts, int64_t d);

// Gradients of the logits, each skipped when its pointer is null: dh [rows, d] stored as `store` says (kAct: T, else
// float) and dw, float32 panels, accumulated into. float: the bits of the CPU's matmul_grad_input and
// matmul_grad_weight. bf16: dlogits and the weight count with sixteen bits of their mantissas; scratch of at most
// router_grad_scratch_bytes.
template <class T>
void router_grad(Device& device, int64_t rows, int64_t experts, int64_t d, const T* h, const float* w_panels,
                 const float* dlogits, void* dh, Store store, float* dw_panels);

int64_t router_grad_scratch_bytes(const Device& device, int64_t rows, int64_t experts, int64_t d);

}  // namespace perigee::kernels
