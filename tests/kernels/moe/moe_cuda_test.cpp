// Routing, dispatch and combination on the device: the CPU's choices, slots and bits.
#include "kernels/moe/moe.h"
#include "kernels/moe/moe_device.h"
#include "tests/kernels/device_values.h"

namespace perigee::kernels {
namespace {

using MoeDevice = DeviceTest;
using Ints = std::vector<int32_t>;

const RouterShape kShapes[] = {{1, 1, 1, 1, true, 1.0f},     {4, 2, 1, 1, true, 2.446f},    {15, 3, 1, 1, false, 1.5f},
                               {33, 8, 1, 1, true, 1.0f},    {64, 6, 8, 3, true, 2.5f},     {256, 8, 8, 4, true, 2.5f},
                               {256, 8, 1, 1, true, 2.446f}, {8, 3, 8, 4, true, 1.0f},      {12, 12, 3, 1, false, 1.0f},
                               {384, 8, 1, 1, true, 2.0f},   {1024, 40, 16, 4, true, 1.0f}, {1000, 7, 500, 9, true, 1.0f}};

// Logits in which neighbouring rows are full of ties.
Floats some_logits(int64_t n) {
  Floats x = normals(n, 3);
  for (size_t i = 0; i < x.size() / 3; ++i) x[i] = std::round(2 * x[i]);
  return x;
}

TEST_F(MoeDevice, routing_has_the_bits_of_the_cpu) {
  Context ctx(2);
  for (const RouterShape& s : kShapes) {
    for (const int64_t rows : {131, 600}) {
      Floats logits = some_logits(rows * s.experts), bias = normals(s.experts, 4, 0.1f);
      for (size_t i = 0; i < bias.size(); i += 3) bias[i] = 0.0f;
      Ints chosen(static_cast<size_t>(rows * s.top_k));
      Floats weights(chosen.size());
      const DeviceArray<float> dev_logits(device(), logits), dev_bias(device(), bias), dev_weights(device(), rows * s.top_k),
          alone_weights(device(), s.top_k);
      const DeviceArray<int32_t> dev_chosen(device(), rows * s.top_k), alone(device(), s.top_k);
      route_forward(ctx, s, rows, logits.data(), bias.data(), chosen.data(), weights.data());
      route_forward(device(), s, rows, dev_logits, dev_bias, dev_chosen, dev_weights);
      EXPECT_TRUE(same_bits(dev_chosen.get(), chosen)) << s.experts;
      EXPECT_EQ(first_difference(dev_weights.get(), weights), -1) << s.experts;
      route_forward(device(), s, 1, dev_logits + 130 * s.experts, dev_bias, alone, alone_weights);
      EXPECT_TRUE(same_bits(alone.get(), part(chosen, 130 * s.top_k, s.top_k)));

      const Floats dweights = normals(rows * s.top_k, 5);
      Floats dlogits(logits.size());
      const DeviceArray<float> dev_dweights(device(), dweights), dev_dlogits(device(), rows * s.experts);
      const DeviceArray<bf16> half(device(), rows * s.experts);
      route_backward(ctx, s, rows, logits.data(), chosen.data(), dweights.data(), dlogits.data());
      route_backward(device(), s, rows, dev_logits, dev_chosen, dev_dweights, dev_dlogits.data());
      route_backward(device(), s, rows, dev_logits, dev_chosen, dev_dweights, half.data());
      EXPECT_EQ(first_difference(dev_dlogits.get(), dlogits), -1) << s.experts;
      EXPECT_TRUE(same_bits(half.get(), narrow(dlogits))) << s.experts;

      const DeviceArray<int32_t> active(device(), Ints{50});
      route_forward(device(), s, rows, dev_logits, dev_bias, dev_chosen, dev_weights, active);
      std::fill(chosen.begin() + 50 * s.top_k, chosen.end(), -1);
      std::fill(weights.begin() + 50 * s.top_k, weights.end(), 0.0f);
      EXPECT_TRUE(same_bits(dev_chosen.get(), chosen)) << s.experts;
      EXPECT_EQ(first_difference(dev_weights.get(), weights), -1) << s.experts;
    }
  }
}

TEST_F(MoeDevice, nans_reach_the_weights) {
  const RouterShape s{256, 8, 1, 1, true, 1.0f};
  Floats logits = normals(256, 1);
  logits[77] = NAN;
  const DeviceArray<float> dev_logits(device(), logits), bias(device(), Floats(256, 0.0f)), weights(device(), 8);
  const DeviceArray<int32_t> chosen(device(), 8);
  route_forward(device(), s, 1, dev_logits, bias, chosen, weights);
  const Ints c = chosen.get();
  EXPECT_NE(std::find(c.begin(), c.end(), 77), c.end());
  for (const float w : weights.get()) EXPECT_TRUE(std::isnan(w));
}

// Choices of distinct experts per row, some experts without rows.
Ints some_choices(int64_t rows, int64_t top_k, int64_t experts) {
  Random random(8);
  Ints chosen;
  for (int64_t r = 0; r < rows; ++r) {
    Ints row;
    while (static_cast<int64_t>(row.size()) < top_k) {
      const auto e = static_cast<int32_t>(random.next_int(0, experts - 1) * random.next_int(0, experts - 1) / experts);
      if (std::find(row.begin(), row.end(), e) == row.end()) row.push_back(e);
    }
    std::sort(row.begin(), row.end());
    chosen.insert(chosen.end(), row.begin(), row.end());
  }
  return chosen;
}

struct Sorted {
  Ints offsets, source, slot;
};
// Without counting: a stable sort.
Sorted sorted(int64_t top_k, int64_t experts, const Ints& chosen) {
  Ints order;
  for (size_t i = 0; i < chosen.size(); ++i)
    if (chosen[i] >= 0) order.push_back(static_cast<int32_t>(i));
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return chosen[static_cast<size_t>(a)] < chosen[static_cast<size_t>(b)]; });
  Sorted s{Ints(static_cast<size_t>(experts) + 1, 0), Ints(chosen.size(), 0), Ints(chosen.size(), -1)};
  for (size_t i = 0; i < order.size(); ++i) {
    s.source[i] = order[i] / static_cast<int32_t>(top_k);
    s.slot[static_cast<size_t>(order[i])] = static_cast<int32_t>(i);
  }
  for (const int32_t e : chosen)
    if (e >= 0) ++s.offsets[static_cast<size_t>(e) + 1];
  for (size_t e = 0; e + 1 < s.offsets.size(); ++e) s.offsets[e + 1] += s.offsets[e];
  return s;
}

