// Inputs for the tests of the general delta rule, and the CPU's functions over them.
#pragma once
#include "kernels/dplr/dplr.h"
#include "tests/kernels/dplr/dplr_ref.h"
#include "tests/kernels/kda/cases.h"

namespace perigee::kernels {

struct DplrCase {
  DplrShape shape;
  int64_t rows = 0;
  Floats q, k, v, a, b, g, dout;
  DplrInputs inputs() const { return {q.data(), k.data(), v.data(), a.data(), b.data(), g.data()}; }
};

// Keys, queries and gates as KDA's; b a unit vector of its own and a = beta b, turned a little (RWKV-7's are tied less than
// DeltaNet's): transitions whose spectral norm stays near 1.
inline DplrCase make_dplr_case(DplrShape shape, int64_t rows, Decay decay, uint64_t seed) {
  const KdaCase base = make_kda_case(shape, rows, decay, seed),
                other = make_kda_case(shape, rows, decay, seed + 1000003);
  DplrCase c{shape, rows, base.q, base.k, base.v, other.k, other.k, base.g, base.dout};
  for (int64_t t = 0; t < rows; ++t)
    for (int64_t h = 0; h < shape.heads; ++h)
      for (int64_t x = 0; x < shape.dk; ++x) {
        const auto at = static_cast<size_t>((t * shape.heads + h) * shape.dk + x);
        c.a[at] =
            base.beta[static_cast<size_t>(t * shape.heads + h)] * (0.9f * other.k[at] + 0.1f * base.k[at]);
      }
  return c;
}

inline Floats empty_state(const DplrShape& shape) {
  return Floats(static_cast<size_t>(dplr_state_floats(shape)));
}

inline Floats run_forward(Context& ctx, const DplrCase& c, std::span<const DplrSlice> slices,
                          float* chunk_states = nullptr) {
  Floats out(c.v.size(), -7.0f);
  dplr_forward(ctx, c.shape, c.inputs(), slices, out.data(), chunk_states);
  return out;
}

struct DplrGrads {
  Floats dq, dk, dv, da, db, dg;
};

inline DplrGrads run_backward(Context& ctx, const DplrCase& c, std::span<const Slice> slices) {
  std::vector<Floats> states(slices.size(), empty_state(c.shape));
  std::vector<DplrSlice> forward;
  int64_t chunks = 0;
  for (size_t i = 0; i < slices.size(); ++i) {
    forward.push_back({slices[i], states[i].data()});
    chunks += (slices[i].count + kKdaChunk - 1) / kKdaChunk;
  }
  Floats chunk_states(static_cast<size_t>(chunks * c.shape.heads * c.shape.dk * c.shape.dv), NAN);
  run_forward(ctx, c, forward, chunk_states.data());
  const Floats wide(c.q.size(), -7.0f);
  DplrGrads d{wide, wide, Floats(c.v.size(), -7.0f), wide, wide, wide};
  dplr_backward(ctx, c.shape, c.inputs(), chunk_states.data(), slices, c.dout.data(),
                {d.dq.data(), d.dk.data(), d.dv.data(), d.da.data(), d.db.data(), d.dg.data()});
  return d;
}

template <class T = double>
reference::DplrSequence<T> head_of(const DplrCase& c, int64_t begin, int64_t count, int64_t head) {
  reference::DplrSequence<T> s{static_cast<size_t>(count),
                               static_cast<size_t>(c.shape.dk),
                               static_cast<size_t>(c.shape.dv),
                               {},
                               {},
                               {},
                               {},
                               {},
                               {}};
  const auto take = [&](const Floats& from, int64_t d, std::vector<T>& to) {
    for (int64_t t = begin; t < begin + count; ++t)
      for (int64_t x = 0; x < d; ++x)
        to.push_back(from[static_cast<size_t>((t * c.shape.heads + head) * d + x)]);
  };
  take(c.q, c.shape.dk, s.q);
  take(c.k, c.shape.dk, s.k);
  take(c.v, c.shape.dv, s.v);
  take(c.a, c.shape.dk, s.a);
  take(c.b, c.shape.dk, s.b);
  take(c.g, c.shape.dk, s.g);
  return s;
}

}  // namespace perigee::kernels
