// The bf16 forward: checks, buffers and the order of the launches.
#include "kernels/dplr/dplr_bf16.cuh"

namespace perigee::kernels {

using dplr::Problem;

template <>
int64_t dplr_state_bytes<bf16>(const DplrShape& shape) {
  return shape.heads * dplr::StateLayout::kBytes;
}

template <>
void dplr_forward<bf16>(Device& dev, const DplrShape& shape, const DplrDeviceInputs<bf16>& in,
                        const DeviceBatch& batch, int64_t state_offset, bf16* out, bf16* chunk_states) {
  PERIGEE_CHECK(shape.heads > 0 && shape.dk > 0 && shape.dv > 0, "no heads or channels");
  PERIGEE_CHECK(shape.dk % 16 == 0 && shape.dk <= dplr::kDim && shape.dv % 16 == 0 && shape.dv <= dplr::kDim,
                "bf16: dk and dv are multiples of 16 up to 128");
  PERIGEE_CHECK(chunk_states == nullptr || batch.training(), "chunk states belong to training");
  PERIGEE_CHECK(state_offset % 256 == 0, "state offset");
  PERIGEE_CHECK(dev.info().capability == 90, "the delta rule in bf16 is written for compute capability 9.0");
  if (batch.slices == 0 || batch.rows == 0 || batch.max_count == 0) return;
  Problem p = {};
  p.heads = static_cast<int>(shape.heads), p.dk = static_cast<int>(shape.dk),
  p.dv = static_cast<int>(shape.dv);
  p.q = in.q, p.k = in.k, p.v = in.v, p.a = in.a, p.b = in.b, p.g = in.g;
  p.batch = batch, p.state_offset = state_offset, p.out = out, p.chunk_states = chunk_states;
  const DeviceScratch::Mark mark(dev.scratch);
  const int slots = batch.rows / dplr::kChunk + 2 * batch.slices;
  // There are slots that no chunk has; a few of them are not worth a segment of their own.
  constexpr int kMost = static_cast<int>(kDplrSegment), kFew = 8;
  const int segments = slots <= kMost + kFew ? 1 : (slots - kFew + kMost - 1) / kMost;
  const int segment = (slots + segments - 1) / segments;
  p.table = dev.scratch.take<int2>(slots);
  p.ready = dev.scratch.take<unsigned>(slots * shape.heads);
  p.records = dev.scratch.take<uint8_t>(segment * shape.heads * dplr::Record::kBytes);
  p.carry[0] = dev.scratch.take<uint8_t>(shape.heads * 65536);
  p.carry[1] = dev.scratch.take<uint8_t>(shape.heads * 65536);
  kda::Problem plan = {};
  plan.heads = p.heads, plan.batch = batch, plan.table = p.table, plan.ready = p.ready;
  kda::launch_plan(dev, plan, slots);
  for (int at = 0; at < slots; at += segment) {
    p.slot_begin = at;
    p.slot_end = at + segment < slots ? at + segment : slots;
    dplr::launch_intra(dev, p);
    dplr::launch_scan(dev, p);
    uint8_t* const written = p.carry[1];
    p.carry[1] = p.carry[0];
    p.carry[0] = written;
  }
}

}  // namespace perigee::kernels
