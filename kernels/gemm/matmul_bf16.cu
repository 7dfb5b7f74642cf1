// Host side of the bf16 products: checks, chooses a form, launches.
#include "kernels/gemm/matmul_bf16.cuh"

#include <algorithm>

#include "base/error.h"
#include "kernels/gemm/row_bf16.h"

namespace perigee::kernels {
namespace products {

struct Form {
  int warpgroups, tokens;
};

// The driver's function that describes a matrix to the copy engine; the runtime finds it, so nothing links to the driver.
using EncodeFunction = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                    const cuuint64_t*, const cuuint32_t*, const cuuint32_t*,
                                    CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                                    CUtensorMapFloatOOBfill);
EncodeFunction encode_function() {
  static const EncodeFunction function = [] {
    void* f = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    PERIGEE_CUDA(
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault, &found));
#else
    PERIGEE_CUDA(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &f, cudaEnableDefault, &found));
#endif
    PERIGEE_CHECK(found == cudaDriverEntryPointSuccess && f != nullptr);
    return reinterpret_cast<EncodeFunction>(f);
  }();
  return function;
}

// A matrix of activations as {width, rows, count} in boxes of 64 by `tokens`; outside reads as zero and is not written.
CUtensorMap describe(const void* x, int64_t k, int64_t rows, int64_t ldx, int64_t count, int64_t step_bytes,
                     int tokens) {
  CUtensorMap map;
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(k), static_cast<cuuint64_t>(rows),
                               static_cast<cuuint64_t>(count)};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(ldx) * 2,
                                 static_cast<cuuint64_t>(count > 1 ? step_bytes : ldx * 2)};
  const cuuint32_t box[3] = {64, static_cast<cuuint32_t>(tokens), 1}, ones[3] = {1, 1, 1};
  const CUresult result =
      encode_function()(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, const_cast<void*>(x), sizes, strides, box,
                        ones, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                        CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  PERIGEE_CHECK(result == CUDA_SUCCESS);
  return map;
}

constexpr int kSharedMost = 232448;
constexpr int kFixedBytes = (kMaxExperts + 2) * 4;

template <int kWarpgroups, int kTokens>
void launch_form(Device& device, Params& p, int64_t units_most) {
  constexpr int stage_bytes = kStageBytes<kWarpgroups, kTokens>;
  // Half of the multiprocessor's, so that the next launch can fetch weights beside this one. All of it where x is large,
  // and in long launches, two blocks of which must not share a multiprocessor.
  const int blocks = static_cast<int>(std::min<int64_t>(units_most, device.info().multiprocessors));
  const bool half = kWarpgroups == 1 && kTokens <= 32 && units_most <= 10 * blocks;
  const int budget = half ? 113 * 1024 : kSharedMost;
  const int fixed = kWarpgroups * 2 * kBufferBytes<kTokens> + kFixedBytes;
  p.stages = (budget - fixed - 8) / (stage_bytes + 16);
  const int bytes = p.stages * (stage_bytes + 16) + fixed + 8;
  auto kernel = product_kernel<kWarpgroups, kTokens>;
  static const bool allowed = [&] {
    allow_shared_memory(kernel, kSharedMost);
    return true;
  }();
  (void)allowed;
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads<kWarpgroups>());
  config.dynamicSmemBytes = static_cast<size_t>(bytes);
  config.stream = device.stream();
  config.attrs = &early;
  config.numAttrs = 1;
  PERIGEE_CUDA(cudaLaunchKernelEx(&config, kernel, p));
}

void launch(Device& device, Params& p, const Form& form, int64_t units_most) {
  PERIGEE_CHECK(device.info().capability == 90);  // the kernel is empty for others
  if (form.warpgroups == 2) {
    if (form.tokens == 256) return launch_form<2, 256>(device, p, units_most);
    return launch_form<2, 128>(device, p, units_most);
  }
  switch (form.tokens) {
    case 8:
      return launch_form<1, 8>(device, p, units_most);
    case 16:
      return launch_form<1, 16>(device, p, units_most);
    case 32:
      return launch_form<1, 32>(device, p, units_most);
    case 64:
      return launch_form<1, 64>(device, p, units_most);
    default:
      return launch_form<1, 128>(device, p, units_most);
  }
}

