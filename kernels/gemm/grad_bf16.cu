// matmul_grad_input and matmul_grad_weight over bf16: checks, cuts the work into items, launches grad_bf16.cuh.
#include "kernels/gemm/grad_bf16.cuh"

#include <algorithm>

namespace perigee::kernels {
namespace {

constexpr int kMostPiecesPerBlock = 4;  // pieces of split tiles, per multiprocessor: bounds the scratch

// dw += the pieces of the split tiles, in order. Block: one 64 x 64 block of a split tile.
__global__ void __launch_bounds__(256) add_pieces(const __grid_constant__ Work work) {
  const int64_t tile = work.whole + blockIdx.x;
  int which = 0;
  while (which + 1 < work.tasks && work.task[which + 1].first_tile <= tile) ++which;
  const Task& t = work.task[which];
  const int64_t at = tile - t.first_tile, across = tiles_across(t.k);
  const int64_t i = at / t.columns * 2 + blockIdx.y / 4, j = at % t.columns * 4 + blockIdx.y % 4;
  if (i >= tiles_across(t.n) || j >= across) return;
  const float* from = work.partial + blockIdx.x * work.pieces * kPieceFloats + blockIdx.y * kTileElements;
  float* const to = static_cast<float*>(t.out) + (i * across + j) * kTileElements;
#pragma unroll
  for (int m = 0; m < 4; ++m) {
    const int e = (m * 256 + static_cast<int>(threadIdx.x)) * 4;
    float4 sum = *reinterpret_cast<const float4*>(from + e);
    for (int z = 1; z < work.pieces; ++z) {
      const float4 x = *reinterpret_cast<const float4*>(from + z * kPieceFloats + e);
      sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
    }
    float4 old = *reinterpret_cast<const float4*>(to + e);
    old.x += sum.x, old.y += sum.y, old.z += sum.z, old.w += sum.w;
    *reinterpret_cast<float4*>(to + e) = old;
  }
}

// The driver's function that describes a matrix to the copy engine; the runtime finds it: nothing links to the driver.
using EncodeFunction = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                    const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                    CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
EncodeFunction encode_function() {
  static const EncodeFunction function = [] {
    void* f = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    PERIGEE_CUDA(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault, &found));
#else
    PERIGEE_CUDA(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &f, cudaEnableDefault, &found));
#endif
    PERIGEE_CHECK(found == cudaDriverEntryPointSuccess && f != nullptr);
    return reinterpret_cast<EncodeFunction>(f);
  }();
  return function;
}

// The first `columns` of `rows` rows, read in swizzled boxes of 64 by box_rows; what lies outside reads as zero.
CUtensorMap describe(const bf16* matrix, int64_t columns, int64_t rows, int64_t ld, int box_rows) {
  CUtensorMap map;
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows), 1};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(ld) * 2, static_cast<cuuint64_t>(ld) * 2};
  const cuuint32_t box[3] = {64, static_cast<cuuint32_t>(box_rows), 1}, ones[3] = {1, 1, 1};
  const CUresult result = encode_function()(
      &map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, const_cast<bf16*>(matrix), sizes, strides, box, ones,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  PERIGEE_CHECK(result == CUDA_SUCCESS);
  return map;
}

bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

template <Mode mode>
void launch(Device& device, const Work& work) {
  if (work.items == 0) return;
  PERIGEE_CHECK(device.info().capability == 90);
  allow_shared_memory(grad_kernel<mode>, kSharedBytes);
  const int64_t blocks = std::min<int64_t>(work.items, device.info().multiprocessors);
  grad_kernel<mode><<<static_cast<unsigned>(blocks), kThreads, kSharedBytes, device.stream()>>>(work);
  PERIGEE_LAUNCHED();
}

