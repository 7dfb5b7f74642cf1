// Inputs for the tests of KDA: seeded, with unit keys and queries as the model has them.
#pragma once
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "base/random.h"
#include "kernels/kda/kda.h"
#include "tests/kernels/kda/kda_ref.h"

namespace perigee::kernels {

using Floats = std::vector<float>;

enum class Decay { kMild, kNone, kStrong, kExtreme, kMixed };

struct KdaCase {
  KdaShape shape;
  int64_t rows = 0;
  Floats q, k, v, g, beta, dout;
};

inline float draw_decay(Decay decay, Random& random) {
  switch (decay) {
    case Decay::kNone:
      return 0.0f;
    case Decay::kMild:
      return -0.5f * random.next_float() * random.next_float();
    case Decay::kStrong:
      return -50.0f * random.next_float();
    case Decay::kExtreme:
      return random.next_float() < 0.3f ? -1e4f : -0.01f * random.next_float();
    case Decay::kMixed: {
      const float kind = random.next_float();
      return kind < 0.2f ? 0.0f : kind < 0.3f ? -30.0f * random.next_float() : -0.2f * random.next_float();
    }
  }
  return 0.0f;
}

inline KdaCase make_kda_case(KdaShape shape, int64_t rows, Decay decay, uint64_t seed) {
  Random random(seed);
  KdaCase c{shape, rows};
  const auto unit = [&](Floats& x, int64_t d, float scale) {
    for (int64_t i = 0; i < rows * shape.heads; ++i) {
      double sum = 0;
      Floats y;
      for (int64_t j = 0; j < d; ++j) y.push_back(random.next_normal());
      for (const float e : y) sum += static_cast<double>(e) * e;
      for (const float e : y) x.push_back(scale * e / static_cast<float>(std::sqrt(sum)));
    }
  };
  unit(c.q, shape.dk, 1.0f / std::sqrt(static_cast<float>(shape.dk)));
  unit(c.k, shape.dk, 1.0f);
  for (int64_t i = 0; i < rows * shape.heads * shape.dv; ++i) {
    c.v.push_back(random.next_normal());
    c.dout.push_back(random.next_normal());
  }
  for (int64_t i = 0; i < rows * shape.heads * shape.dk; ++i) c.g.push_back(draw_decay(decay, random));
  for (int64_t i = 0; i < rows * shape.heads; ++i) {
    const float kind = random.next_float();
    c.beta.push_back(kind < 0.1f ? 1e-6f : kind < 0.2f ? 1.0f - 0x1p-24f : random.next_float());
  }
  return c;
}

// Rows [begin, begin + count) of one head.
template <class T = double>
reference::KdaSequence<T> head_of(const KdaCase& c, int64_t begin, int64_t count, int64_t head) {
  reference::KdaSequence<T> s{static_cast<size_t>(count), static_cast<size_t>(c.shape.dk),
                              static_cast<size_t>(c.shape.dv)};
  for (int64_t t = begin; t < begin + count; ++t) {
    for (int64_t x = 0; x < c.shape.dk; ++x) {
      const size_t at = static_cast<size_t>((t * c.shape.heads + head) * c.shape.dk + x);
      s.q.push_back(c.q[at]);
      s.k.push_back(c.k[at]);
      s.g.push_back(c.g[at]);
    }
    for (int64_t x = 0; x < c.shape.dv; ++x)
      s.v.push_back(c.v[static_cast<size_t>((t * c.shape.heads + head) * c.shape.dv + x)]);
    s.beta.push_back(c.beta[static_cast<size_t>(t * c.shape.heads + head)]);
  }
  return s;
}

inline Floats run_forward(Context& ctx, const KdaCase& c, std::span<const KdaSlice> slices,
                          float* chunk_states = nullptr) {
  Floats out(c.v.size(), -7.0f);
  kda_forward(ctx, c.shape, c.q.data(), c.k.data(), c.v.data(), c.g.data(), c.beta.data(), slices, out.data(),
              chunk_states);
  return out;
}

struct Gradients {
  Floats dq, dk, dv, dg, dbeta;
};

inline Gradients run_backward(Context& ctx, const KdaCase& c, std::span<const Slice> slices) {
  int64_t chunks = 0;
  std::vector<KdaSlice> forward;
  std::vector<Floats> states(slices.size(), Floats(static_cast<size_t>(kda_state_floats(c.shape))));
  for (size_t i = 0; i < slices.size(); ++i) {
    forward.push_back({slices[i], states[i].data()});
    chunks += (slices[i].count + kKdaChunk - 1) / kKdaChunk;
  }
  Floats chunk_states(static_cast<size_t>(chunks * c.shape.heads * c.shape.dk * c.shape.dv), NAN);
  run_forward(ctx, c, forward, chunk_states.data());
  Gradients d{Floats(c.q.size(), -7.0f), Floats(c.k.size(), -7.0f), Floats(c.v.size(), -7.0f),
              Floats(c.g.size(), -7.0f), Floats(c.beta.size(), -7.0f)};
  kda_backward(ctx, c.shape, c.q.data(), c.k.data(), c.v.data(), c.g.data(), c.beta.data(),
               chunk_states.data(), slices, c.dout.data(), d.dq.data(), d.dk.data(), d.dv.data(), d.dg.data(),
               d.dbeta.data());
  return d;
}

inline bool same_bits(const Floats& a, const Floats& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

// Largest |actual - expected| over rows [begin, begin + count) of head; NaN counts as infinite.
inline double worst(const Floats& actual, const reference::Doubles& expected, int64_t heads, int64_t head,
                    int64_t d, int64_t begin, int64_t count) {
  double most = 0;
  for (int64_t t = 0; t < count; ++t)
    for (int64_t x = 0; x < d; ++x) {
      const double e = std::fabs(actual[static_cast<size_t>(((begin + t) * heads + head) * d + x)] -
                                 expected[static_cast<size_t>(t * d + x)]);
      most = std::max(most, std::isnan(e) ? INFINITY : e);
    }
  return most;
}

inline double largest(const reference::Doubles& x) {
  double most = 0;
  for (const double e : x) most = std::max(most, std::fabs(e));
  return most;
}

}  // namespace perigee::kernels
