// The softmax attention half of a layer (docs/mixers.md). Keys are kept rotated: where a key stands never changes.
#include "kernels/attention/attention.h"
#include "kernels/attention/rope.h"
#include "kernels/norm/norm.h"
#include "policy/model/adapter_products.h"
#include "policy/model/pages.h"

namespace perigee::policy {
namespace {

using namespace kernels;

struct Dims {
  explicit Dims(const ModelConfig& c)
      : D(c.hidden_size),
        heads(c.num_heads),
        kv_heads(c.num_kv_heads),
        d(c.head_dim),
        q(heads * d),
        k(kv_heads * d),
        kv(c.kv_width()),
        shape{heads, kv_heads, d, 1.0f / __builtin_sqrtf(static_cast<float>(d))},
        eps(c.rms_norm_eps) {}
  int64_t D, heads, kv_heads, d;
  int64_t q, k, kv;  // floats of a row: of queries, of keys, of keys and values
  AttentionShape shape;
  float eps;
};

}  // namespace

void attention_half_forward(const Pass& pass, int64_t layer, const float* x, AttentionActivations& a,
                            float* y) {
  const Dims m(pass.config);
  const LayerParams& p = pass.layout().layer(layer);
  Context& ctx = pass.ctx;

  a.h = pass.take(m.D);
  a.q = pass.take(m.q);
  a.kv = pass.take(m.kv);
  a.o = pass.take(m.q);
  if (pass.training()) a.lse = pass.take(m.heads);
  a.low.clear();

  rms_norm_forward(ctx, pass.rows, m.D, x, m.D, pass.weights.vector(p.input_norm), m.eps, a.h, m.D);
  multiply(pass,
           {{p.q, a.h, m.D, a.q, m.q}, {p.k, a.h, m.D, a.kv, m.kv}, {p.v, a.h, m.D, a.kv + m.k, m.kv}}, a.low);
  const auto steps = pass.layout().rope_steps(LayerKind::kAttention);
  rope_forward(ctx, pass.slices, m.heads, m.d, steps, a.q, m.d, m.q);
  rope_forward(ctx, pass.slices, m.kv_heads, m.d, steps, a.kv, m.d, m.kv);
  {
    Scratch::Mark mark(ctx.scratch);
    attention_forward(ctx, m.shape, a.q, bind_pages(pass, layer, m.kv, a.kv), a.o, a.lse);
  }
  multiply(pass, {{p.o, a.o, m.q, y, m.D}}, a.low);
}

void attention_half_backward(const Pass& pass, int64_t layer, const float* x, const AttentionActivations& a,
                             const float* dy, float* dx, float* gradient) {
  const Dims m(pass.config);
  const LayerParams& p = pass.layout().layer(layer);
  Context& ctx = pass.ctx;

  Scratch::Mark mark(ctx.scratch);
  float* d_o = pass.take(m.q);
  float* dq = pass.take(m.q);
  float* dkv = pass.take(m.kv);
  float* dh = pass.take(m.D);

  multiply_backward(pass, {{p.o, dy, m.D, a.o, m.q, d_o, m.q}}, a.low, gradient);
  attention_backward(ctx, m.shape, a.q, a.kv, pass.slices, a.o, a.lse, d_o, dq, dkv);
  const auto steps = pass.layout().rope_steps(LayerKind::kAttention);
  rope_backward(ctx, pass.slices, m.heads, m.d, steps, dq, m.d, m.q);
  rope_backward(ctx, pass.slices, m.kv_heads, m.d, steps, dkv, m.d, m.kv);
  multiply_backward(pass,
                    {{p.q, dq, m.q, a.h, m.D, dh, m.D},
                     {p.k, dkv, m.kv, a.h, m.D, dh, m.D},
                     {p.v, dkv + m.k, m.kv, a.h, m.D, dh, m.D}},
                    a.low, gradient);
  rms_norm_backward(ctx, pass.rows, m.D, x, m.D, pass.weights.vector(p.input_norm), m.eps, dh, m.D, dx, m.D,
                    true, grad_of(pass, p.input_norm, gradient));
}

}  // namespace perigee::policy
