// The launches of mla_bf16_*.cu.
#pragma once
#include <cstdint>

#include "kernels/mla/mla_device.h"

namespace perigee::kernels::mla {

struct AttendArgs;

// One tile of 32 heads of one token, splits in parallel; and the merge of what it leaves, `most_splits` at most.
void launch_decode(Device& device, AttendArgs args, int64_t most_splits);
// One tile of 64 queries at a time, all its splits by one CTA.
void launch_prefill(Device& device, AttendArgs args);
// Rows of c to tiles: page p of slice i goes to page begin / 64 + i + p of `pages`.
void launch_own_pages(Device& device, const MlaShape& shape, const DeviceBatch& batch, const bf16* c,
                      std::byte* pages);

}  // namespace perigee::kernels::mla
