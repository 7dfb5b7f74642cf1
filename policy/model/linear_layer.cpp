// The linear half of a layer (KDA, GDN, Mamba2, DPLR; docs/mixers.md): projections, convolution, gates, the recurrence,
// and out = o_proj( RMSNorm(o) * gate(g_b g_a h) ).
#include <array>
#include <cstring>
#include <vector>

#include "kernels/activation/sigmoid_gate.h"
#include "kernels/activation/silu.h"
#include "kernels/conv/short_conv.h"
#include "kernels/dplr/dplr.h"
#include "kernels/kda/head_gate.h"
#include "kernels/norm/norm.h"
#include "kernels/ssd/ssd.h"
#include "policy/model/adapter_products.h"

namespace perigee::policy {
namespace {

using namespace kernels;

struct Dims {
  Dims(const ModelConfig& c, int64_t layer)
      : kind(c.kind(layer)),
        gate(c.output_gate),
        D(c.hidden_size),
        H(c.linear_heads),
        d(c.linear_head_dim),
        wide(H * d),
        shape{H, d, d},
        eps(c.rms_norm_eps) {}
  LayerKind kind;
  OutputGate gate;
  int64_t D, H, d, wide;
  KdaShape shape;
  float eps;

  float q_scale() const { return 1.0f / __builtin_sqrtf(static_cast<float>(d)); }
  bool normalises() const { return kind != LayerKind::kMamba2; }  // q and k
  bool gated() const { return gate != OutputGate::kNone; }
  int64_t state_floats() const {
    return kind == LayerKind::kMamba2 ? ssd_state_floats(shape)
           : kind == LayerKind::kDplr ? dplr_state_floats(shape)
                                      : kda_state_floats(shape);
  }
};

int64_t chunks_of(std::span<const Slice> slices) {
  int64_t sum = 0;
  for (const Slice& s : slices) sum += (s.count + kKdaChunk - 1) / kKdaChunk;
  return sum;
}

// Memory of each slice: in the sequences at this offset, or zeroed temporaries.
float** slice_memory(const Pass& pass, int64_t offset, int64_t floats) {
  const auto n = static_cast<int64_t>(pass.slices.size());
  auto** at = pass.ctx.scratch.take<float*>(n);
  float* temporary = nullptr;
  if (pass.training()) {
    temporary = pass.ctx.scratch.take<float>(n * floats);
    std::memset(temporary, 0, static_cast<size_t>(n * floats) * sizeof(float));
  }
  for (int64_t i = 0; i < n; ++i)
    at[i] = pass.training() ? temporary + i * floats
                            : reinterpret_cast<float*>(pass.sequences[static_cast<size_t>(i)].recurrent + offset);
  return at;
}

// The slices with the states of this layer. Item is KdaSlice, DplrSlice or SsdSlice.
template <class Item>
std::span<const Item> bind_states(const Pass& pass, const Dims& m, int64_t layer) {
  float** memory = slice_memory(pass, pass.training() ? 0 : pass.state->state_offset(layer), m.state_floats());
  auto* items = pass.ctx.scratch.take<Item>(static_cast<int64_t>(pass.slices.size()));
  for (size_t i = 0; i < pass.slices.size(); ++i) items[i] = {pass.slices[i], memory[i]};
  return {items, pass.slices.size()};
}

// qkv -> q, k, v: the convolution with SiLU, or SiLU alone.
void convolve(const Pass& pass, const Dims& m, int64_t layer, const LinearActivations& a) {
  Context& ctx = pass.ctx;
  const int conv_w = pass.layout().layer(layer).conv;
  float* const outputs[3] = {a.q, a.k, a.v};
  if (conv_w < 0) {
    for (int64_t part = 0; part < 3; ++part)
      silu_forward(ctx, pass.rows, m.wide, a.qkv + part * m.wide, 3 * m.wide, outputs[part], m.wide);
    return;
  }
  Scratch::Mark mark(ctx.scratch);
  const size_t n = pass.slices.size();
  float** windows = slice_memory(pass, pass.training() ? 0 : pass.state->conv_offset(layer), 3 * m.wide * (kConvWidth - 1));
  auto* conv = ctx.scratch.take<ConvSlice>(static_cast<int64_t>(n));
  for (size_t i = 0; i < n; ++i) conv[i] = {pass.slices[i], windows[i], 3 * m.wide};
  const float* w = pass.weights.vector(conv_w);
  for (int64_t part = 0; part < 3; ++part) {
    short_conv_forward(ctx, m.wide, a.qkv + part * m.wide, 3 * m.wide, w + part * m.wide * kConvWidth, {conv, n},
                       outputs[part], m.wide);
    for (size_t i = 0; i < n; ++i) conv[i].window += m.wide;  // the window of the next part's channels
  }
}

// The gates of the recurrence from f, e, a, b, and the recurrence: o.
void recur(const Pass& pass, const Dims& m, int64_t layer, const LinearActivations& a) {
  Context& ctx = pass.ctx;
  const LayerParams& p = pass.layout().layer(layer);
  const float *a_log = pass.weights.vector(p.a_log), *dt_bias = pass.weights.vector(p.dt_bias);
  const int64_t rows = pass.rows;
  Scratch::Mark mark(ctx.scratch);
  switch (m.kind) {
    case LayerKind::kMamba2:
      head_gate_forward(ctx, rows, m.H, a.b, a_log, dt_bias, a.g, a.delta);
      scale_heads(ctx, rows, m.H, m.d, a.delta, a.v, a.written);
      ssd_forward(ctx, m.shape, a.qn, a.kn, a.written, a.g, bind_states<SsdSlice>(pass, m, layer), a.o, a.chunk_states);
      add_skip(ctx, rows, m.H, m.d, pass.weights.vector(p.skip), a.v, a.o);
      return;
    case LayerKind::kDplr:
      kda_gate_forward(ctx, m.shape, rows, a.f, nullptr, a_log, dt_bias, a.g, nullptr);
      sigmoid_gate_forward(ctx, rows * m.wide, a.e, a.kn, a.written);
      dplr_forward(ctx, m.shape, {a.qn, a.written, a.v, a.written, a.kn, a.g}, bind_states<DplrSlice>(pass, m, layer), a.o,
                   a.chunk_states);
      return;
    case LayerKind::kGdn: {
      float* g = ctx.scratch.take<float>(rows * m.H);
      head_gate_forward(ctx, rows, m.H, a.a, a_log, dt_bias, g, nullptr);
      broadcast_heads(ctx, rows, m.H, m.d, g, a.g);
      beta_forward(ctx, rows * m.H, a.b, a.beta);
      break;
    }
    default: kda_gate_forward(ctx, m.shape, rows, a.f, a.b, a_log, dt_bias, a.g, a.beta);
  }
  kda_forward(ctx, m.shape, a.qn, a.kn, a.v, a.g, a.beta, bind_states<KdaSlice>(pass, m, layer), a.o, a.chunk_states);
}

// Gradients of what goes into the recurrence and its gates.
struct Gradients {
  float *q, *k, *v;         // [rows, Hd] after the convolution; q, k before they are normalised
  float *f, *e;             // [rows, Hd]
  float *a, *b;             // [rows, H]
};

void recur_backward(const Pass& pass, const Dims& m, int64_t layer, const LinearActivations& a, const float* d_o,
                    const Gradients& d, float* gradient) {
  Context& ctx = pass.ctx;
  const LayerParams& p = pass.layout().layer(layer);
  const float *a_log = pass.weights.vector(p.a_log), *dt_bias = pass.weights.vector(p.dt_bias);
  const auto grad = [&](int tensor) { return grad_of(pass, tensor, gradient); };
  const int64_t rows = pass.rows;
  Scratch::Mark mark(ctx.scratch);
  switch (m.kind) {
    case LayerKind::kMamba2: {
      float *dwritten = pass.take(m.wide), *dg = pass.take(m.H), *ddelta = pass.take(m.H);
      ssd_backward(ctx, m.shape, a.qn, a.kn, a.written, a.g, a.chunk_states, pass.slices, d_o, d.q, d.k, dwritten, dg);
      scale_skip_backward(ctx, rows, m.H, m.d, a.delta, pass.weights.vector(p.skip), a.v, dwritten, d_o, d.v, ddelta,
                          grad(p.skip));
      head_gate_backward(ctx, rows, m.H, a.b, a_log, dt_bias, dg, ddelta, d.b, grad(p.a_log), grad(p.dt_bias));
      return;
    }
    case LayerKind::kDplr: {
      float *dwritten = pass.take(m.wide), *dremoved = pass.take(m.wide);
      const DplrGradients out{d.q, dwritten, d.v, dremoved, d.k, d.f};
      dplr_backward(ctx, m.shape, {a.qn, a.written, a.v, a.written, a.kn, a.g}, a.chunk_states, pass.slices, d_o, out);
      add_inplace(ctx, rows * m.wide, dremoved, dwritten);
      sigmoid_gate_backward(ctx, rows * m.wide, a.e, a.kn, dwritten, d.e, d.k);
      kda_gate_backward(ctx, m.shape, rows, a.f, nullptr, a_log, dt_bias, d.f, nullptr, d.f, nullptr, grad(p.a_log),
                        grad(p.dt_bias));
      return;
    }
    case LayerKind::kGdn: {
      float *dwide = pass.take(m.wide), *dg = pass.take(m.H);
      kda_backward(ctx, m.shape, a.qn, a.kn, a.v, a.g, a.beta, a.chunk_states, pass.slices, d_o, d.q, d.k, d.v, dwide, d.b);
      sum_heads(ctx, rows, m.H, m.d, dwide, dg);
      head_gate_backward(ctx, rows, m.H, a.a, a_log, dt_bias, dg, nullptr, d.a, grad(p.a_log), grad(p.dt_bias));
      beta_backward(ctx, rows * m.H, a.b, d.b, d.b);
      return;
    }
    default:
      kda_backward(ctx, m.shape, a.qn, a.kn, a.v, a.g, a.beta, a.chunk_states, pass.slices, d_o, d.q, d.k, d.v, d.f, d.b);
      kda_gate_backward(ctx, m.shape, rows, a.f, a.b, a_log, dt_bias, d.f, d.b, d.f, d.b, grad(p.a_log), grad(p.dt_bias));
  }
}

}  // namespace

void linear_half_forward(const Pass& pass, int64_t layer, const float* x, LinearActivations& a, float* y) {
  const Dims m(pass.config, layer);
  const LayerParams& p = pass.layout().layer(layer);
  const Weights& w = pass.weights;
  Context& ctx = pass.ctx;
  const int64_t rows = pass.rows;

  a.low.clear();
  a.h = pass.take(m.D);
  a.qkv = pass.take(3 * m.wide);
  // Products of h, then those of their low ranks, in the order that backward follows.
  std::vector<Product> first = {{p.q, a.h, m.D, a.qkv, 3 * m.wide},
                                {p.k, a.h, m.D, a.qkv + m.wide, 3 * m.wide},
                                {p.v, a.h, m.D, a.qkv + 2 * m.wide, 3 * m.wide}};
  std::vector<Product> second;
  const auto low_rank = [&](int down, int up, float*& low, float*& out) {
    if (down < 0) return;
    low = pass.take(m.d);
    out = pass.take(m.wide);
    first.push_back({down, a.h, m.D, low, m.d});
    second.push_back({up, low, m.d, out, m.wide});
  };
  low_rank(p.f_a, p.f_b, a.f_low, a.f);
  low_rank(p.g_a, p.g_b, a.gate_low, a.gate);
  low_rank(p.e_a, p.e_b, a.e_low, a.e);
  const auto per_head = [&](int tensor, float*& out) {
    if (tensor < 0) return;
    out = pass.take(m.H);
    first.push_back({tensor, a.h, m.D, out, m.H});
  };
  per_head(p.a, a.a);
  per_head(p.b, a.b);
  a.q = pass.take(m.wide);
  a.k = pass.take(m.wide);
  a.v = pass.take(m.wide);
  a.qn = m.normalises() ? pass.take(m.wide) : a.q;
  a.kn = m.normalises() ? pass.take(m.wide) : a.k;
  const bool mamba2 = m.kind == LayerKind::kMamba2, dplr = m.kind == LayerKind::kDplr;
  a.g = pass.take(mamba2 ? m.H : m.wide);
  if (mamba2) a.delta = pass.take(m.H);
  if (mamba2 || dplr) a.written = pass.take(m.wide);
  if (!mamba2 && !dplr) a.beta = pass.take(m.H);
  a.o = pass.take(m.wide);
  a.normed = pass.take(m.wide);
  if (pass.training()) a.chunk_states = ctx.scratch.take<float>(chunks_of(pass.slices) * m.H * m.d * m.d);

  rms_norm_forward(ctx, rows, m.D, x, m.D, w.vector(p.input_norm), m.eps, a.h, m.D);
  multiply(pass, first, a.low);
  multiply(pass, second, a.low);
  convolve(pass, m, layer, a);
  if (m.normalises()) {
    l2norm_forward(ctx, rows, m.H, m.d, m.q_scale(), a.q, a.qn);
    l2norm_forward(ctx, rows, m.H, m.d, 1.0f, a.k, a.kn);
  }
  recur(pass, m, layer, a);
  gated_rms_norm_forward(ctx, rows, m.H, m.d, m.gate, a.o, a.gate, w.vector(p.o_norm), m.eps, a.normed);
  const Product out{p.o, a.normed, m.wide, y, m.D};
  multiply(pass, {&out, 1}, a.low);
}

void linear_half_backward(const Pass& pass, int64_t layer, const float* x, const LinearActivations& a,
                          const float* dy, float* dx, float* gradient) {
  const Dims m(pass.config, layer);
  const LayerParams& p = pass.layout().layer(layer);
  const Weights& w = pass.weights;
  Context& ctx = pass.ctx;
  const int64_t rows = pass.rows;
  const auto grad = [&](int tensor) { return grad_of(pass, tensor, gradient); };
  const auto take_if = [&](bool wanted, int64_t width) { return wanted ? pass.take(width) : nullptr; };

  Scratch::Mark mark(ctx.scratch);
  float* dnormed = pass.take(m.wide);
  float* dgate = take_if(m.gated(), m.wide);
  float* d_o = pass.take(m.wide);
  float* dqkv = pass.take(3 * m.wide);
  const Gradients d{pass.take(m.wide),          pass.take(m.wide),      pass.take(m.wide), take_if(p.f_a >= 0, m.wide),
                    take_if(p.e_a >= 0, m.wide), take_if(p.a >= 0, m.H), take_if(p.b >= 0, m.H)};
  float* df_low = take_if(p.f_a >= 0, m.d);
  float* dgate_low = take_if(m.gated(), m.d);
  float* de_low = take_if(p.e_a >= 0, m.d);
  float* dh = pass.take(m.D);

  const ProductGrad out{p.o, dy, m.D, a.normed, m.wide, dnormed, m.wide};
  multiply_backward(pass, {&out, 1}, a.low, gradient);
  gated_rms_norm_backward(ctx, rows, m.H, m.d, m.gate, a.o, a.gate, w.vector(p.o_norm), m.eps, dnormed, d_o, dgate,
                          grad(p.o_norm));
  recur_backward(pass, m, layer, a, d_o, d, gradient);
  if (m.normalises()) {
    l2norm_backward(ctx, rows, m.H, m.d, m.q_scale(), a.q, d.q, d.q);
    l2norm_backward(ctx, rows, m.H, m.d, 1.0f, a.k, d.k, d.k);
  }
  const float* const douts[3] = {d.q, d.k, d.v};
  for (int64_t part = 0; part < 3; ++part) {
    const float* in = a.qkv + part * m.wide;
    float* din = dqkv + part * m.wide;
    if (p.conv < 0) {
      silu_backward(ctx, rows, m.wide, in, 3 * m.wide, douts[part], m.wide, din, 3 * m.wide);
    } else {
      short_conv_backward(ctx, m.wide, in, 3 * m.wide, w.vector(p.conv) + part * m.wide * kConvWidth, pass.slices,
                          douts[part], m.wide, din, 3 * m.wide, grad(p.conv) + part * m.wide * kConvWidth);
    }
  }
  std::vector<ProductGrad> second, first = {{p.q, dqkv, 3 * m.wide, a.h, m.D, dh, m.D},
                                            {p.k, dqkv + m.wide, 3 * m.wide, a.h, m.D, dh, m.D},
                                            {p.v, dqkv + 2 * m.wide, 3 * m.wide, a.h, m.D, dh, m.D}};
  const auto low_rank = [&](int down, int up, const float* dout, const float* low, float* dlow) {
    if (down < 0) return;
    second.push_back({up, dout, m.wide, low, m.d, dlow, m.d});
    first.push_back({down, dlow, m.d, a.h, m.D, dh, m.D});
  };
  low_rank(p.f_a, p.f_b, d.f, a.f_low, df_low);
  low_rank(p.g_a, p.g_b, dgate, a.gate_low, dgate_low);
  low_rank(p.e_a, p.e_b, d.e, a.e_low, de_low);
  if (p.a >= 0) first.push_back({p.a, d.a, m.H, a.h, m.D, dh, m.D});
  if (p.b >= 0) first.push_back({p.b, d.b, m.H, a.h, m.D, dh, m.D});
  multiply_backward(pass, second, a.low, gradient);
  multiply_backward(pass, first, a.low, gradient);
  rms_norm_backward(ctx, rows, m.D, x, m.D, w.vector(p.input_norm), m.eps, dh, m.D, dx, m.D, true,
                    grad(p.input_norm));
}

}  // namespace perigee::policy
