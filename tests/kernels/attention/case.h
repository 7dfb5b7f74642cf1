// One sequence with its keys and values in pages, and calls of the kernels over parts of it.
#pragma once
#include <cmath>

#include "kernels/attention/attention.h"
#include "tests/kernels/attention/attention_ref.h"
#include "tests/kernels/mla/testing.h"

namespace perigee::testing {

inline kernels::AttentionShape heads_of(int64_t heads, int64_t kv_heads, int64_t dim) {
  return {heads, kv_heads, dim, 1.0f / std::sqrt(static_cast<float>(dim))};
}

struct Keyed {
  kernels::AttentionShape shape;
  int64_t rows;
  Floats q, kv;
  Floats paged;  // kv in whole pages; what lies past the last row is NaN
  std::vector<const float*> pages;

  Keyed(const kernels::AttentionShape& s, int64_t rows_, uint64_t seed) : shape(s), rows(rows_) {
    q = normals(rows * s.q_width(), seed);
    kv = normals(rows * s.kv_width(), seed + 1);
    lay_out();
  }
  void lay_out() {
    const int64_t count = (rows + kernels::kLatentPage - 1) / kernels::kLatentPage;
    const int64_t page = kernels::kLatentPage * shape.kv_width();
    paged.assign(static_cast<size_t>(count * page), NAN);
    std::copy(kv.begin(), kv.end(), paged.begin());
    pages.clear();
    for (int64_t i = 0; i < count; ++i) pages.push_back(paged.data() + i * page);
  }
  template <class Real>
  reference::AttentionReference<Real> reference() const {
    return {{shape.heads, shape.kv_heads, shape.dim, static_cast<double>(shape.scale)},
            rows,
            widened(q),
            widened(kv)};
  }
};

struct KeyedResult {
  Floats out, lse;
};

// Rows [begin, begin + count) of one sequence, alone.
inline KeyedResult attend(kernels::Context& ctx, const Keyed& s, int64_t begin, int64_t count) {
  KeyedResult r{Floats(static_cast<size_t>(count * s.shape.q_width())),
                Floats(static_cast<size_t>(count * s.shape.heads))};
  const kernels::AttentionSlice slice{{0, count, begin}, s.pages.data()};
  kernels::attention_forward(ctx, s.shape, s.q.data() + begin * s.shape.q_width(), {&slice, 1}, r.out.data(),
                             r.lse.data());
  return r;
}

struct KeyedGradients {
  Floats dq, dkv;
};

// Gradients of one whole sequence, alone. What is overwritten starts as 77.
inline KeyedGradients gradients(kernels::Context& ctx, const Keyed& s, const Floats& dout) {
  const KeyedResult f = attend(ctx, s, 0, s.rows);
  KeyedGradients g{Floats(s.q.size(), 77.0f), Floats(s.kv.size(), 77.0f)};
  const kernels::Slice slice{0, s.rows, 0};
  kernels::attention_backward(ctx, s.shape, s.q.data(), s.kv.data(), {&slice, 1}, f.out.data(), f.lse.data(),
                              dout.data(), g.dq.data(), g.dkv.data());
  return g;
}

// The largest distance of two arrays of doubles.
inline double distance(const Doubles& a, const Doubles& b) {
  double worst = 0;
  for (size_t i = 0; i < a.size(); ++i) worst = std::max(worst, std::fabs(a[i] - b[i]));
  return worst;
}

}  // namespace perigee::testing