// Adds the task as far as one expert's and a dense product's are alike; returns it for the rest.
Task& add_input_task(Work& work, const void* w, int64_t n, int64_t k, const bf16* dy, int64_t lddy, int64_t rows,
                     void* dx, int64_t lddx, Store store) {
  Task& t = work.task[work.tasks];
  t.other = static_cast<const bf16*>(w), t.out = dx, t.ld_out = lddx, t.store = store;
  t.rows = static_cast<int>(rows), t.n = static_cast<int>(n), t.k = static_cast<int>(k);
  t.columns = static_cast<int>((k + kN - 1) / kN);
  t.first_tile = work.items;
  work.dy[work.tasks++] = describe(dy, n, rows, lddy, kM);
  return t;
}
void check_input(const void* w, int64_t n, int64_t k, const bf16* dy, int64_t lddy, int64_t rows, const void* dx,
                 int64_t lddx, Store store) {
  PERIGEE_CHECK(rows >= 0 && rows < (int64_t{1} << 31) && n > 0 && k > 0 && lddy >= n && lddx >= k);
  PERIGEE_CHECK(k % 8 == 0 && lddy % 8 == 0 && lddx % (store == Store::kAct ? 8 : 2) == 0);
  PERIGEE_CHECK(aligned16(w) && aligned16(dy) && aligned16(dx));
}

Task& add_weight_task(Work& work, const bf16* dy, int64_t lddy, const bf16* x, int64_t ldx, const int32_t* source,
                      int64_t rows, float* dw, int64_t n, int64_t k) {
  Task& t = work.task[work.tasks];
  t.dy = dy, t.ld_dy = lddy, t.other = x, t.ld_other = ldx, t.source = source, t.out = dw;
  t.rows = static_cast<int>(rows), t.n = static_cast<int>(n), t.k = static_cast<int>(k);
  t.columns = static_cast<int>((k + kN - 1) / kN);
  t.tiles = t.columns * static_cast<int>((n + kM - 1) / kM);
  work.dy[work.tasks] = describe(dy, n, rows, lddy, kDepth);
  if (source == nullptr) work.x[work.tasks] = describe(x, k, rows, ldx, kDepth);
  ++work.tasks;
  return t;
}
void check_weight(const bf16* dy, int64_t lddy, const bf16* x, int64_t ldx, int64_t rows, const float* dw, int64_t n,
                  int64_t k) {
  PERIGEE_CHECK(rows >= 0 && rows < (int64_t{1} << 31) && n > 0 && k > 0 && lddy >= n && ldx >= k);
  PERIGEE_CHECK(ldx < (int64_t{1} << 30));
  PERIGEE_CHECK(lddy % 8 == 0 && ldx % 8 == 0 && aligned16(dy) && aligned16(x) && aligned16(dw));
}

// Which tiles to split, and in how many pieces, so that the last round of blocks is nearly full. Time is counted in
// steps of the depth; a piece's partial sums cost their writing and reading at the memory's speed (256 KiB of 4.2 TB/s
// for the whole card, where a step takes 0.7 us), and a second launch about four steps. No piece may be empty:
// least_steps is that of the task with the fewest rows.
void cut(Work& work, int64_t tiles, int64_t steps, int64_t least_steps, int64_t blocks) {
  double best = 1e300;
  for (int64_t back = 0; back < 2; ++back) {
    const int64_t whole = std::max<int64_t>(0, tiles / blocks - back) * blocks, split = tiles - whole;
    for (int64_t pieces = 1; pieces <= 32; ++pieces) {
      const bool fits = split * pieces <= kMostPiecesPerBlock * blocks && pieces * 2 <= least_steps;
      if (pieces > 1 && (split == 0 || !fits)) break;
      const int64_t rounds = (split * pieces + blocks - 1) / blocks;
      const double time = static_cast<double>(whole / blocks * steps + rounds * ((steps + pieces - 1) / pieces)) +
                          (pieces > 1 ? 4 + 0.09 * static_cast<double>(split * pieces) : 0.0);
      if (time < best) {
        best = time;
        work.whole = pieces > 1 ? whole : tiles;
        work.split = pieces > 1 ? static_cast<int>(split) : 0;
        work.pieces = static_cast<int>(pieces);
      }
    }
  }
  work.items = work.whole + int64_t{work.split} * work.pieces;
}

}  // namespace

int64_t grad_weight_scratch_bytes(const Device& device) {
  return kMostPiecesPerBlock * device.info().multiprocessors * kPieceFloats * static_cast<int64_t>(sizeof(float));
}