int64_t ceil_divide(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

Form decode_form(int64_t rows) {
  return {1, rows <= 8 ? 8 : rows <= 16 ? 16 : rows <= 32 ? 32 : rows <= 64 ? 64 : 128};
}

int outputs_of_unit(const Form& form) {
  return form.warpgroups == 2 ? 128 : form.tokens <= 64 ? 32 : 64;
}

// Units of a set of products in a form.
template <class Tasks>
int64_t count(const Tasks& tasks, int64_t outputs, int64_t tokens) {
  int64_t units = 0;
  for (const auto& t : tasks)
    if (t.rows > 0) units += ceil_divide(t.n, outputs) * ceil_divide(t.rows, tokens);
  return units;
}

// Many rows: the form whose rounds over the multiprocessors take least. A unit's time is in proportion to its products,
// and somewhat more for the smaller ones, which bring more bytes for each product.
Form choose(std::span<const DeviceMatmulTask<bf16>> tasks, int multiprocessors) {
  int64_t rows = 0;
  for (const auto& t : tasks) rows = std::max(rows, t.rows);
  if (rows <= 64) return decode_form(rows);
  const auto cost = [&](int64_t outputs, int64_t tokens, double unit) {
    return static_cast<double>(ceil_divide(count(tasks, outputs, tokens), multiprocessors)) * unit;
  };
  const double large = cost(128, 256, 1.0), medium = cost(128, 128, 0.55), small = cost(64, 128, 0.34);
  if (large <= medium && large <= small) return {2, 256};
  if (medium <= small) return {2, 128};
  return {1, 128};
}

bool aligned(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0;
}

void fill(Group& g, int64_t n, int64_t k, int64_t rows, int64_t ldy, Store store, const void* y,
          const Form& form) {
  g.low_w = nullptr;
  g.scale = 1.0f;
  g.n = static_cast<int>(n);
  g.k = static_cast<int>(k);
  g.rows = static_cast<int>(rows);
  g.ldy = ldy;
  g.store = static_cast<int>(store);
  g.vector = aligned(y) && ldy % (store == Store::kAct ? 8 : 4) == 0;
  g.m_blocks = static_cast<int>(ceil_divide(n, outputs_of_unit(form)));
  g.t_blocks = static_cast<int>(ceil_divide(rows, form.tokens));
}

int64_t distance(const void* from, const void* to) {
  return static_cast<const char*>(to) - static_cast<const char*>(from);
}

void check(const DeviceMatmulTask<bf16>& t) {
  PERIGEE_CHECK(t.n >= 1 && t.k >= 1 && t.rows >= 0 && t.k % 8 == 0);
  PERIGEE_CHECK(t.ldx >= t.k && t.ldx % 8 == 0 && t.ldy >= t.n);
  PERIGEE_CHECK(aligned(t.w) && aligned(t.x));
  PERIGEE_CHECK(t.n < (1 << 30) && t.k < (1 << 30) && t.rows < (1 << 30));
  if (t.low.w == nullptr) return;
  PERIGEE_CHECK(t.low.rank >= 1 && t.low.rank <= kTile && t.low.rank % 8 == 0);
  PERIGEE_CHECK(t.low.ldx >= t.low.rank && t.low.ldx % 8 == 0 && aligned(t.low.w) && aligned(t.low.x));
}

// Takes tasks from `next` on while there is room for their groups.
void add_groups(Params& p, std::span<const DeviceMatmulTask<bf16>> tasks, size_t& next, const Form& form) {
  int64_t units = 0;
  while (next < tasks.size() && p.groups < kMaxGroups) {
    const auto& a = tasks[next];
    if (a.rows == 0) {
      ++next;
      continue;
    }
    // Products of one shape at equal distances, such as those of the heads, make one group.
    size_t members = 1;
    int64_t w_step = 0, x_step = 0, y_step = 0;
    while (next + members < tasks.size()) {
      const auto &last = tasks[next + members - 1], &b = tasks[next + members];
      if (b.n != a.n || b.k != a.k || b.rows != a.rows || b.ldx != a.ldx || b.ldy != a.ldy ||
          b.store != a.store || b.scale != a.scale || a.low.w != nullptr || b.low.w != nullptr)
        break;
      const int64_t dw = distance(last.w, b.w), dx = distance(last.x, b.x), dy = distance(last.y, b.y);
      if (members == 1) {
        if (dx < 0 || dx % 16 != 0 || dx >= int64_t{1} << 39 || dy % 16 != 0 || dy <= 0 ||
            dy >= int64_t{1} << 39)
          break;
        w_step = dw, x_step = dx, y_step = dy;
      } else if (dw != w_step || dx != x_step || dy != y_step) {
        break;
      }
      ++members;
    }
    Group& g = p.group[p.groups++];
    fill(g, a.n, a.k, a.rows, a.ldy, a.store, a.y, form);
    g.w = static_cast<const char*>(a.w);
    g.y = static_cast<char*>(a.y);
    g.w_step = w_step;
    g.y_step = y_step;
    g.x_step = x_step > 0 ? 1 : 0;
    g.scale = a.scale;
    if (a.low.w != nullptr) {
      g.low_w = static_cast<const char*>(a.low.w);
      g.low = describe(a.low.x, a.low.rank, a.rows, a.low.ldx, 1, 0, form.tokens);
    }
    g.x = describe(a.x, a.k, a.rows, a.ldx, x_step > 0 ? static_cast<int64_t>(members) : 1, x_step,
                   form.tokens);
    if (a.store == Store::kAct && g.vector)
      g.y_map = describe(a.y, a.n, a.rows, a.ldy, static_cast<int64_t>(members), y_step, 32);
    units += static_cast<int64_t>(members) * g.m_blocks * g.t_blocks;
    PERIGEE_CHECK(units < (int64_t{1} << 31));
    g.unit_end = static_cast<int>(units);
    next += members;
  }
  p.units = static_cast<int>(units);
}

// How many slots an expert has is the device's to know; the form goes by the mean, and any number is right.
Form choose(const DeviceExpertTask<bf16>& t) {
  const int64_t mean = ceil_divide(t.slots, t.experts);
  if (mean > 128) return {2, 256};
  if (mean > 32) return {2, 128};
  return decode_form(mean <= 3 ? 8 : mean <= 9 ? 16 : mean <= 20 ? 32 : 64);
}

}  // namespace products

