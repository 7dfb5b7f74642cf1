// dplr_backward over bf16, segment of chunks after segment, from last to first, as KDA's
// (kernels/kda/kda_backward_bf16.cu): only dS goes through the sequence, and the scan that carries it is the same.
#include <algorithm>

#include "kernels/dplr/dplr_backward_bf16.cuh"
#include "kernels/dplr/dplr_backward_bf16_prepare.cuh"
#include "kernels/kda/kda_backward_bf16_scan.cuh"

namespace perigee::kernels::dplr_grad {

namespace {

namespace scan = kda_grad::scan;

// Chunks times heads whose records are held at once.
constexpr int64_t kSegment = 128 * 32;
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

__global__ void clear_kernel(int2* table, int slots) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < slots) table[i] = make_int2(-1, 0);
}
__global__ void table_kernel(DeviceBatch batch, int2* table) {
  const int slice = blockIdx.x;
  const DeviceSlice s = batch.slice[slice];
  const int chunks = (s.count + kChunk - 1) / kChunk;
  for (int c = threadIdx.x; c < chunks; c += blockDim.x)
    table[kda_chunk_slot(s.begin, slice, c)] = make_int2(slice, c);
}

}  // namespace

}  // namespace perigee::kernels::dplr_grad

namespace perigee::kernels {

using dplr_grad::Operands;
using dplr_grad::Record;

template <>
void dplr_backward<bf16>(Device& dev, const DplrShape& shape, const DplrDeviceInputs<bf16>& in,
                         const bf16* chunk_states, const DeviceBatch& batch, const bf16* dout,
                         const DplrDeviceGradients<bf16>& gradients) {
  PERIGEE_CHECK(shape.heads > 0, "heads {}", shape.heads);
  PERIGEE_CHECK(shape.dk > 0 && shape.dk <= dplr_grad::kDim && shape.dk % 16 == 0,
                "dk {}: a multiple of 16 up to 128", shape.dk);
  PERIGEE_CHECK(shape.dv > 0 && shape.dv <= dplr_grad::kDim && shape.dv % 16 == 0,
                "dv {}: a multiple of 16 up to 128", shape.dv);
  PERIGEE_CHECK(batch.training(), "the backward takes whole sequences");
  if (batch.rows == 0 || batch.slices == 0 || batch.max_count == 0) return;
  const DeviceScratch::Mark mark(dev.scratch);
  const int heads = static_cast<int>(shape.heads);
  const int64_t slots = kda_chunk_slots(batch.rows, batch.slices);
  const int64_t most = std::max<int64_t>(1, dplr_grad::kSegment / heads);
  const int64_t segments = (slots + most - 1) / most, segment = (slots + segments - 1) / segments;
  int2* table = dev.scratch.take<int2>(slots);
  unsigned* ready = dev.scratch.take<unsigned>(slots * heads);  // of the forward's kernel; nobody asks
  uint8_t* forward = dev.scratch.take<uint8_t>(segment * heads * dplr::Record::kBytes);
  std::byte* records[2] = {dev.scratch.take<std::byte>(segment * heads * Record::kBytes),
                           dev.scratch.take<std::byte>(segments > 1 ? segment * heads * Record::kBytes : 0)};
  std::byte* dx = dev.scratch.take<std::byte>(segment * heads * dplr_grad::kTileBytes);
  std::byte* ds = dev.scratch.take<std::byte>(segment * heads * dplr_grad::kStateBytes);
  float* carry[2] = {dev.scratch.take<float>(dplr_grad::carry_floats(heads)),
                     dev.scratch.take<float>(dplr_grad::carry_floats(heads))};
  dplr_grad::clear_kernel<<<blocks_for(slots, 256), 256, 0, dev.stream()>>>(table, static_cast<int>(slots));
  PERIGEE_LAUNCHED();
  dplr_grad::table_kernel<<<static_cast<unsigned>(batch.slices), 128, 0, dev.stream()>>>(batch, table);
  PERIGEE_LAUNCHED();
  dplr::Problem p = {};
  p.heads = heads, p.dk = static_cast<int>(shape.dk), p.dv = static_cast<int>(shape.dv);
  p.q = in.q, p.k = in.k, p.v = in.v, p.a = in.a, p.b = in.b, p.g = in.g;
  p.batch = batch, p.table = table, p.ready = ready, p.records = forward;
  Operands o{heads, p.dk, p.dv, in, chunk_states, dout, gradients, batch};
  o.table = table, o.forward = forward, o.dx = dx, o.ds = ds;
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
  const auto prepared = [&](int64_t index) {
    const Operands x = operands_of(index);
    p.slot_begin = x.slot0, p.slot_end = x.slot1;
    dplr::launch_intra(dev, p);
    return x;
  };
  dplr_grad::launch_front(dev, none, prepared(segments - 1));
  for (int64_t i = segments - 1; i >= 0; --i) {
    dplr_grad::launch_front(dev, operands_of(i), i > 0 ? prepared(i - 1) : none);
    dplr_grad::launch_finish(dev, operands_of(i));
  }
}

}  // namespace perigee::kernels
