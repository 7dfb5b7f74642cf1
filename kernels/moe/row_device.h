// The feed-forward half of one row over experts, and what comes before and after it, in launches that make their own
// inputs: a decoding step at batch 1 waits for launches as long as for memory. Weights are bfloat16 tiles (tiles.h), read
// ahead (gemm_device.h). Bits: those of the separate calls, which each contract names. Deep dive: docs/kernels/model.md
#pragma once
#include <cstdint>
#include <span>

#include "kernels/gemm/gemm_device.h"
#include "kernels/moe/shape.h"

namespace perigee::kernels {

struct RowExperts {
  RouterShape shape;
  int64_t d = 0, width = 0;  // inputs of an expert, and its width, which the shared experts have too
  // Of expert 0, and the bytes from one expert to the next: gate_up [2 * width, d], down [d, width].
  const void *gate_up = nullptr, *down = nullptr;
  int64_t gate_up_bytes = 0, down_bytes = 0;
  const void *shared_gate_up = nullptr, *shared_down = nullptr;  // null: there are none
  const bf16* h = nullptr;                                       // [d]
  const float *logits = nullptr, *bias = nullptr;                // [experts]
  int32_t* chosen = nullptr;    // [top_k]; holds kRowUnknown when the launch before ends (norm_router_logits)
  float* weights = nullptr;     // [top_k]
  int32_t* slot = nullptr;      // [top_k] 0, 1, ..: what moe_combine wants of choices that lie in order
  bf16* gate_up_out = nullptr;  // [top_k + 1, 2 * width], the last of the shared experts
  bf16* out = nullptr;          // [top_k + 1, d], likewise
};
inline constexpr int32_t kRowUnknown = -2;

// Whether row_experts takes a model of this shape on this device.
bool row_experts_fit(const Device& device, const RouterShape& shape, int64_t d, int64_t width);
// chosen, weights = route_forward of the logits; gate_up_out and out of every choice and of the shared experts as by
// matmul_experts, swiglu_forward, matmul_experts. Two launches. REQUIRES row_experts_fit.
void row_experts(Device& device, const RowExperts& e);

// What row_experts leaves to be added to the residual stream, and the norm behind it.
struct RowCombination {
  int64_t top_k = 0, d = 0;
  const bf16* out = nullptr;  // [top_k + 1, d], the last of the shared experts when there are some
  bool shared = false;
  const float* weights = nullptr;  // [top_k]
  const float* x = nullptr;        // [d] the residual stream before
  const float* norm_w = nullptr;
  float eps = 0.0f;
};
// x_out = x + (shared + the weighted sum of the choices), and y = W rms_norm(x_out) of the tasks, whose x is not looked at:
// moe_combine_norm and matmul. x_out is not x. False, and nothing done, where the tasks are more than eight, not all of
// one row and d inputs, or have additions.
bool row_combine_matmul(Device& device, const RowCombination& before, float* x_out,
                        std::span<const DeviceMatmulTask<bf16>> tasks);

}  // namespace perigee::kernels