TEST_F(MoeDevice, dispatch_is_a_stable_sort) {
  struct Case {
    int64_t rows, top_k, experts;
  };
  for (const Case& c : {Case{1, 1, 1}, {1, 8, 256}, {3, 8, 256}, {5, 2, 7}, {64, 8, 256}, {129, 8, 256}, {255, 8, 256},
                        {256, 8, 256}, {257, 8, 256}, {300, 8, 1024}, {90, 3, 600}, {1000, 5, 33}, {33000, 8, 256}, {5000, 40, 1000}})
    for (const bool padded : {false, true}) {
      Ints chosen = some_choices(c.rows, c.top_k, c.experts);
      if (padded) std::fill(chosen.begin() + c.rows * 2 / 3 * c.top_k, chosen.end(), -1);
      const Sorted expected = sorted(c.top_k, c.experts, chosen);
      const DeviceArray<int32_t> dev_chosen(device(), chosen), offsets(device(), c.experts + 1),
          source(device(), c.rows * c.top_k), slot(device(), c.rows * c.top_k);
      moe_dispatch(device(), c.rows, c.top_k, c.experts, dev_chosen, offsets, source, slot);
      EXPECT_TRUE(same_bits(offsets.get(), expected.offsets)) << c.rows << " rows";
      EXPECT_TRUE(same_bits(source.get(), expected.source)) << c.rows << " rows";
      EXPECT_TRUE(same_bits(slot.get(), expected.slot)) << c.rows << " rows";
    }
}

TEST_F(MoeDevice, routing_and_dispatch_together_give_what_each_gives) {
  for (const RouterShape& s : kShapes)
    for (const int64_t rows : {1, 3, 4, 5, 64, 200})
      for (const bool padded : {false, true}) {
        const int64_t n = rows * s.top_k;
        const DeviceArray<float> logits(device(), some_logits(rows * s.experts)), bias(device(), normals(s.experts, 4, 0.1f)),
            weights(device(), n), weights_together(device(), n);
        const DeviceArray<int32_t> active(device(), Ints{static_cast<int32_t>(rows * 3 / 4)}), chosen(device(), n),
            chosen_together(device(), n), offsets(device(), s.experts + 1), offsets_together(device(), s.experts + 1),
            source(device(), n), source_together(device(), n), slot(device(), n), slot_together(device(), n);
        const int32_t* const in_use = padded ? active.data() : nullptr;
        route_forward(device(), s, rows, logits, bias, chosen, weights, in_use);
        moe_dispatch(device(), rows, s.top_k, s.experts, chosen, offsets, source, slot);
        route_and_dispatch(device(), s, rows, logits, bias, chosen_together, weights_together, offsets_together,
                           source_together, slot_together, in_use);
        EXPECT_TRUE(same_bits(chosen_together.get(), chosen.get())) << s.experts << ", rows " << rows;
        EXPECT_TRUE(same_bits(weights_together.get(), weights.get())) << s.experts << ", rows " << rows;
        EXPECT_TRUE(same_bits(offsets_together.get(), offsets.get())) << s.experts << ", rows " << rows;
        EXPECT_TRUE(same_bits(source_together.get(), source.get())) << s.experts << ", rows " << rows;
        EXPECT_TRUE(same_bits(slot_together.get(), slot.get())) << s.experts << ", rows " << rows;
      }
}

