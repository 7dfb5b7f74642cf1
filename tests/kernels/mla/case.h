// One sequence with its latent rows in pages, and calls of the kernel over parts of it.
#pragma once
#include <cmath>

#include "kernels/mla/mla.h"
#include "tests/kernels/mla/mla_ref.h"
#include "tests/kernels/mla/testing.h"

namespace perigee::testing {

struct Sequence {
  kernels::MlaShape shape;
  int64_t rows;
  Floats q, c;
  Floats paged;  // c in whole pages; what lies past the last row is NaN
  std::vector<const float*> pages;

  Sequence(const kernels::MlaShape& s, int64_t rows_, uint64_t seed) : shape(s), rows(rows_) {
    q = normals(rows * s.heads * s.width(), seed);
    c = normals(rows * s.width(), seed + 1);
    lay_out();
  }
  void lay_out() {
    const int64_t count = (rows + kernels::kLatentPage - 1) / kernels::kLatentPage;
    paged.assign(static_cast<size_t>(count * kernels::kLatentPage * shape.width()), NAN);
    std::copy(c.begin(), c.end(), paged.begin());
    pages.clear();
    for (int64_t i = 0; i < count; ++i) pages.push_back(paged.data() + i * kernels::kLatentPage * shape.width());
  }
  reference::Mla reference_shape() const { return {shape.heads, shape.latent, shape.rope, shape.scale}; }
  int64_t q_row() const { return shape.heads * shape.width(); }
  int64_t out_row() const { return shape.heads * shape.latent; }
};

struct Attended {
  Floats out, lse;
};

// Rows [begin, begin + count) of one sequence, alone.
inline Attended attend(kernels::Context& ctx, const Sequence& s, int64_t begin, int64_t count) {
  Attended r{Floats(static_cast<size_t>(count * s.out_row())), Floats(static_cast<size_t>(count * s.shape.heads))};
  const kernels::MlaSlice slice{{0, count, begin}, s.pages.data()};
  kernels::mla_forward(ctx, s.shape, s.q.data() + begin * s.q_row(), {&slice, 1}, r.out.data(), r.lse.data());
  return r;
}

inline kernels::MlaShape shape_of(int64_t heads, int64_t latent, int64_t rope) {
  return {heads, latent, rope, 1.0f / std::sqrt(static_cast<float>(latent + rope))};
}

}  // namespace perigee::testing
