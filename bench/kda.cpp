// KDA in chunks against the token-by-token recurrence that it replaces, and against the general transition (DPLR) that it
// is a case of, on the same inputs.
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include <fmt/format.h>

#include "base/error.h"
#include "base/random.h"
#include "bench/rig.h"
#include "kernels/dplr/dplr.h"
#include "kernels/kda/kda.h"
#include "kernels/simd/simd.h"

namespace perigee::bench {
namespace {

using namespace kernels;

constexpr int64_t kRows = 2048, kHeads = 4;

template <int64_t kDim>
struct Inputs {
  std::vector<float> q, k, v, g, beta;
  Inputs() {
    Random random(7);
    const auto fill = [&](std::vector<float>& x, int64_t n, auto&& draw) {
      for (int64_t i = 0; i < n; ++i) x.push_back(static_cast<float>(draw()));
    };
    const int64_t n = kRows * kHeads * kDim;
    fill(q, n, [&] { return random.next_normal(); });
    fill(k, n, [&] { return random.next_normal(); });
    fill(v, n, [&] { return random.next_normal(); });
    fill(g, n, [&] { return -0.1 * random.next_float(); });
    fill(beta, kRows * kHeads, [&] { return random.next_float(); });
    for (int64_t i = 0; i < n; i += kDim)
      for (float* x : {q.data() + i, k.data() + i}) {
        double sum = 0;
        for (int64_t j = 0; j < kDim; ++j) sum += static_cast<double>(x[j]) * static_cast<double>(x[j]);
        const auto scale =
            static_cast<float>((x == k.data() + i ? 1.0 : 1 / std::sqrt(double{kDim})) / std::sqrt(sum));
        for (int64_t j = 0; j < kDim; ++j) x[j] *= scale;
      }
  }
};

// The definition, vectorised over the values: decay, read, write, read. The state passes through the caches four times
// a token.
template <int64_t kDim>
void recurrent_head(const Inputs<kDim>& in, int64_t head, float* s, float* out) {
  using namespace simd;
  std::fill_n(s, kDim * kDim, 0.0f);
  constexpr int64_t kVectors = kDim / 16;
  for (int64_t t = 0; t < kRows; ++t) {
    const int64_t at = (t * kHeads + head) * kDim;
    F16 seen[kVectors], o[kVectors];
    for (int64_t x = 0; x < kVectors; ++x) seen[x] = o[x] = zero();
    for (int64_t i = 0; i < kDim; ++i) {
      const F16 a = set1(simd::exp(in.g[static_cast<size_t>(at + i)])),
                k = set1(in.k[static_cast<size_t>(at + i)]);
      for (int64_t x = 0; x < kVectors; ++x) {
        const F16 row = mul(load(s + i * kDim + 16 * x), a);
        store(s + i * kDim + 16 * x, row);
        seen[x] = fma(row, k, seen[x]);
      }
    }
    const F16 beta = set1(in.beta[static_cast<size_t>(t * kHeads + head)]);
    for (int64_t x = 0; x < kVectors; ++x) seen[x] = mul(beta, sub(load(in.v.data() + at + 16 * x), seen[x]));
    for (int64_t i = 0; i < kDim; ++i) {
      const F16 k = set1(in.k[static_cast<size_t>(at + i)]), q = set1(in.q[static_cast<size_t>(at + i)]);
      for (int64_t x = 0; x < kVectors; ++x) {
        const F16 row = fma(k, seen[x], load(s + i * kDim + 16 * x));
        store(s + i * kDim + 16 * x, row);
        o[x] = fma(q, row, o[x]);
      }
    }
    for (int64_t x = 0; x < kVectors; ++x) store(out + at + 16 * x, o[x]);
  }
}

// KDA as the general recurrence: a = beta k, b = exp(g) . k, and beta k is written.
template <int64_t kDim>
struct DplrOperands {
  std::vector<float> written, read;
  explicit DplrOperands(const Inputs<kDim>& in) : written(in.k), read(in.k) {
    for (size_t i = 0; i < read.size(); ++i) {
      written[i] *= in.beta[i / kDim];
      read[i] *= std::exp(in.g[i]);
    }
  }
};

// Both are float32 and order their sums differently over a memory of a few hundred tokens.
void require_same(const std::vector<float>& a, const std::vector<float>& b) {
  double difference = 0, size = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    difference = std::max(difference, std::abs(static_cast<double>(a[i]) - static_cast<double>(b[i])));
    size = std::max(size, std::abs(static_cast<double>(b[i])));
  }
  PERIGEE_CHECK(difference < 1e-5 * size, "two forms of KDA differ by {} of {}", difference, size);
}

// Of heads of kDim; `suffix` follows each figure's name.
template <int64_t kDim>
void bench_heads(Rig& rig, const std::string& suffix) {
  const auto wants = [&](const char* name) { return rig.wants(name + suffix); };
  if (!wants("kda-chunked") && !wants("kda-recurrent") && !wants("kda-dplr")) return;
  Context& ctx = rig.context();
  const KdaShape shape{kHeads, kDim, kDim};
  const Inputs<kDim> in;
  const auto floats = static_cast<size_t>(kRows * kHeads * kDim);
  std::vector<float> chunked(floats), recurrent(floats);
  std::vector<float> state(static_cast<size_t>(kda_state_floats(shape))), states(kHeads * kDim * kDim);
  const auto run_chunked = [&] {
    std::fill(state.begin(), state.end(), 0.0f);
    const KdaSlice slice{{0, kRows, 0}, state.data()};
    kda_forward(ctx, shape, in.q.data(), in.k.data(), in.v.data(), in.g.data(), in.beta.data(), {&slice, 1},
                chunked.data());
    return static_cast<double>(kRows);
  };
  const auto run_recurrent = [&] {
    ctx.pool.parallel_for(kHeads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t h = begin; h < end; ++h)
        recurrent_head(in, h, states.data() + h * kDim * kDim, recurrent.data());
    });
    return static_cast<double>(kRows);
  };
  run_chunked();
  run_recurrent();
  const DplrOperands<kDim> general(in);
  std::vector<float> dplr(floats), dplr_state(static_cast<size_t>(dplr_state_floats(shape)));
  const auto run_dplr = [&] {
    std::fill(dplr_state.begin(), dplr_state.end(), 0.0f);
    const DplrSlice slice{{0, kRows, 0}, dplr_state.data()};
    dplr_forward(ctx, shape,
                 {in.q.data(), general.written.data(), in.v.data(), general.written.data(),
                  general.read.data(), in.g.data()},
                 {&slice, 1}, dplr.data());
    return static_cast<double>(kRows);
  };
  run_dplr();
  require_same(chunked, recurrent);
  require_same(dplr, recurrent);
  Figure f;
  f.unit = "tokens/s";
  f.bound = Bound::kFma;
  f.work = 2.0 * kHeads * 4 * kDim * kDim;  // the recurrence: decay, Sᵀk, the rank-one write and Sᵀq
  f.note = fmt::format("4 heads of {}, 2,048 tokens; FLOP of the recurrence", kDim);
  if (wants("kda-chunked")) {
    f.name = "kda-chunked" + suffix;
    rig.measure(f, run_chunked);
  }
  if (wants("kda-recurrent")) {
    f.name = "kda-recurrent" + suffix;
    rig.measure(f, run_recurrent);
  }
  if (wants("kda-dplr")) {
    f.name = "kda-dplr" + suffix;
    f.note = "the same inputs through the general transition, Diag(exp g) - a b^T";
    rig.measure(f, run_dplr);
  }
}

}  // namespace

void bench_kda(Rig& rig) {
  bench_heads<128>(rig, "");
  bench_heads<32>(rig, "-32");  // the size of the laboratory's small models
}

}  // namespace perigee::bench