template <>
void matmul_grad_input<bf16>(Device& device, std::span<const DeviceGradInputTask<bf16>> tasks) {
  Work work;
  for (const DeviceGradInputTask<bf16>& t : tasks) {
    check_input(t.w, t.n, t.k, t.dy, t.lddy, t.rows, t.dx, t.lddx, t.store);
    if (t.rows == 0) continue;
    if (work.tasks == kMostTasks) {
      launch<Mode::kInput>(device, work);
      work = {};
    }
    const size_t at = static_cast<size_t>(work.tasks);
    Task& task = add_input_task(work, t.w, t.n, t.k, t.dy, t.lddy, t.rows, t.dx, t.lddx, t.store);
    task.scale = t.scale;
    if (t.low.w != nullptr) {
      PERIGEE_CHECK(t.low.rank >= 1 && t.low.rank <= kTile && t.low.rank % 8 == 0 && t.low.ldx >= t.low.rank &&
                    t.low.ldx % 8 == 0 && aligned16(t.low.w) && aligned16(t.low.x));
      task.low_w = static_cast<const bf16*>(t.low.w);
      work.x[at] = describe(t.low.x, t.low.rank, t.rows, t.low.ldx, kM);
    }
    work.items += (t.rows + kM - 1) / kM * task.columns;
  }
  launch<Mode::kInput>(device, work);
}

template <>
void matmul_experts_grad_input<bf16>(Device& device, const DeviceExpertGradInputTask<bf16>& t) {
  PERIGEE_CHECK(t.experts > 0 && t.expert_bytes % 16 == 0);
  check_input(t.w, t.n, t.k, t.dy, t.lddy, t.slots, t.dx, t.lddx, t.store);
  if (t.slots == 0) return;
  Work work;
  Task& task = add_input_task(work, t.w, t.n, t.k, t.dy, t.lddy, t.slots, t.dx, t.lddx, t.store);
  task.offsets = t.offsets, task.experts = static_cast<int>(t.experts), task.expert_stride = t.expert_bytes / 2;
  work.items = (t.slots / kM + std::min(t.experts, t.slots)) * task.columns;
  launch<Mode::kInput>(device, work);
}

template <>
void matmul_grad_weight<bf16>(Device& device, std::span<const DeviceGradWeightTask<bf16>> tasks) {
  Work work;
  int64_t tiles = 0, steps = 0, least_steps = 0;
  const auto run = [&] {
    if (tiles == 0) return;
    DeviceScratch::Mark mark(device.scratch);
    cut(work, tiles, steps, least_steps, device.info().multiprocessors);
    if (work.split > 0) work.partial = device.scratch.take<float>(int64_t{work.split} * work.pieces * kPieceFloats);
    launch<Mode::kWeight>(device, work);
    if (work.split > 0) {
      add_pieces<<<dim3(static_cast<unsigned>(work.split), 8), 256, 0, device.stream()>>>(work);
      PERIGEE_LAUNCHED();
    }
    work = {};
    tiles = steps = 0;
  };
  for (const DeviceGradWeightTask<bf16>& t : tasks) {
    check_weight(t.dy, t.lddy, t.x, t.ldx, t.rows, t.dw, t.n, t.k);
    if (t.rows == 0) continue;
    if (work.tasks == kMostTasks) run();
    const int64_t task_steps = (t.rows + kDepth - 1) / kDepth;
    steps = std::max(steps, task_steps);
    least_steps = work.tasks == 0 ? task_steps : std::min(least_steps, task_steps);
    Task& task = add_weight_task(work, t.dy, t.lddy, t.x, t.ldx, nullptr, t.rows, t.dw, t.n, t.k);
    task.first_tile = tiles;
    tiles += task.tiles;
  }
  run();
}

template <>
void matmul_experts_grad_weight<bf16>(Device& device, const DeviceExpertGradWeightTask<bf16>& t) {
  PERIGEE_CHECK(t.experts > 0 && t.dw_stride % 4 == 0);
  check_weight(t.dy, t.lddy, t.x, t.ldx, t.slots, t.dw, t.n, t.k);
  if (t.slots == 0) return;
  Work work;
  Task& task = add_weight_task(work, t.dy, t.lddy, t.x, t.ldx, t.source, t.slots, t.dw, t.n, t.k);
  task.offsets = t.offsets, task.experts = static_cast<int>(t.experts), task.expert_stride = t.dw_stride;
  work.items = work.whole = t.experts * task.tiles;
  launch<Mode::kExpertWeight>(device, work);
}

}  // namespace perigee::kernels
