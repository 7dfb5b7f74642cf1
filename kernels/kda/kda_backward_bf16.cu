// kda_backward over bf16, segment of chunks after segment, from last to first (docs/kernels/kda_backward.md). The scan of
// a segment occupies few blocks for long, so the segment before it is prepared in the same launch.
#include <algorithm>

#include "kernels/kda/kda_backward_bf16.cuh"
#include "kernels/kda/kda_backward_bf16_prepare.cuh"
#include "kernels/kda/kda_backward_bf16_scan.cuh"

namespace perigee::kernels {

namespace {

using namespace kda_grad;

// Chunks times heads whose records are held at once: 79 KB each.
constexpr int64_t kSegment = 176 * 32;
constexpr int kSharedBytes = static_cast<int>(std::max(sizeof(prepare::Shared), sizeof(scan::Shared)));
static_assert(3 * (kSharedBytes + 1024) <= 228 * 1024);

// Blocks [0, scan_blocks * heads * 2) scan one segment, the others prepare another.
__global__ void __launch_bounds__(kThreads, 3)
    front_kernel(Operands scanned, int scan_blocks, Operands prepared) {
  extern __shared__ __align__(1024) std::byte memory[];
  const int heads = scanned.heads, block = blockIdx.x, of_scan = scan_blocks * heads * 2;
  if (block < of_scan) {
    scan::run(scanned, memory, block / 2 % heads, block % 2, block / (2 * heads), scan_blocks);
  } else {
    const int at = block - of_scan;
    prepare::run(prepared, memory, at % heads, prepared.slot0 + at / heads);
  }
}

void launch_front(Device& dev, const Operands& scanned, const Operands& prepared) {
  const int scan_blocks = scanned.slot1 > scanned.slot0 ? std::min(scanned.batch.slices, 16) : 0;
  const int blocks = scan_blocks * scanned.heads * 2 + (prepared.slot1 - prepared.slot0) * prepared.heads;
  if (blocks == 0) return;
  allow_shared_memory(front_kernel, kSharedBytes);
  front_kernel<<<static_cast<unsigned>(blocks), kThreads, kSharedBytes, dev.stream()>>>(scanned, scan_blocks,
                                                                                        prepared);
  PERIGEE_LAUNCHED();
}

__global__ void slice_of_kernel(DeviceBatch batch, int* slice_of) {
  const int slice = blockIdx.x;
  const DeviceSlice s = batch.slice[slice];
  const int chunks = (s.count + kChunk - 1) / kChunk;
  for (int c = threadIdx.x; c < chunks; c += blockDim.x)
    slice_of[kda_chunk_slot(s.begin, slice, c)] = slice + 1;
}

}  // namespace

template <>
void kda_backward<bf16>(Device& dev, const KdaShape& shape, const bf16* q, const bf16* k, const bf16* v,
                        const float* g, const float* beta, const bf16* chunk_states, const DeviceBatch& batch,
                        const bf16* dout, bf16* dq, bf16* dk_, bf16* dv_, float* dg, float* dbeta) {
  PERIGEE_CHECK(shape.heads > 0, "heads {}", shape.heads);
  PERIGEE_CHECK(shape.dk > 0 && shape.dk <= kDim && shape.dk % 16 == 0, "dk {}: a multiple of 16 up to 128",
                shape.dk);
  PERIGEE_CHECK(shape.dv > 0 && shape.dv <= kDim && shape.dv % 16 == 0, "dv {}: a multiple of 16 up to 128",
                shape.dv);
  PERIGEE_CHECK(batch.training(), "the backward takes whole sequences");
  if (batch.rows == 0 || batch.slices == 0 || batch.max_count == 0) return;
  const DeviceScratch::Mark mark(dev.scratch);
  const int heads = static_cast<int>(shape.heads);
  const int64_t slots = kda_chunk_slots(batch.rows, batch.slices);
  const int64_t most = std::max<int64_t>(1, kSegment / heads);
  const int64_t segments = (slots + most - 1) / most, segment = (slots + segments - 1) / segments;
  int* slice_of = dev.scratch.take<int>(slots);
  std::byte* records[2] = {dev.scratch.take<std::byte>(segment * heads * Record::kBytes),
                           dev.scratch.take<std::byte>(segments > 1 ? segment * heads * Record::kBytes : 0)};
  std::byte* dx = dev.scratch.take<std::byte>(segment * heads * kTileBytes);
  std::byte* ds = dev.scratch.take<std::byte>(segment * heads * kStateBytes);
  float* carry[2] = {dev.scratch.take<float>(carry_floats(heads)),
                     dev.scratch.take<float>(carry_floats(heads))};
  dev.zero(slice_of, slots * static_cast<int64_t>(sizeof(int)));
  slice_of_kernel<<<static_cast<unsigned>(batch.slices), 128, 0, dev.stream()>>>(batch, slice_of);
  PERIGEE_LAUNCHED();
  Operands o{heads, static_cast<int>(shape.dk), static_cast<int>(shape.dv)};
  o.q = q, o.k = k, o.v = v, o.states = chunk_states, o.dout = dout, o.g = g, o.beta = beta;
  o.dq = dq, o.dk_ = dk_, o.dv_ = dv_, o.dg = dg, o.dbeta = dbeta;
  o.batch = batch, o.slice_of = slice_of, o.dx = dx, o.ds = ds;
  // A slice that a segment cuts hands its dS to the segment before; two buffers, as a block may read one while another
  // block fills the next.
  const auto operands_of = [&](int64_t index) {
    Operands x = o;
    x.slot0 = static_cast<int>(std::max<int64_t>(index, 0) * segment);
    x.slot1 = static_cast<int>(std::min((index + 1) * segment, slots));
    x.records = records[index & 1];
    x.carry_in = carry[index & 1], x.carry_out = carry[(index & 1) ^ 1];
    return x;
  };
  Operands none = o;
  none.slot0 = none.slot1 = 0;
  launch_front(dev, none, operands_of(segments - 1));
  for (int64_t i = segments - 1; i >= 0; --i) {
    launch_front(dev, operands_of(i), i > 0 ? operands_of(i - 1) : none);
    launch_finish(dev, operands_of(i));
  }
}

}  // namespace perigee::kernels
