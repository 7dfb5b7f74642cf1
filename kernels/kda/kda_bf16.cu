// The bf16 forward: checks, buffers and the order of the launches.
#include "kernels/kda/kda_bf16_scan.cuh"

namespace perigee::kernels {

using kda::Problem;
using kda::Record;
using kda::StateLayout;

template <>
int64_t kda_state_bytes<bf16>(const KdaShape& shape) {
  return shape.heads * StateLayout::kBytes;
}

template <>
void kda_forward<bf16>(Device& dev, const KdaShape& shape, const bf16* q, const bf16* k, const bf16* v, const float* g,
                       const float* beta, const DeviceBatch& batch, int64_t state_offset, bf16* out,
                       bf16* chunk_states) {
  PERIGEE_CHECK(shape.heads > 0 && shape.dk > 0 && shape.dv > 0, "no heads or channels");
  PERIGEE_CHECK(shape.dk % 16 == 0 && shape.dk <= kda::kDim && shape.dv % 16 == 0 && shape.dv <= kda::kDim,
                "bf16: dk and dv are multiples of 16 up to 128");
  PERIGEE_CHECK(chunk_states == nullptr || batch.training(), "chunk states belong to training");
  PERIGEE_CHECK(state_offset % 256 == 0, "state offset");
  PERIGEE_CHECK(dev.info().capability == 90, "KDA in bf16 is written for compute capability 9.0");
  if (batch.slices == 0 || batch.rows == 0) return;
  Problem p = {};
  p.heads = static_cast<int>(shape.heads), p.dk = static_cast<int>(shape.dk), p.dv = static_cast<int>(shape.dv);
  p.q = q, p.k = k, p.v = v, p.g = g, p.beta = beta, p.batch = batch, p.state_offset = state_offset;
  p.out = out, p.chunk_states = chunk_states;
  if (batch.max_count == 1 && !batch.training()) {
    launch_decode(dev, p);
    return;
  }
  const DeviceScratch::Mark mark(dev.scratch);
  int slots = batch.rows / kda::kChunk + 2 * batch.slices;
  // There are slots that no chunk has; a few of them are not worth a segment of their own.
  constexpr int kMost = static_cast<int>(kKdaSegment), kFew = 8;
  const auto segments_of = [](int n) { return n <= kMost + kFew ? 1 : (n - kFew + kMost - 1) / kMost; };
  p.segments = segments_of(slots);
  int segment = (slots + p.segments - 1) / p.segments;
  // Several sequences that take several segments each have a part in every one, so that all of them keep blocks of the scan
  // busy; where they are of one length, or there would be many more segments.
  const int longest = batch.max_count / kda::kChunk + 2;
  if (p.segments > 1 && batch.slices > 1 && batch.slices <= kKdaRoundSlices && int64_t{4} * batch.slices * longest <= int64_t{5} * slots &&
      !takes_long_scan(dev, p)) {
    p.segments = segments_of(batch.slices * longest);
    p.round = (longest + p.segments - 1) / p.segments;
    segment = batch.slices * p.round;
    slots = p.segments * segment;
  }
  const int64_t carried = shape.heads * (p.round > 0 ? batch.slices : 1) * int64_t{65536};
  p.table = dev.scratch.take<int2>(slots);
  p.ready = dev.scratch.take<unsigned>(slots * shape.heads);
  p.records = dev.scratch.take<uint8_t>(segment * shape.heads * Record::kBytes);
  p.last_t = dev.scratch.take<float>(batch.slices * shape.heads * 256);
  p.carry[0] = dev.scratch.take<uint8_t>(carried);
  p.carry[1] = dev.scratch.take<uint8_t>(carried);
  launch_plan(dev, p, slots);
  for (int at = 0; at < slots; at += segment) {
    p.slot_begin = at;
    p.slot_end = at + segment < slots ? at + segment : slots;
    launch_intra(dev, p);
    launch_scan(dev, p);
    uint8_t* const written = p.carry[1];
    p.carry[1] = p.carry[0];
    p.carry[0] = written;
  }
}

}  // namespace perigee::kernels