template <>
void matmul<bf16>(Device& device, std::span<const DeviceMatmulTask<bf16>> tasks) {
  using namespace products;
  PERIGEE_CHECK(tasks.size() <= static_cast<size_t>(kMaxMatmulTasks));
  for (const auto& t : tasks) check(t);
  if (row::matmul_row(device, tasks)) return;
  const Form form = choose(tasks, device.info().multiprocessors);
  size_t next = 0;
  while (next < tasks.size()) {
    Params p{};
    add_groups(p, tasks, next, form);
    if (p.units > 0) launch(device, p, form, p.units);
  }
}

template <>
void matmul_experts<bf16>(Device& device, const DeviceExpertTask<bf16>& t,
                          std::span<const DeviceMatmulTask<bf16>> beside) {
  using namespace products;
  PERIGEE_CHECK(t.experts >= 1 && t.experts <= kMaxExperts && t.n >= 1 && t.k >= 1 && t.k % 8 == 0 &&
                t.slots >= 0);
  PERIGEE_CHECK(t.ldx >= t.k && t.ldx % 8 == 0 && t.ldy >= t.n && t.expert_bytes % 16 == 0);
  PERIGEE_CHECK(aligned(t.w) && aligned(t.x) && beside.size() <= static_cast<size_t>(kMaxGroups));
  for (const auto& b : beside) check(b);
  const Form form = choose(t);
  Params p{};
  if (t.slots > 0 && form.warpgroups == 1 &&
      std::all_of(beside.begin(), beside.end(), [&](const auto& b) { return b.rows <= form.tokens; })) {
    size_t next = 0;
    add_groups(p, beside, next, form);
  } else {
    matmul<bf16>(device, beside);
  }
  if (t.slots == 0) return;
  Group& g = p.group[kMaxGroups];
  fill(g, t.n, t.k, t.slots, t.ldy, Store::kAct, t.y, form);
  g.w = static_cast<const char*>(t.w);
  g.y = reinterpret_cast<char*>(t.y);
  if (t.source == nullptr) g.x = describe(t.x, t.k, t.slots, t.ldx, 1, 0, form.tokens);
  if (g.vector) g.y_map = describe(t.y, t.n, t.slots, t.ldy, 1, 0, 32);
  p.experts = static_cast<int>(t.experts);
  p.expert_bytes = t.expert_bytes;
  p.offsets = t.offsets;
  p.settled = t.settled;
  p.source = t.source;
  p.x = t.x;
  p.ldx = t.ldx;
  // Touched experts are at most the slots; each may add one unfinished tile of tokens.
  const int64_t units = p.units + (std::min(t.slots, t.experts) + t.slots / form.tokens) * g.m_blocks;
  PERIGEE_CHECK(units < (int64_t{1} << 31));
  launch(device, p, form, units);
}

template <>
void matmul_experts<bf16>(Device& device, const DeviceExpertTask<bf16>& t) {
  matmul_experts<bf16>(device, t, {});
}

}  // namespace perigee::kernels
