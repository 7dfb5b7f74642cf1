// The forward over bf16: shapes to tiles, and the choice between decoding and prefill.
#include <algorithm>

#include "kernels/mla/mla_bf16_launch.h"
#include "kernels/mla/mla_bf16_runs.cuh"

namespace perigee::kernels {

template <>
void mla_forward<bf16>(Device& device, const MlaShape& shape, const bf16* q, const DeviceBatch& batch,
                       int64_t page_offset, const bf16* c, bf16* out, float* lse) {
  using namespace mla;
  PERIGEE_CHECK(shape.latent > 0 && shape.latent <= 512 && shape.rope >= 0 && shape.rope <= 64,
                "latent {} rope {}", shape.latent, shape.rope);
  PERIGEE_CHECK(shape.latent % 8 == 0 && shape.rope % 8 == 0, "latent {} rope {}", shape.latent, shape.rope);
  PERIGEE_CHECK(page_offset % 16 == 0, "page_offset {}", page_offset);
  PERIGEE_CHECK(device.info().capability == 90, "bf16 attention is written for compute capability 9.0");
  PERIGEE_CHECK(batch.training() == (c != nullptr), "c goes with training");
  if (batch.slices == 0 || batch.rows == 0) return;
  AttendArgs args = {};
  args.q = q;
  args.out = out;
  args.lse = lse;
  args.batch = batch;
  args.page_offset = page_offset;
  args.heads = static_cast<int>(shape.heads);
  args.latent = static_cast<int>(shape.latent);
  args.width = static_cast<int>(shape.width());
  args.key_tiles = static_cast<int>(tiles_across(shape.width()));
  args.log2_scale = shape.scale * 1.44269504088896341f;
  if (batch.training()) {
    DeviceScratch::Mark mark(device.scratch);
    auto* const pages = device.scratch.take<std::byte>((batch.rows / kLatentPage + batch.slices + 1) *
                                                       args.key_tiles * kTileBytes);
    launch_own_pages(device, shape, batch, c, pages);
    args.own_pages = pages;
    launch_prefill(device, args);
  } else if (batch.max_count == 1) {
    launch_decode(device, args, most_split_count(static_cast<int>(batch.max_pages * kLatentPage - 1)));
  } else {
    launch_prefill(device, args);
  }
}

}  // namespace perigee::kernels
