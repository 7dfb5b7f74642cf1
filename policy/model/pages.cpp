#include "policy/model/pages.h"

#include <cstring>

namespace perigee::policy {

using namespace kernels;

std::span<const MlaSlice> bind_pages(const Pass& pass, int64_t layer, int64_t width, const float* rows) {
  Scratch& scratch = pass.ctx.scratch;
  const size_t n = pass.slices.size();
  auto* out = scratch.take<MlaSlice>(static_cast<int64_t>(n));
  for (size_t i = 0; i < n; ++i) {
    const Slice& s = pass.slices[i];
    const int64_t pages = (s.position + s.count + kLatentPage - 1) / kLatentPage;
    auto* table = scratch.take<const float*>(pages);
    if (pass.training()) {
      for (int64_t page = 0; page < pages; ++page) table[page] = rows + (s.begin + page * kLatentPage) * width;
    } else {
      const SequenceSlice& sequence = pass.sequences[i];
      const int64_t offset = pass.state->page_offset(layer);
      PERIGEE_CHECK(static_cast<int64_t>(sequence.blocks.size()) >= pages, "blocks {} pages {}",
                    sequence.blocks.size(), pages);
      for (int64_t page = 0; page < pages; ++page)
        table[page] = reinterpret_cast<float*>(sequence.blocks[static_cast<size_t>(page)] + offset);
      for (int64_t r = 0; r < s.count; ++r) {
        const int64_t position = s.position + r;
        float* to =
            reinterpret_cast<float*>(sequence.blocks[static_cast<size_t>(position / kLatentPage)] + offset) +
            position % kLatentPage * width;
        std::memcpy(to, rows + (s.begin + r) * width, static_cast<size_t>(width) * sizeof(float));
      }
    }
    out[i] = {s, table};
  }
  return {out, n};
}

}  // namespace perigee::policy
