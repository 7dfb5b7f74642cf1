// Where the keys of softmax attention and the latents of MLA lie. Private to policy/model.
#pragma once
#include "policy/model/layers.h"

namespace perigee::policy {

// The pass's slices with their pages of [64, width]: in training pages are in `rows` [pass.rows, width] itself, else in the
// sequences' blocks, into which the new rows are copied first. Memory is ctx.scratch.
std::span<const kernels::MlaSlice> bind_pages(const Pass& pass, int64_t layer, int64_t width, const float* rows);

}  // namespace perigee::policy
