#include <algorithm>
#include <functional>
#include <limits>

#include "kernels/moe/moe.h"
#include "kernels/simd/simd.h"

namespace perigee::kernels {
namespace {

constexpr int64_t kMaxExperts = 1024;  // a row's scores live on the stack
constexpr float kEpsilon = 1e-20f;
constexpr int64_t kRowGrain = 16;

void scores(const float* logits, int64_t experts, float* s) {
  for (int64_t e = 0; e < experts; e += 16) {
    const int n = static_cast<int>(std::min<int64_t>(16, experts - e));
    simd::store_partial(s + e, simd::sigmoid(simd::load_partial(logits + e, n)), n);
  }
}

// Marks the `count` largest of values[0, n), ties to the lower index. REQUIRES no NaN, count <= n.
void mark_largest(const float* values, int64_t n, int64_t count, bool* marked) {
  std::fill_n(marked, n, false);
  for (int64_t j = 0; j < count; ++j) {
    int64_t best = -1;
    for (int64_t i = 0; i < n; ++i)
      if (!marked[i] && (best < 0 || values[i] > values[best])) best = i;
    marked[best] = true;
  }
}

void check(const RouterShape& s) {
  PERIGEE_CHECK(s.experts > 0 && s.experts <= kMaxExperts, "experts {} of at most {}", s.experts, kMaxExperts);
  PERIGEE_CHECK(s.top_k > 0 && s.top_k <= s.experts, "top_k {} of {} experts", s.top_k, s.experts);
  PERIGEE_CHECK(s.groups > 0 && s.experts % s.groups == 0 && s.top_groups > 0 && s.top_groups <= s.groups,
                "experts {} groups {} top_groups {}", s.experts, s.groups, s.top_groups);
}

void choose(const RouterShape& shape, const float* s, const float* bias, bool* chosen) {
  float choice[kMaxExperts];
  // A NaN ranks first, so that it reaches the weights instead of being passed over.
  for (int64_t e = 0; e < shape.experts; ++e) {
    const float v = s[e] + bias[e];
    choice[e] = v == v ? v : std::numeric_limits<float>::infinity();
  }
  if (shape.groups > 1) {
    const int64_t size = shape.experts / shape.groups;
    float sums[kMaxExperts];
    bool kept[kMaxExperts];
    for (int64_t g = 0; g < shape.groups; ++g) {
      const float* const v = choice + g * size;
      float first = v[0], second = -std::numeric_limits<float>::infinity();
      for (int64_t i = 1; i < size; ++i) {
        if (v[i] > first) {
          second = first;
          first = v[i];
        } else if (v[i] > second) {
          second = v[i];
        }
      }
      sums[g] = size > 1 ? first + second : first;
    }
    mark_largest(sums, shape.groups, shape.top_groups, kept);
    for (int64_t g = 0; g < shape.groups; ++g)
      if (!kept[g]) std::fill_n(choice + g * size, size, 0.0f);
  }
  mark_largest(choice, shape.experts, shape.top_k, chosen);
}

}  // namespace

void route_forward(Context& ctx, const RouterShape& shape, int64_t rows, const float* logits, const float* bias,
                   int32_t* chosen, float* weights) {
  check(shape);
  const auto body = [&](int64_t begin, int64_t end) {
    float s[kMaxExperts];
    bool is_chosen[kMaxExperts];
    for (int64_t t = begin; t < end; ++t) {
      scores(logits + t * shape.experts, shape.experts, s);
      choose(shape, s, bias, is_chosen);
      int32_t* const row_chosen = chosen + t * shape.top_k;
      float* const row_weights = weights + t * shape.top_k;
      int64_t n = 0;
      float sum = 0;
      for (int64_t e = 0; e < shape.experts; ++e) {
        if (!is_chosen[e]) continue;
        row_chosen[n] = static_cast<int32_t>(e);
        row_weights[n++] = s[e];
        sum = sum + s[e];
      }
      for (int64_t j = 0; j < n; ++j) {
        if (shape.renormalize) row_weights[j] = row_weights[j] / (sum + kEpsilon);
        row_weights[j] = row_weights[j] * shape.scale;
      }
    }
  };
  ctx.parallel_for(rows, kRowGrain, std::cref(body));
}

void route_backward(Context& ctx, const RouterShape& shape, int64_t rows, const float* logits, const int32_t* chosen,
                    const float* dweights, float* dlogits) {
  check(shape);
  const auto body = [&](int64_t begin, int64_t end) {
    float s[kMaxExperts];
    for (int64_t t = begin; t < end; ++t) {
      const float* const row = logits + t * shape.experts;
      const int32_t* const row_chosen = chosen + t * shape.top_k;
      const float* const dw = dweights + t * shape.top_k;
      float* const out = dlogits + t * shape.experts;
      scores(row, shape.experts, s);
      // w_j = scale s_j / S: dw_j/ds_i = scale ([i = j] - s_j / S) / S
      float sum = 0, weighted = 0;
      for (int64_t j = 0; j < shape.top_k; ++j) {
        sum = sum + s[row_chosen[j]];
        weighted = __builtin_fmaf(dw[j], s[row_chosen[j]], weighted);
      }
      sum = sum + kEpsilon;
      std::fill_n(out, shape.experts, 0.0f);
      for (int64_t j = 0; j < shape.top_k; ++j) {
        const float sj = s[row_chosen[j]];
        const float ds = shape.renormalize ? (dw[j] - weighted / sum) / sum : dw[j];
        out[row_chosen[j]] = shape.scale * ds * sj * (1.0f - sj);
      }
    }
  };
  ctx.parallel_for(rows, kRowGrain, std::cref(body));
}

}  // namespace perigee::kernels
