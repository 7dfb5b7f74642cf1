// The bf16 backward of Kimi Delta Attention on the device against the float64 recurrence.
#include "kernels/kda/kda_device.h"
#include "tests/kernels/device_fixture.h"
#include "tests/kernels/kda/cases.h"

namespace perigee::kernels {
namespace {

using KdaBackwardDevice = DeviceTest;

struct Bf16Case {
  KdaCase c;  // q, k, v and dout hold what their rounding to bf16 widens to
  std::vector<Slice> slices;
  std::vector<bf16> states;  // as the forward keeps them
};

// The states come from the float function, so that a fault of the device's forward is not one of the backward.
Bf16Case make_bf16_case(KdaShape shape, const std::vector<int64_t>& lengths, Decay decay, uint64_t seed) {
  int64_t rows = 0;
  Bf16Case x;
  for (const int64_t n : lengths) {
    x.slices.push_back({rows, n, 0});
    rows += n;
  }
  x.c = make_kda_case(shape, rows, decay, seed);
  for (Floats* f : {&x.c.q, &x.c.k, &x.c.v, &x.c.dout}) *f = widen(narrow(*f));
  Context ctx(2);
  const int64_t one = shape.heads * shape.dk * shape.dv;
  x.states.resize(static_cast<size_t>(kda_chunk_slots(rows, static_cast<int64_t>(lengths.size())) * one),
                  bf16{0x7fc0});
  for (size_t i = 0; i < x.slices.size(); ++i) {
    Floats state(static_cast<size_t>(kda_state_floats(shape)));
    const int64_t chunks = (x.slices[i].count + kKdaChunk - 1) / kKdaChunk;
    Floats states(static_cast<size_t>(chunks * one));
    const KdaSlice slice{x.slices[i], state.data()};
    run_forward(ctx, x.c, {&slice, 1}, states.data());
    const std::vector<bf16> rounded = narrow(states);
    const int64_t slot = kda_chunk_slot(x.slices[i].begin, static_cast<int64_t>(i), 0);
    std::copy(rounded.begin(), rounded.end(), x.states.begin() + slot * one);
  }
  return x;
}

struct Bf16Gradients {
  std::vector<bf16> dq, dk, dv;
  Floats dg, dbeta;
};

Bf16Gradients run(Device& d, const Bf16Case& x) {
  const KdaCase& c = x.c;
  std::vector<DeviceSlice> slices;
  DeviceBatch batch;
  batch.rows = static_cast<int32_t>(c.rows);
  batch.slices = static_cast<int32_t>(x.slices.size());
  for (const Slice& s : x.slices) {
    slices.push_back({static_cast<int32_t>(s.begin), static_cast<int32_t>(s.count), 0});
    batch.max_count = std::max(batch.max_count, static_cast<int32_t>(s.count));
  }
  const DeviceArray<DeviceSlice> slice_memory(d, slices);
  batch.slice = slice_memory;
  const DeviceArray<bf16> q(d, narrow(c.q)), k(d, narrow(c.k)), v(d, narrow(c.v)), dout(d, narrow(c.dout)),
      states(d, x.states);
  const DeviceArray<float> g(d, c.g), beta(d, c.beta), dg(d, g.size()), dbeta(d, beta.size());
  const DeviceArray<bf16> dq(d, q.size()), dk(d, k.size()), dv(d, v.size());
  kda_backward<bf16>(d, c.shape, q, k, v, g, beta, states, batch, dout, dq, dk, dv, dg, dbeta);
  return {dq.get(), dk.get(), dv.get(), dg.get(), dbeta.get()};
}

struct Errors {
  double dq, dk, dv, dg, dbeta;
};

Errors errors(const Bf16Case& x, const Bf16Gradients& d) {
  const KdaCase& c = x.c;
  const auto [h, dk, dv] = c.shape;
  reference::Doubles eq(c.q.size()), ek(c.q.size()), ev(c.v.size()), eg(c.q.size()), ebeta(c.beta.size());
  for (const Slice& s : x.slices) {
    for (int64_t head = 0; head < h && s.count > 0; ++head) {
      const auto sequence = head_of(c, s.begin, s.count, head);
      reference::Doubles dout;
      for (int64_t t = s.begin; t < s.begin + s.count; ++t)
        for (int64_t y = 0; y < dv; ++y) dout.push_back(c.dout[static_cast<size_t>((t * h + head) * dv + y)]);
      const auto e = kda_recurrence_gradients(sequence, kda_recurrence(sequence), dout);
      for (int64_t t = 0; t < s.count; ++t) {
        const int64_t row = (s.begin + t) * h + head;
        for (int64_t y = 0; y < dk; ++y) {
          const auto to = static_cast<size_t>(row * dk + y), from = static_cast<size_t>(t * dk + y);
          eq[to] = e.dq[from];
          ek[to] = e.dk[from];
          eg[to] = e.dg[from];
        }
        for (int64_t y = 0; y < dv; ++y)
          ev[static_cast<size_t>(row * dv + y)] = e.dv[static_cast<size_t>(t * dv + y)];
        ebeta[static_cast<size_t>(row)] = e.dbeta[static_cast<size_t>(t)];
      }
    }
  }
  return {relative_error(d.dq, eq), relative_error(d.dk, ek), relative_error(d.dv, ev),
          relative_error(d.dg, eg), relative_error(d.dbeta, ebeta)};
}

// Each of S, dS', W, X0, R, dX, the scaled keys and queries, and the 16x16 matrices is rounded to bf16 once (2^-9 at most,
// 2^-10.8 in the mean square), and every gradient meets six to ten of them in a row: 3 to 4.5e-3 is seen, whatever the
// decays and the lengths.
constexpr double kTolerance = 3 * 0x1p-9;

void expect_small(const Errors& e) {
  EXPECT_LT(e.dq, kTolerance);
  EXPECT_LT(e.dk, kTolerance);
  EXPECT_LT(e.dv, kTolerance);
  EXPECT_LT(e.dg, kTolerance);
  EXPECT_LT(e.dbeta, kTolerance);
}

TEST_F(KdaBackwardDevice, agrees_with_the_recurrence_in_float64) {
  struct Shapes {
    KdaShape shape;
    std::vector<int64_t> lengths;
  };
  const std::vector<Shapes> shapes = {
      {{2, 128, 128}, {100, 0, 1, 37, 16, 17}},
      {{1, 64, 32}, {33, 70}},
      {{3, 16, 48}, {5, 64}},
      {{1, 112, 80}, {90}},
      {{1, 128, 128}, {700}},
  };
  uint64_t seed = 1;
  for (const Shapes& s : shapes) {
    for (const Decay decay : {Decay::kMild, Decay::kNone, Decay::kStrong, Decay::kMixed, Decay::kExtreme}) {
      const Bf16Case x = make_bf16_case(s.shape, s.lengths, decay, ++seed);
      const Errors e = errors(x, run(device(), x));
      expect_small(e);
    }
  }
}

// More chunks than a segment holds, in one sequence and in several.
TEST_F(KdaBackwardDevice, hands_the_state_gradient_from_segment_to_segment) {
  const Bf16Case x = make_bf16_case({1, 16, 16}, {2000, 4999, 3000}, Decay::kMixed, 77);
  const Errors e = errors(x, run(device(), x));
  expect_small(e);
}

TEST_F(KdaBackwardDevice, gives_the_same_bits_again_and_in_any_company) {
  const KdaShape shape{2, 128, 128};
  const Bf16Case packed = make_bf16_case(shape, {50, 131, 7}, Decay::kMixed, 5);
  const Bf16Gradients a = run(device(), packed), b = run(device(), packed);
  EXPECT_EQ(std::memcmp(a.dq.data(), b.dq.data(), a.dq.size() * 2), 0);
  EXPECT_EQ(std::memcmp(a.dk.data(), b.dk.data(), a.dk.size() * 2), 0);
  EXPECT_EQ(std::memcmp(a.dv.data(), b.dv.data(), a.dv.size() * 2), 0);
  EXPECT_EQ(first_difference(a.dg, b.dg), -1);
  EXPECT_EQ(first_difference(a.dbeta, b.dbeta), -1);

  Bf16Case alone = packed;
  const int64_t begin = 50, n = 131;
  const auto rows_of = [&](const Floats& x, int64_t d) {
    return Floats(x.begin() + begin * d, x.begin() + (begin + n) * d);
  };
  const int64_t ld = 2 * 128, one = ld * 128;
  alone.c.rows = n;
  alone.c.q = rows_of(packed.c.q, ld);
  alone.c.k = rows_of(packed.c.k, ld);
  alone.c.v = rows_of(packed.c.v, ld);
  alone.c.g = rows_of(packed.c.g, ld);
  alone.c.dout = rows_of(packed.c.dout, ld);
  alone.c.beta = rows_of(packed.c.beta, 2);
  alone.slices = {{0, n, 0}};
  alone.states.assign(packed.states.begin() + kda_chunk_slot(begin, 1, 0) * one,
                      packed.states.begin() + kda_chunk_slot(begin, 1, 9) * one);
  const Bf16Gradients c = run(device(), alone);
  EXPECT_EQ(std::memcmp(c.dk.data(), a.dk.data() + begin * ld, c.dk.size() * 2), 0);
  EXPECT_EQ(std::memcmp(c.dv.data(), a.dv.data() + begin * ld, c.dv.size() * 2), 0);
  EXPECT_EQ(first_difference(c.dg, rows_of(a.dg, ld)), -1);
}

}  // namespace
}  // namespace perigee::kernels
