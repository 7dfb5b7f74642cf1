// Launches over one row that make their own inputs have the bits of the separate calls.
#include <utility>

#include "base/random.h"
#include "kernels/activation/swiglu_device.h"
#include "kernels/gemm/gemm_device.h"
#include "kernels/moe/moe_device.h"
#include "kernels/moe/router_device.h"
#include "kernels/moe/row_device.h"
#include "kernels/norm/norm_device.h"
#include "tests/kernels/device_fixture.h"

namespace perigee::kernels {
namespace {

using FusedRow = DeviceTest;

std::vector<float> normals(Random& random, int64_t n, float scale) {
  std::vector<float> x(static_cast<size_t>(n));
  for (float& v : x) v = scale * static_cast<float>(random.next_normal());
  return x;
}
std::vector<bf16> matrix(Random& random, int64_t n, int64_t k) {
  std::vector<bf16> tiles(static_cast<size_t>(tiled_elements(n, k)));
  pack_tiles(normals(random, n * k, 0.2f).data(), n, k, tiles.data());
  return tiles;
}

struct Sizes {
  int64_t d, width, experts, top_k;
  bool shared;
};
constexpr Sizes kSizes[] = {
    {2304, 1024, 256, 8, true}, {64, 32, 8, 2, true}, {200, 72, 40, 3, false}, {1032, 520, 256, 8, true}};

// A row of the same products among five others has the same bits as alone.
TEST_F(FusedRow, products_of_a_row_are_those_of_many) {
  if (device().info().capability != 90) return;
  constexpr std::pair<int64_t, int64_t> kShapes[] = {{8, 2},      {8, 12576},   {72, 48},
                                                     {200, 2304}, {2304, 4000}, {9216, 130}};
  for (const auto& [k, n] : kShapes) {
    Random random(static_cast<uint64_t>(k * 100000 + n));
    constexpr int64_t rows = 6;
    const DeviceArray<bf16> w(device(), matrix(random, n, k)),
        x(device(), narrow(normals(random, rows * k, 1.0f))), many(device(), rows * n), one(device(), n);
    const std::vector<float> start = normals(random, n, 1.0f);
    const DeviceArray<float> many32(device(), rows * n), one32(device(), n), sum(device(), start);
    const auto task = [&](int64_t first, int64_t count, void* y, Store store) {
      return DeviceMatmulTask<bf16>{w, n, k, x.data() + first * k, k, count, y, n, store};
    };
    const DeviceMatmulTask<bf16> of_many[] = {task(0, rows, many, Store::kAct),
                                              task(0, rows, many32, Store::kF32)};
    const DeviceMatmulTask<bf16> of_one[] = {task(2, 1, one, Store::kAct), task(2, 1, one32, Store::kF32),
                                             task(2, 1, sum, Store::kAddF32)};
    matmul<bf16>(device(), of_many);
    matmul<bf16>(device(), of_one);
    const std::vector<float> all = widen(many.get()), all32 = many32.get(), here32 = one32.get(),
                             added = sum.get();
    EXPECT_EQ(first_difference(widen(one.get()), {all.begin() + 2 * n, all.begin() + 3 * n}), -1)
        << k << " " << n;
    EXPECT_EQ(first_difference(here32, {all32.begin() + 2 * n, all32.begin() + 3 * n}), -1) << k << " " << n;
    for (size_t i = 0; i < start.size(); ++i)
      ASSERT_EQ(added[i], start[i] + here32[i]) << k << " " << n << " at " << i;
  }
}

TEST_F(FusedRow, experts_have_the_bits_of_their_parts) {
  if (device().info().capability != 90) return;
  for (const Sizes& s : kSizes) {
    Random random(static_cast<uint64_t>(s.d));
    const RouterShape shape{s.experts, s.top_k, 1, 1, true, 2.446f};
    ASSERT_TRUE(row_experts_fit(device(), shape, s.d, s.width));
    const int64_t up_elements = tiled_elements(2 * s.width, s.d),
                  down_elements = tiled_elements(s.d, s.width);
    std::vector<bf16> up, down;
    for (int64_t e = 0; e < s.experts; ++e) {
      for (const bf16 v : matrix(random, 2 * s.width, s.d)) up.push_back(v);
      for (const bf16 v : matrix(random, s.d, s.width)) down.push_back(v);
      if (e >= 7 && s.experts > 100) {  // the rest are these again, moved: random numbers take long
        for (int64_t more = e + 1; more < s.experts; ++more) {
          const int64_t from = more % 8;
          up.insert(up.end(), up.begin() + from * up_elements, up.begin() + (from + 1) * up_elements);
          down.insert(down.end(), down.begin() + from * down_elements,
                      down.begin() + (from + 1) * down_elements);
        }
        break;
      }
    }
    const DeviceArray<bf16> gate_up(device(), up), down_w(device(), down),
        shared_up(device(), matrix(random, 2 * s.width, s.d)),
        shared_down(device(), matrix(random, s.d, s.width));
    // Several layers, launched behind each other without a pause, as a step does: each has its outputs, but not its choices.
    constexpr int64_t kLayers = 10;
    const int64_t slots = s.top_k + 1, up_size = slots * 2 * s.width, out_size = slots * s.d;
    const DeviceArray<bf16> parts_up(device(), kLayers * up_size), parts_inner(device(), slots * s.width),
        parts_out(device(), kLayers * out_size), whole_up(device(), kLayers * up_size),
        whole_out(device(), kLayers * out_size), h(device(), s.d), whole_h(device(), s.d);
    const DeviceArray<int32_t> chosen(device(), s.top_k), offsets(device(), s.experts + 1),
        source(device(), s.top_k), slot(device(), s.top_k), whole_chosen(device(), s.top_k),
        whole_slot(device(), s.top_k);
    const DeviceArray<float> x(device(), normals(random, kLayers * s.d, 1.0f)),
        norm_w(device(), normals(random, s.d, 1.0f)), bias(device(), normals(random, s.experts, 0.1f)),
        panels(device(), normals(random, (s.experts + 15) / 16 * 16 * s.d, 0.1f)),
        logits(device(), s.experts), weights(device(), kLayers * s.top_k),
        whole_weights(device(), kLayers * s.top_k);
    for (int64_t layer = 0; layer < kLayers; ++layer) {
      bf16* const up_out = parts_up.data() + layer * up_size;
      bf16* const out = parts_out.data() + layer * out_size;
      ASSERT_TRUE(norm_router_logits<bf16>(device(), 1, s.experts, s.d, x.data() + layer * s.d, norm_w, 1e-5f,
                                           panels, h, logits));
      route_and_dispatch(device(), shape, 1, logits, bias, chosen, weights.data() + layer * s.top_k, offsets,
                         source, slot);
      const DeviceMatmulTask<bf16> up_beside{
          shared_up, 2 * s.width, s.d, h, s.d, 1, up_out + s.top_k * 2 * s.width, 2 * s.width, Store::kAct};
      const DeviceExpertTask<bf16> up_task{
          gate_up, up_elements * 2, s.experts, 2 * s.width, s.d,    h,
          s.d,     source,          offsets,   s.top_k,     up_out, 2 * s.width};
      matmul_experts<bf16>(device(), up_task, {&up_beside, size_t{s.shared}});
      swiglu_forward<bf16>(device(), slots, s.width, up_out, parts_inner);
      const DeviceMatmulTask<bf16> down_beside{
          shared_down,         s.d, s.width,    parts_inner.data() + s.top_k * s.width, s.width, 1,
          out + s.top_k * s.d, s.d, Store::kAct};
      const DeviceExpertTask<bf16> down_task{down_w,  down_elements * 2, s.experts, s.d,
                                             s.width, parts_inner,       s.width,   nullptr,
                                             offsets, s.top_k,           out,       s.d};
      matmul_experts<bf16>(device(), down_task, {&down_beside, size_t{s.shared}});
    }
    const DeviceGraph step(device(), [&] {
      for (int64_t layer = 0; layer < kLayers; ++layer) {
        norm_router_logits<bf16>(device(), 1, s.experts, s.d, x.data() + layer * s.d, norm_w, 1e-5f, panels,
                                 whole_h, logits, {whole_chosen.data(), static_cast<size_t>(s.top_k)});
        RowExperts e;
        e.shape = shape, e.d = s.d, e.width = s.width;
        e.gate_up = gate_up, e.gate_up_bytes = up_elements * 2, e.down = down_w,
        e.down_bytes = down_elements * 2;
        if (s.shared) e.shared_gate_up = shared_up, e.shared_down = shared_down;
        e.h = whole_h, e.logits = logits, e.bias = bias, e.chosen = whole_chosen, e.slot = whole_slot;
        e.weights = whole_weights.data() + layer * s.top_k;
        e.gate_up_out = whole_up.data() + layer * up_size, e.out = whole_out.data() + layer * out_size;
        row_experts(device(), e);
      }
    });
    const auto used = [&](const DeviceArray<bf16>& a, int64_t width) {
      const std::vector<float> all = widen(a.get());
      std::vector<float> v;
      for (int64_t layer = 0; layer < kLayers; ++layer) {
        const auto from = all.begin() + layer * slots * width;
        v.insert(v.end(), from, from + (s.shared ? slots : s.top_k) * width);
      }
      return v;
    };
    const std::vector<float> expected_up = used(parts_up, 2 * s.width), expected_out = used(parts_out, s.d);
    for (int turn = 0; turn < 20; ++turn) {
      step.launch(device());
      device().synchronize();
      EXPECT_EQ(whole_chosen.get(), chosen.get());
      EXPECT_EQ(whole_slot.get(), slot.get());
      EXPECT_EQ(first_difference(whole_weights.get(), weights.get()), -1);
      ASSERT_EQ(first_difference(used(whole_up, 2 * s.width), expected_up), -1) << s.d << " turn " << turn;
      ASSERT_EQ(first_difference(used(whole_out, s.d), expected_out), -1) << s.d << " turn " << turn;
    }
  }
}

TEST_F(FusedRow, combination_and_products_have_the_bits_of_their_parts) {
  if (device().info().capability != 90) return;
  for (const Sizes& s : kSizes) {
    Random random(static_cast<uint64_t>(s.d + 1));
    const int64_t slots = s.top_k + 1, n[3] = {3000, 130, 32};
    const DeviceArray<bf16> out(device(), narrow(normals(random, slots * s.d, 1.0f))),
        w0(device(), matrix(random, n[0], s.d)), w1(device(), matrix(random, n[1], s.d)),
        w2(device(), matrix(random, n[2], s.d)), h(device(), s.d);
    const std::vector<float> start = normals(random, s.d, 2.0f);
    const DeviceArray<float> weights(device(), normals(random, s.top_k, 1.0f)),
        norm_w(device(), normals(random, s.d, 1.0f)), x(device(), start), parts_x(device(), start),
        whole_x(device(), s.d), parts2(device(), n[2]), whole2(device(), n[2]);
    const DeviceArray<bf16> parts0(device(), n[0]), parts1(device(), n[1]), whole0(device(), n[0]),
        whole1(device(), n[1]);
    std::vector<int32_t> places;
    for (int32_t i = 0; i < s.top_k; ++i) places.push_back(i);
    const DeviceArray<int32_t> slot(device(), places);
    ASSERT_TRUE(moe_combine_norm<bf16>(device(), 1, s.top_k, s.d, out, slot, weights,
                                       s.shared ? out.data() + s.top_k * s.d : nullptr, parts_x, norm_w,
                                       1e-5f, h));
    const auto tasks = [&](const bf16* from, bf16* y0, bf16* y1, float* y2) {
      return std::vector<DeviceMatmulTask<bf16>>{{w0, n[0], s.d, from, s.d, 1, y0, n[0], Store::kAct},
                                                 {w1, n[1], s.d, from, s.d, 1, y1, n[1], Store::kAct},
                                                 {w2, n[2], s.d, from, s.d, 1, y2, n[2], Store::kF32}};
    };
    matmul<bf16>(device(), tasks(h, parts0, parts1, parts2));
    const RowCombination before{s.top_k, s.d, out, s.shared, weights, x, norm_w, 1e-5f};
    ASSERT_TRUE(row_combine_matmul(device(), before, whole_x, tasks(nullptr, whole0, whole1, whole2)));
    EXPECT_EQ(first_difference(whole_x.get(), parts_x.get()), -1) << s.d;
    EXPECT_EQ(first_difference(widen(whole0.get()), widen(parts0.get())), -1) << s.d;
    EXPECT_EQ(first_difference(widen(whole1.get()), widen(parts1.get())), -1) << s.d;
    EXPECT_EQ(first_difference(whole2.get(), parts2.get()), -1) << s.d;
  }
}

}  // namespace
}  // namespace perigee::kernels