struct Combination {
  Combination(int64_t rows_, int64_t top_k_, int64_t d_)
      : rows(rows_), top_k(top_k_), d(d_), s(sorted(top_k, 40, some_choices(rows, top_k, 40))),
        out(normals(rows * top_k * d, 1)), weights(normals(rows * top_k, 2)), shared(normals(rows * d, 3)),
        x(normals(rows * d, 4)), dx(normals(rows * d, 5)) {}
  int64_t rows, top_k, d;
  Sorted s;
  Floats out, weights, shared, x, dx;
};

TEST_F(MoeDevice, combination_over_float_has_the_bits_of_the_cpu) {
  Context ctx(2);
  for (const int64_t d : {1, 33, 64, 2304})
    for (const int64_t top_k : {1, 3, 8, 20}) {
      Combination c(19, top_k, d);
      const DeviceArray<float> out(device(), c.out), weights(device(), c.weights), shared(device(), c.shared),
          x(device(), c.x), x_alone(device(), c.x), dx(device(), c.dx), dout(device(), out.size()),
          dweights(device(), weights.size()), dshared(device(), x.size()), dh(device(), c.x);
      const DeviceArray<int32_t> slot(device(), c.s.slot), source(device(), c.s.source);
      const DeviceArray<float> dispatched(device(), out.size());
      moe_combine(device(), c.rows, top_k, d, out.data(), slot, weights, shared.data(), x);
      moe_combine(device(), c.rows, top_k, d, out.data(), slot, weights, static_cast<const float*>(nullptr), x_alone);
      moe_combine_backward(device(), c.rows, top_k, d, out.data(), slot, weights, dx, dout.data(), dweights, dshared.data());
      moe_gather_backward(device(), c.rows, top_k, d, out.data(), slot, dh);
      moe_gather(device(), c.rows * top_k, d, shared.data(), source, dispatched.data());

      for (const bool with_shared : {false, true}) {
        Floats y = with_shared ? c.shared : Floats(c.shared.size(), 0.0f), expected = c.x;
        moe_combine(ctx, c.rows, top_k, d, c.out.data(), c.s.slot.data(), c.weights.data(), y.data());
        for (size_t i = 0; i < y.size(); ++i) expected[i] = expected[i] + y[i];  // add_inplace
        EXPECT_EQ(first_difference((with_shared ? x : x_alone).get(), expected), -1) << d << " top " << top_k;
      }
      Floats dout_expected(c.out.size()), dweights_expected(c.weights.size()), dh_expected = c.x, gathered(c.out.size());
      moe_combine_backward(ctx, c.rows, top_k, d, c.out.data(), c.s.slot.data(), c.weights.data(), c.dx.data(),
                           dout_expected.data(), dweights_expected.data());
      moe_gather_backward(ctx, c.rows, top_k, d, c.out.data(), c.s.slot.data(), dh_expected.data());
      moe_gather(ctx, c.rows * top_k, d, c.shared.data(), c.s.source.data(), gathered.data());
      EXPECT_EQ(first_difference(dout.get(), dout_expected), -1) << d;
      EXPECT_EQ(first_difference(dweights.get(), dweights_expected), -1) << d;
      EXPECT_EQ(first_difference(dshared.get(), c.dx), -1) << d;
      EXPECT_EQ(first_difference(dh.get(), dh_expected), -1) << d;
      EXPECT_EQ(first_difference(dispatched.get(), gathered), -1) << d;
    }
}

