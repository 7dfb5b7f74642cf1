// A head, some rows and their targets, and calls of the kernels on them.
#pragma once
#include "kernels/vocab/vocab.h"
#include "tests/kernels/mla/testing.h"
#include "tests/kernels/vocab/vocab_ref.h"

namespace perigee::testing {

struct Head {
  int64_t rows, d, vocab;
  Floats x, w;  // w row-major, already rounded to the precision of the panels
  std::vector<char> panels;
  kernels::Weight weight;
  std::vector<int32_t> targets;

  Head(int64_t rows_, int64_t d_, int64_t vocab_, uint64_t seed, kernels::Dtype dtype = kernels::Dtype::kF32)
      : rows(rows_), d(d_), vocab(vocab_), x(normals(rows_ * d_, seed)), w(normals(vocab_ * d_, seed + 1)) {
    const int64_t elements = kernels::panel_elements(vocab, d);
    panels.resize(static_cast<size_t>(elements * kernels::dtype_bytes(dtype)) + 64);
    void* at = panels.data() + (64 - reinterpret_cast<uintptr_t>(panels.data()) % 64);
    kernels::pack_panels(w.data(), vocab, d, dtype, at);
    kernels::unpack_panels(at, vocab, d, dtype, w.data());
    weight = {at, dtype, vocab, d};
    Random random(seed + 2);
    for (int64_t t = 0; t < rows; ++t) targets.push_back(static_cast<int32_t>(random.next_int(0, vocab - 1)));
  }
  Head(const Head&) = delete;
};

struct Scored {
  Floats logprob, lse, entropy;
};

inline Scored score(kernels::Context& ctx, const Head& h, float inv_temperature, int64_t begin, int64_t count) {
  const auto n = static_cast<size_t>(count);
  Scored s{Floats(n), Floats(n), Floats(n)};
  kernels::vocab_logprob_forward(ctx, count, h.x.data() + begin * h.d, h.d, h.weight, inv_temperature,
                                 h.targets.data() + begin, s.logprob.data(), s.lse.data(), s.entropy.data());
  return s;
}
inline Scored score(kernels::Context& ctx, const Head& h, float inv_temperature) {
  return score(ctx, h, inv_temperature, 0, h.rows);
}

}  // namespace perigee::testing
