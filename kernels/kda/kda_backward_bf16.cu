// kda_backward over bf16: three kernels per segment of chunks, segments from last to first (docs/kernels/kda_backward.md).
#include "kernels/kda/kda_backward_bf16.cuh"

namespace perigee::kernels {

namespace {

using namespace kda_grad;

// Chunks whose records are held at once: 58 KB per chunk and head.
constexpr int64_t kSegment = 256;

__global__ void slice_of_kernel(DeviceBatch batch, int* slice_of) {
  const int slice = blockIdx.x;
  const DeviceSlice s = batch.slice[slice];
  const int chunks = (s.count + kChunk - 1) / kChunk;
  for (int c = threadIdx.x; c < chunks; c += blockDim.x) slice_of[kda_chunk_slot(s.begin, slice, c)] = slice + 1;
}

}  // namespace

template <>
void kda_backward<bf16>(Device& dev, const KdaShape& shape, const bf16* q, const bf16* k, const bf16* v, const float* g,
                        const float* beta, const bf16* chunk_states, const DeviceBatch& batch, const bf16* dout, bf16* dq,
                        bf16* dk_, bf16* dv_, float* dg, float* dbeta) {
  PERIGEE_CHECK(shape.heads > 0, "heads {}", shape.heads);
  PERIGEE_CHECK(shape.dk > 0 && shape.dk <= kDim && shape.dk % 16 == 0, "dk {}: a multiple of 16 up to 128", shape.dk);
  PERIGEE_CHECK(shape.dv > 0 && shape.dv <= kDim && shape.dv % 16 == 0, "dv {}: a multiple of 16 up to 128", shape.dv);
  PERIGEE_CHECK(batch.training(), "the backward takes whole sequences");
  if (batch.rows == 0 || batch.slices == 0 || batch.max_count == 0) return;
  const DeviceScratch::Mark mark(dev.scratch);
  const int heads = static_cast<int>(shape.heads);
  const int64_t slots = kda_chunk_slots(batch.rows, batch.slices), segment = slots < kSegment ? slots : kSegment;
  int* slice_of = dev.scratch.take<int>(slots);
  std::byte* records = dev.scratch.take<std::byte>(segment * heads * Record::kBytes);
  std::byte* dx = dev.scratch.take<std::byte>(segment * heads * kTileBytes);
  std::byte* ds = dev.scratch.take<std::byte>(segment * heads * kStateBytes);
  float* carry[2] = {dev.scratch.take<float>(carry_floats(heads)), dev.scratch.take<float>(carry_floats(heads))};
  dev.zero(slice_of, slots * static_cast<int64_t>(sizeof(int)));
  slice_of_kernel<<<static_cast<unsigned>(batch.slices), 128, 0, dev.stream()>>>(batch, slice_of);
  PERIGEE_LAUNCHED();
  Operands o{heads, static_cast<int>(shape.dk), static_cast<int>(shape.dv)};
  o.q = q, o.k = k, o.v = v, o.states = chunk_states, o.dout = dout, o.g = g, o.beta = beta;
  o.dq = dq, o.dk_ = dk_, o.dv_ = dv_, o.dg = dg, o.dbeta = dbeta;
  o.batch = batch, o.slice_of = slice_of, o.records = records, o.dx = dx, o.ds = ds;
  // A slice that a segment cuts hands its dS to the segment before; two buffers, as a block may read one while another
  // block fills the next.
  int turn = 0;
  for (int64_t end = slots; end > 0; end -= segment, turn ^= 1) {
    o.slot0 = static_cast<int>(end > segment ? end - segment : 0);
    o.slot1 = static_cast<int>(end);
    o.carry_in = carry[turn], o.carry_out = carry[turn ^ 1];
    launch_prepare(dev, o);
    launch_scan(dev, o);
    launch_finish(dev, o);
  }
}

}  // namespace perigee::kernels
