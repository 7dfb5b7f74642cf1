// Inputs for the tests of Mamba2's recurrence, and runs of it over them.
#pragma once
#include "kernels/ssd/ssd.h"
#include "tests/kernels/kda/cases.h"
#include "tests/kernels/ssd/ssd_ref.h"

namespace perigee::kernels {

struct SsdCase {
  SsdShape shape;
  int64_t rows = 0;
  Floats q, k, v, g, dout;
};

// Queries, keys and values as KDA's, but not normalised; one decay a head.
inline SsdCase make_ssd_case(SsdShape shape, int64_t rows, Decay decay, uint64_t seed) {
  Random random(seed);
  SsdCase c{shape, rows, {}, {}, {}, {}, {}};
  const float scale = 1.0f / std::sqrt(static_cast<float>(shape.dk));
  for (int64_t i = 0; i < rows * shape.heads * shape.dk; ++i) {
    c.q.push_back(scale * random.next_normal());
    c.k.push_back(random.next_normal());
  }
  for (int64_t i = 0; i < rows * shape.heads * shape.dv; ++i) {
    c.v.push_back(random.next_normal());
    c.dout.push_back(random.next_normal());
  }
  for (int64_t i = 0; i < rows * shape.heads; ++i) c.g.push_back(draw_decay(decay, random));
  return c;
}

inline Floats ssd_empty_state(const SsdShape& shape) {
  return Floats(static_cast<size_t>(ssd_state_floats(shape)));
}

inline Floats run_forward(Context& ctx, const SsdCase& c, std::span<const SsdSlice> slices,
                          float* chunk_states = nullptr) {
  Floats out(c.v.size(), -7.0f);
  ssd_forward(ctx, c.shape, c.q.data(), c.k.data(), c.v.data(), c.g.data(), slices, out.data(), chunk_states);
  return out;
}

struct SsdGrads {
  Floats dq, dk, dv, dg;
};

inline Floats ssd_chunk_states(Context& ctx, const SsdCase& c, std::span<const Slice> slices) {
  std::vector<Floats> states(slices.size(), ssd_empty_state(c.shape));
  std::vector<SsdSlice> forward;
  int64_t chunks = 0;
  for (size_t i = 0; i < slices.size(); ++i) {
    forward.push_back({slices[i], states[i].data()});
    chunks += (slices[i].count + kKdaChunk - 1) / kKdaChunk;
  }
  Floats chunk_states(static_cast<size_t>(chunks * c.shape.heads * c.shape.dk * c.shape.dv), NAN);
  run_forward(ctx, c, forward, chunk_states.data());
  return chunk_states;
}

inline SsdGrads run_backward(Context& ctx, const SsdCase& c, std::span<const Slice> slices) {
  const Floats chunk_states = ssd_chunk_states(ctx, c, slices);
  SsdGrads d{Floats(c.q.size(), -7.0f), Floats(c.k.size(), -7.0f), Floats(c.v.size(), -7.0f),
             Floats(c.g.size(), -7.0f)};
  ssd_backward(ctx, c.shape, c.q.data(), c.k.data(), c.v.data(), c.g.data(), chunk_states.data(), slices,
               c.dout.data(), d.dq.data(), d.dk.data(), d.dv.data(), d.dg.data());
  return d;
}

// Rows [begin, begin + count) of one head.
template <class T = double>
reference::SsdSequence<T> head_of(const SsdCase& c, int64_t begin, int64_t count, int64_t head) {
  reference::SsdSequence<T> s{static_cast<size_t>(count),
                              static_cast<size_t>(c.shape.dk),
                              static_cast<size_t>(c.shape.dv),
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
  take(c.g, 1, s.g);
  return s;
}

template <class T = double>
std::vector<T> dout_of(const SsdCase& c, int64_t begin, int64_t count, int64_t head) {
  std::vector<T> dout;
  for (int64_t t = begin; t < begin + count; ++t)
    for (int64_t x = 0; x < c.shape.dv; ++x)
      dout.push_back(c.dout[static_cast<size_t>((t * c.shape.heads + head) * c.shape.dv + x)]);
  return dout;
}

}  // namespace perigee::kernels
