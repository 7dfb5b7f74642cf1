// The MLA half of a layer, in the absorbed form: the key half of kv_b_proj goes into the query, the value
// half is applied to what the heads gather from the latents.
#include <cstring>

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
        H(c.num_heads),
        nope(c.qk_nope_head_dim),
        rope(c.qk_rope_head_dim),
        latent(c.kv_lora_rank),
        v(c.v_head_dim),
        width(latent + rope),
        q_width(nope + rope),
        shape{H, latent, rope, 1.0f / __builtin_sqrtf(static_cast<float>(q_width))},
        eps(c.rms_norm_eps) {}
  int64_t D, H, nope, rope, latent, v, width, q_width;
  MlaShape shape;
  float eps;
};

// Copies `count` floats of every row, from column 0 of `from` to column 0 of `to`.
void copy_columns(Context& ctx, int64_t rows, int64_t count, const float* from, int64_t ld_from, float* to,
                  int64_t ld_to) {
  if (count == 0) return;
  ctx.parallel_for(rows, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      std::memcpy(to + r * ld_to, from + r * ld_from, static_cast<size_t>(count) * sizeof(float));
  });
}

}  // namespace

void mla_half_forward(const Pass& pass, int64_t layer, const float* x, MlaActivations& a, float* y) {
  const Dims m(pass.config);
  const LayerParams& p = pass.layout().layer(layer);
  const Weights& w = pass.weights;
  Context& ctx = pass.ctx;
  const int64_t rows = pass.rows;

  a.h = pass.take(m.D);
  a.q = pass.take(m.H * m.q_width);
  a.kv = pass.take(m.width);
  a.c = pass.take(m.width);
  a.qa = pass.take(m.H * m.width);
  a.ol = pass.take(m.H * m.latent);
  a.o = pass.take(m.H * m.v);
  if (pass.training()) a.lse = pass.take(m.H);
  a.low.clear();

  rms_norm_forward(ctx, rows, m.D, x, m.D, w.vector(p.input_norm), m.eps, a.h, m.D);
  multiply(pass, {{p.q, a.h, m.D, a.q, m.H * m.q_width}, {p.kv_a, a.h, m.D, a.kv, m.width}}, a.low);
  rms_norm_forward(ctx, rows, m.latent, a.kv, m.width, w.vector(p.kv_norm), kMlaNormEps, a.c, m.width);
  copy_columns(ctx, rows, m.rope, a.kv + m.latent, m.width, a.c + m.latent, m.width);
  if (pass.config.kind(layer) == LayerKind::kMlaRope) {
    const auto steps = pass.layout().rope_steps(LayerKind::kMlaRope);
    rope_forward(ctx, pass.slices, m.H, m.rope, steps, a.q + m.nope, m.q_width, m.H * m.q_width);
    rope_forward(ctx, pass.slices, 1, m.rope, steps, a.c + m.latent, m.rope, m.width);
  }

  {
    Scratch::Mark mark(ctx.scratch);
    auto* heads = ctx.scratch.take<MatmulTask>(m.H);
    for (int64_t h = 0; h < m.H; ++h) {
      heads[h] = {w.matrix(p.absorb_k + static_cast<int>(h)),
                  a.q + h * m.q_width,
                  m.H * m.q_width,
                  rows,
                  a.qa + h * m.width,
                  m.H * m.width};
      copy_columns(ctx, rows, m.rope, a.q + h * m.q_width + m.nope, m.H * m.q_width,
                   a.qa + h * m.width + m.latent, m.H * m.width);
    }
    matmul(ctx, {heads, static_cast<size_t>(m.H)});
    mla_forward(ctx, m.shape, a.qa, bind_pages(pass, layer, m.width, a.c), a.ol, a.lse);
    for (int64_t h = 0; h < m.H; ++h) {
      heads[h] = {w.matrix(p.absorb_v + static_cast<int>(h)),
                  a.ol + h * m.latent,
                  m.H * m.latent,
                  rows,
                  a.o + h * m.v,
                  m.H * m.v};
    }
    matmul(ctx, {heads, static_cast<size_t>(m.H)});
  }
  multiply(pass, {{p.o, a.o, m.H * m.v, y, m.D}}, a.low);
}

