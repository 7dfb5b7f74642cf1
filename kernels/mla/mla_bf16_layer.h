// The launch between the two of mla_bf16_layer.cu.
#pragma once
#include "kernels/mla/mla_device.h"

namespace perigee::kernels::mla {

inline constexpr int kLayerHeads = 32;  // that a cluster takes together
inline constexpr int kLayerLatent = 512, kLayerRope = 64, kLayerWidth = kLayerLatent + kLayerRope;
inline constexpr int kLayerPages = 256;  // in a page table, at most
inline constexpr int kLayerSplits = 16;  // of a row, at most, then
inline constexpr int kSplitFloats = kLayerHeads * kLayerLatent + 2 * kLayerHeads;

// A split's O [32 heads][512], then 32 references and 32 sums, at split i of slice s, heads 32 g and on:
// partial + ((s * heads / 32 + g) * most_splits + i) * kSplitFloats. What is not there is not written.
struct FewArgs {
  const bf16* q;  // [rows, heads, 576] absorbed
  DeviceBatch batch;
  int64_t page_offset;
  int heads, most_splits;
  float log2_scale;
  float* partial;
};
void launch_few(Device& device, const FewArgs& args);

}  // namespace perigee::kernels::mla
