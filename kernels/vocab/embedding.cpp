#include <algorithm>
#include <cstring>
#include <functional>

#include "kernels/simd/simd.h"
#include "kernels/vocab/vocab.h"

namespace perigee::kernels {
namespace {

void check_tokens(int64_t rows, int64_t vocab, const int32_t* tokens) {
  for (int64_t t = 0; t < rows; ++t)
    PERIGEE_CHECK(tokens[t] >= 0 && tokens[t] < vocab, "row {} holds token {}, the vocabulary {}", t, tokens[t], vocab);
}

}  // namespace

void embedding_forward(Context& ctx, int64_t rows, int64_t d, int64_t vocab, const void* table, Dtype dtype,
                       const int32_t* tokens, float* out) {
  check_tokens(rows, vocab, tokens);
  const auto body = [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t at = tokens[t] * d;
      if (dtype == Dtype::kF32) {
        std::memcpy(out + t * d, static_cast<const float*>(table) + at, sizeof(float) * static_cast<size_t>(d));
        continue;
      }
      const uint16_t* const from = static_cast<const uint16_t*>(table) + at;
      int64_t j = 0;
      for (; j + 16 <= d; j += 16) simd::store(out + t * d + j, simd::load_bf16(from + j));
      for (; j < d; ++j) out[t * d + j] = from_bf16(from[j]);
    }
  };
  ctx.parallel_for(rows, std::max<int64_t>(1, 16384 / std::max<int64_t>(1, d)), std::cref(body));
}

void embedding_backward(Context& ctx, int64_t rows, int64_t d, int64_t vocab, const int32_t* tokens,
                        const float* dout, float* dtable) {
  check_tokens(rows, vocab, tokens);
  // A thread owns columns, so rows of the same token add in order whoever runs.
  constexpr int64_t kColumns = 64;
  const auto body = [&](int64_t begin, int64_t end) {
    for (int64_t t = 0; t < rows; ++t) {
      float* const to = dtable + tokens[t] * d;
      const float* const from = dout + t * d;
      for (int64_t j = begin; j < end; j += 16) {
        const int lanes = static_cast<int>(std::min<int64_t>(16, end - j));
        simd::store_partial(to + j, simd::add(simd::load_partial(to + j, lanes), simd::load_partial(from + j, lanes)),
                            lanes);
      }
    }
  };
  ctx.parallel_for(d, rows * d < 16384 ? d : kColumns, std::cref(body));
}

}  // namespace perigee::kernels