void mla_half_backward(const Pass& pass, int64_t layer, const float* x, const MlaActivations& a,
                       const float* dy, float* dx, float* gradient) {
  const Dims m(pass.config);
  const LayerParams& p = pass.layout().layer(layer);
  const Weights& w = pass.weights;
  Context& ctx = pass.ctx;
  const int64_t rows = pass.rows;
  const auto grad = [&](int tensor) { return grad_of(pass, tensor, gradient); };

  Scratch::Mark mark(ctx.scratch);
  float* d_o = pass.take(m.H * m.v);
  float* dol = pass.take(m.H * m.latent);
  float* dqa = pass.take(m.H * m.width);
  float* dq = pass.take(m.H * m.q_width);
  float* dc = pass.take(m.width);
  float* dkv = pass.take(m.width);
  float* dh = pass.take(m.D);

  multiply_backward(pass, {{p.o, dy, m.D, a.o, m.H * m.v, d_o, m.H * m.v}}, a.low, gradient);
  auto* heads = ctx.scratch.take<MatmulGradInputTask>(m.H);
  for (int64_t h = 0; h < m.H; ++h) {
    heads[h] = {w.matrix(p.absorb_v + static_cast<int>(h)),
                d_o + h * m.v,
                m.H * m.v,
                rows,
                dol + h * m.latent,
                m.H * m.latent,
                false};
  }
  matmul_grad_input(ctx, {heads, static_cast<size_t>(m.H)});
  mla_backward(ctx, m.shape, a.qa, a.c, pass.slices, a.ol, a.lse, dol, dqa, dc);
  for (int64_t h = 0; h < m.H; ++h) {
    heads[h] = {w.matrix(p.absorb_k + static_cast<int>(h)),
                dqa + h * m.width,
                m.H * m.width,
                rows,
                dq + h * m.q_width,
                m.H * m.q_width,
                false};
    copy_columns(ctx, rows, m.rope, dqa + h * m.width + m.latent, m.H * m.width, dq + h * m.q_width + m.nope,
                 m.H * m.q_width);
  }
  matmul_grad_input(ctx, {heads, static_cast<size_t>(m.H)});
  rms_norm_backward(ctx, rows, m.latent, a.kv, m.width, w.vector(p.kv_norm), kMlaNormEps, dc, m.width, dkv,
                    m.width, false, grad(p.kv_norm));
  copy_columns(ctx, rows, m.rope, dc + m.latent, m.width, dkv + m.latent, m.width);
  if (pass.config.kind(layer) == LayerKind::kMlaRope) {
    const auto steps = pass.layout().rope_steps(LayerKind::kMlaRope);
    rope_backward(ctx, pass.slices, m.H, m.rope, steps, dq + m.nope, m.q_width, m.H * m.q_width);
    rope_backward(ctx, pass.slices, 1, m.rope, steps, dkv + m.latent, m.rope, m.width);
  }

  if (!pass.frozen()) {
    const int64_t tasks = 2 * m.H;
    auto* weights = ctx.scratch.take<MatmulGradWeightTask>(tasks);
    for (int64_t h = 0; h < m.H; ++h) {
      weights[h] = {dqa + h * m.width, m.H * m.width, a.q + h * m.q_width,
                    m.H * m.q_width,   rows,          grad(p.absorb_k + static_cast<int>(h)),
                    m.latent,          m.nope};
      weights[m.H + h] = {d_o + h * m.v,
                          m.H * m.v,
                          a.ol + h * m.latent,
                          m.H * m.latent,
                          rows,
                          grad(p.absorb_v + static_cast<int>(h)),
                          m.v,
                          m.latent};
    }
    matmul_grad_weight(ctx, {weights, static_cast<size_t>(tasks)});
  }
  multiply_backward(pass, {{p.q, dq, m.H * m.q_width, a.h, m.D, dh, m.D}, {p.kv_a, dkv, m.width, a.h, m.D, dh, m.D}}, a.low,
                    gradient);
  rms_norm_backward(ctx, rows, m.D, x, m.D, w.vector(p.input_norm), m.eps, dh, m.D, dx, m.D, true,
                    grad(p.input_norm));
}

}  // namespace perigee::policy
