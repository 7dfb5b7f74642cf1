// What the two kernels of the bf16 forward know of each other. Internal to kernels/dplr.
#pragma once
#include "kernels/dplr/dplr_bf16.cuh"
#include "kernels/kda/kda_bf16_scan.cuh"

namespace perigee::kernels::dplr {

inline int64_t scan_blocks(const Problem& p) {
  return static_cast<int64_t>(p.batch.slices) * p.heads *
         ((p.dv + kda::kLongChannels - 1) / kda::kLongChannels);
}
// Whether the chain from chunk to chunk is what takes the time: the scan then has much in flight and few blocks on a
// multiprocessor.
inline bool few_blocks(const Device& dev, const Problem& p) {
  return scan_blocks(p) <= int64_t{4} * dev.info().multiprocessors;
}

}  // namespace perigee::kernels::dplr