// What is added is float32: a sum of nine terms errs by a few of its roundings.
TEST_F(MoeDevice, combination_over_bf16_is_near_float64_and_the_same_in_any_batch) {
  for (const int64_t d : {33, 64, 2304})
    for (const int64_t top_k : {3, 8}) {
      Combination c(90, top_k, d);
      c.out = held<bf16>(c.out), c.shared = held<bf16>(c.shared);
      const DeviceArray<bf16> out(device(), narrow(c.out)), shared(device(), narrow(c.shared)), dout(device(), out.size()),
          dshared(device(), shared.size()), dispatched(device(), out.size());
      const DeviceArray<float> weights(device(), c.weights), x(device(), c.x), dx(device(), c.dx),
          dweights(device(), weights.size()), dh(device(), c.x), alone(device(), part(c.x, 89 * d, d));
      const DeviceArray<int32_t> slot(device(), c.s.slot), source(device(), c.s.source);
      moe_combine(device(), c.rows, top_k, d, out.data(), slot, weights, shared.data(), x);
      moe_combine(device(), 1, top_k, d, out.data(), slot + 89 * top_k, weights + 89 * top_k, shared.data() + 89 * d, alone);
      EXPECT_TRUE(same_bits(alone.get(), part(x.get(), 89 * d, d)));
      moe_combine_backward(device(), c.rows, top_k, d, out.data(), slot, weights, dx, dout.data(), dweights, dshared.data());
      moe_gather_backward(device(), c.rows, top_k, d, out.data(), slot, dh);
      moe_gather(device(), c.rows * top_k, d, shared.data(), source, dispatched.data());
      Doubles x_expected(c.x.begin(), c.x.end()), dh_expected = x_expected, dweights_expected;
      Floats dout_expected(c.out.size()), gathered(c.out.size());
      for (int64_t i = 0; i < c.rows * top_k; ++i) {
        const auto w = static_cast<double>(c.weights[static_cast<size_t>(i)]);
        double sum = 0;
        for (int64_t j = 0; j < d; ++j) {
          const auto at = static_cast<size_t>(c.s.slot[static_cast<size_t>(i)] * d + j), to = static_cast<size_t>(i / top_k * d + j);
          if (i % top_k == 0) x_expected[to] += c.shared[to];
          x_expected[to] += w * c.out[at];
          dh_expected[to] += c.out[at];
          dout_expected[at] = c.weights[static_cast<size_t>(i)] * c.dx[to];
          gathered[at] = c.shared[to];
          sum += static_cast<double>(c.out[at]) * c.dx[to];
        }
        dweights_expected.push_back(sum);
      }
      EXPECT_LT(relative_error(x.get(), x_expected), 3e-7) << d;
      EXPECT_LT(relative_error(dh.get(), dh_expected), 3e-7) << d;
      EXPECT_LT(relative_error(dweights.get(), dweights_expected), 2e-6) << d;
      EXPECT_TRUE(same_bits(dout.get(), narrow(dout_expected))) << d;
      EXPECT_TRUE(same_bits(dshared.get(), narrow(c.dx))) << d;
      EXPECT_TRUE(same_bits(dispatched.get(), narrow(gathered))) << d;
    }
}

TEST_F(MoeDevice, padding_rows_are_passed_over) {
  const int64_t rows = 6, top_k = 8, d = 64, experts = 40;
  Ints chosen = some_choices(rows, top_k, experts);
  std::fill(chosen.begin() + 4 * top_k, chosen.end(), -1);
  const Sorted s = sorted(top_k, experts, chosen);
  const Floats before = normals(rows * d, 4);
  const DeviceArray<bf16> out(device(), narrow(normals(rows * top_k * d, 1))), dout(device(), out.size());
  const DeviceArray<float> weights(device(), normals(rows * top_k, 2)), x(device(), before), dweights(device(), rows * top_k),
      dlogits(device(), rows * experts), logits(device(), normals(rows * experts, 5));
  const DeviceArray<int32_t> slot(device(), s.slot), dev_chosen(device(), chosen);
  moe_combine(device(), rows, top_k, d, out.data(), slot, weights, static_cast<const bf16*>(nullptr), x);
  EXPECT_TRUE(same_bits(part(x.get(), 4 * d, 2 * d), part(before, 4 * d, 2 * d)));
  EXPECT_FALSE(same_bits(part(x.get(), 3 * d, d), part(before, 3 * d, d)));
  moe_combine_backward(device(), rows, top_k, d, out.data(), slot, weights, x, dout.data(), dweights, static_cast<bf16*>(nullptr));
  EXPECT_TRUE(same_bits(part(dweights.get(), 4 * top_k, 2 * top_k), Floats(2 * top_k, 0.0f)));
  route_backward(device(), {experts, top_k, 1, 1, true, 1.0f}, rows, logits, dev_chosen, dweights, dlogits.data());
  EXPECT_TRUE(same_bits(part(dlogits.get(), 4 * experts, 2 * experts), Floats(2 * experts, 0.0f)));
}

}  // namespace
}  // namespace perigee::kernels
