// The KDA half of a layer: out = o_proj( RMSNorm(KDA(...)) * sigmoid(g_b g_a h) ).
#include <array>
#include <cstring>

#include "kernels/conv/short_conv.h"
#include "kernels/norm/norm.h"
#include "policy/model/adapter_products.h"

namespace perigee::policy {
namespace {

using namespace kernels;

struct Dims {
  explicit Dims(const ModelConfig& c)
      : D(c.hidden_size),
        H(c.kda_heads),
        d(c.kda_head_dim),
        wide(H * d),
        shape{H, d, d},
        eps(c.rms_norm_eps) {}
  int64_t D, H, d, wide;
  KdaShape shape;
  float eps;
  float q_scale() const { return 1.0f / __builtin_sqrtf(static_cast<float>(d)); }
};

int64_t chunks_of(std::span<const Slice> slices) {
  int64_t sum = 0;
  for (const Slice& s : slices) sum += (s.count + kKdaChunk - 1) / kKdaChunk;
  return sum;
}

// Where each slice's KDA state and convolution window lie: in the sequences, or zeroed temporaries.
void bind_state(const Pass& pass, const Dims& m, int64_t layer, KdaSlice* kda, ConvSlice* conv) {
  const size_t n = pass.slices.size();
  float *states = nullptr, *windows = nullptr;
  const int64_t state_floats = kda_state_floats(m.shape), window_floats = 3 * m.wide * (kConvWidth - 1);
  if (pass.training()) {
    states = pass.ctx.scratch.take<float>(static_cast<int64_t>(n) * state_floats);
    windows = pass.ctx.scratch.take<float>(static_cast<int64_t>(n) * window_floats);
    std::memset(states, 0, n * static_cast<size_t>(state_floats) * sizeof(float));
    std::memset(windows, 0, n * static_cast<size_t>(window_floats) * sizeof(float));
  }
  for (size_t i = 0; i < n; ++i) {
    float* state = pass.training() ? states + static_cast<int64_t>(i) * state_floats
                                   : reinterpret_cast<float*>(pass.sequences[i].recurrent +
                                                             pass.state->kda_offset(layer));
    float* window = pass.training() ? windows + static_cast<int64_t>(i) * window_floats
                                    : reinterpret_cast<float*>(pass.sequences[i].recurrent +
                                                              pass.state->conv_offset(layer));
    kda[i] = {pass.slices[i], state};
    conv[i] = {pass.slices[i], window, 3 * m.wide};
  }
}

}  // namespace

void kda_half_forward(const Pass& pass, int64_t layer, const float* x, KdaActivations& a, float* y) {
  const Dims m(pass.config);
  const LayerParams& p = pass.layout().layer(layer);
  const Weights& w = pass.weights;
  Context& ctx = pass.ctx;
  const int64_t rows = pass.rows, n = static_cast<int64_t>(pass.slices.size());

  a.h = pass.take(m.D);
  a.qkv = pass.take(3 * m.wide);
  a.f_low = pass.take(m.d);
  a.b = pass.take(m.H);
  a.gate_low = pass.take(m.d);
  a.f = pass.take(m.wide);
  a.gate = pass.take(m.wide);
  a.q = pass.take(m.wide);
  a.k = pass.take(m.wide);
  a.v = pass.take(m.wide);
  a.qn = pass.take(m.wide);
  a.kn = pass.take(m.wide);
  a.g = pass.take(m.wide);
  a.beta = pass.take(m.H);
  a.o = pass.take(m.wide);
  a.normed = pass.take(m.wide);
  a.low.clear();
  if (pass.training()) a.chunk_states = ctx.scratch.take<float>(chunks_of(pass.slices) * m.H * m.d * m.d);

  rms_norm_forward(ctx, rows, m.D, x, m.D, w.vector(p.input_norm), m.eps, a.h, m.D);
  const std::array<MatmulTask, 6> project = {{
      {w.matrix(p.q), a.h, m.D, rows, a.qkv, 3 * m.wide},
      {w.matrix(p.k), a.h, m.D, rows, a.qkv + m.wide, 3 * m.wide},
      {w.matrix(p.v), a.h, m.D, rows, a.qkv + 2 * m.wide, 3 * m.wide},
      {w.matrix(p.f_a), a.h, m.D, rows, a.f_low, m.d},
      {w.matrix(p.g_a), a.h, m.D, rows, a.gate_low, m.d},
      {w.matrix(p.b), a.h, m.D, rows, a.b, m.H},
  }};
  matmul(ctx, project);
  add_adapters(pass,
               {{p.q, a.h, m.D, a.qkv, 3 * m.wide},
                 {p.k, a.h, m.D, a.qkv + m.wide, 3 * m.wide},
                 {p.v, a.h, m.D, a.qkv + 2 * m.wide, 3 * m.wide},
                 {p.f_a, a.h, m.D, a.f_low, m.d},
                 {p.g_a, a.h, m.D, a.gate_low, m.d},
                 {p.b, a.h, m.D, a.b, m.H}},
               a.low);
  const std::array<MatmulTask, 2> widen = {{
      {w.matrix(p.f_b), a.f_low, m.d, rows, a.f, m.wide},
      {w.matrix(p.g_b), a.gate_low, m.d, rows, a.gate, m.wide},
  }};
  matmul(ctx, widen);
  add_adapters(pass, {{p.f_b, a.f_low, m.d, a.f, m.wide}, {p.g_b, a.gate_low, m.d, a.gate, m.wide}}, a.low);

  {
    Scratch::Mark mark(ctx.scratch);
    auto* kda = ctx.scratch.take<KdaSlice>(n);
    auto* conv = ctx.scratch.take<ConvSlice>(n);
    bind_state(pass, m, layer, kda, conv);
    const float* conv_w = w.vector(p.conv);
    float* const outputs[3] = {a.q, a.k, a.v};
    for (int64_t part = 0; part < 3; ++part) {
      short_conv_forward(ctx, m.wide, a.qkv + part * m.wide, 3 * m.wide, conv_w + part * m.wide * kConvWidth,
                         {conv, static_cast<size_t>(n)}, outputs[part], m.wide);
      for (int64_t i = 0; i < n; ++i) conv[i].window += m.wide;  // the window of the next part's channels
    }
    l2norm_forward(ctx, rows, m.H, m.d, m.q_scale(), a.q, a.qn);
    l2norm_forward(ctx, rows, m.H, m.d, 1.0f, a.k, a.kn);
    kda_gate_forward(ctx, m.shape, rows, a.f, a.b, w.vector(p.a_log), w.vector(p.dt_bias), a.g, a.beta);
    kda_forward(ctx, m.shape, a.qn, a.kn, a.v, a.g, a.beta, {kda, static_cast<size_t>(n)}, a.o, a.chunk_states);
  }
  gated_rms_norm_forward(ctx, rows, m.H, m.d, a.o, a.gate, w.vector(p.o_norm), m.eps, a.normed);
  const MatmulTask out{w.matrix(p.o), a.normed, m.wide, rows, y, m.D};
  matmul(ctx, {&out, 1});
  add_adapters(pass, {{p.o, a.normed, m.wide, y, m.D}}, a.low);
}

void kda_half_backward(const Pass& pass, int64_t layer, const float* x, const KdaActivations& a,
                       const float* dy, float* dx, float* gradient) {
  const Dims m(pass.config);
  const LayerParams& p = pass.layout().layer(layer);
  const Weights& w = pass.weights;
  Context& ctx = pass.ctx;
  const int64_t rows = pass.rows;
  const auto grad = [&](int tensor) { return grad_of(pass, tensor, gradient); };

  Scratch::Mark mark(ctx.scratch);
  float* dnormed = pass.take(m.wide);
  float* dgate = pass.take(m.wide);
  float* d_o = pass.take(m.wide);
  float* dqkv = pass.take(3 * m.wide);
  float* dq = pass.take(m.wide);
  float* dk = pass.take(m.wide);
  float* dv = pass.take(m.wide);
  float* dg = pass.take(m.wide);
  float* dbeta = pass.take(m.H);
  float* df_low = pass.take(m.d);
  float* dgate_low = pass.take(m.d);
  float* dh = pass.take(m.D);

  const MatmulGradInputTask out_in{w.matrix(p.o), dy, m.D, rows, dnormed, m.wide, false};
  matmul_grad_input(ctx, {&out_in, 1});
  adapters_backward(pass, {{p.o, dy, m.D, a.normed, m.wide, dnormed, m.wide}}, a.low, gradient);
  gated_rms_norm_backward(ctx, rows, m.H, m.d, a.o, a.gate, w.vector(p.o_norm), m.eps, dnormed, d_o, dgate,
                          grad(p.o_norm));
  kda_backward(ctx, m.shape, a.qn, a.kn, a.v, a.g, a.beta, a.chunk_states, pass.slices, d_o, dq, dk, dv, dg,
               dbeta);
  // From here dg holds df and dbeta holds db.
  kda_gate_backward(ctx, m.shape, rows, a.f, a.b, w.vector(p.a_log), w.vector(p.dt_bias), dg, dbeta, dg,
                    dbeta, grad(p.a_log), grad(p.dt_bias));
  l2norm_backward(ctx, rows, m.H, m.d, m.q_scale(), a.q, dq, dq);
  l2norm_backward(ctx, rows, m.H, m.d, 1.0f, a.k, dk, dk);
  const float* const douts[3] = {dq, dk, dv};
  for (int64_t part = 0; part < 3; ++part) {
    short_conv_backward(ctx, m.wide, a.qkv + part * m.wide, 3 * m.wide,
                        w.vector(p.conv) + part * m.wide * kConvWidth, pass.slices, douts[part], m.wide,
                        dqkv + part * m.wide, 3 * m.wide, grad(p.conv) + part * m.wide * kConvWidth);
  }
  const std::array<MatmulGradInputTask, 2> narrow = {{
      {w.matrix(p.f_b), dg, m.wide, rows, df_low, m.d, false},
      {w.matrix(p.g_b), dgate, m.wide, rows, dgate_low, m.d, false},
  }};
  matmul_grad_input(ctx, narrow);
  adapters_backward(pass,
                    {{p.f_b, dg, m.wide, a.f_low, m.d, df_low, m.d}, {p.g_b, dgate, m.wide, a.gate_low, m.d, dgate_low, m.d}},
                    a.low, gradient);
  if (!pass.frozen()) {
    const std::array<MatmulGradWeightTask, 9> weights = {{
        {dy, m.D, a.normed, m.wide, rows, grad(p.o), m.D, m.wide},
        {dg, m.wide, a.f_low, m.d, rows, grad(p.f_b), m.wide, m.d},
        {dgate, m.wide, a.gate_low, m.d, rows, grad(p.g_b), m.wide, m.d},
        {dqkv, 3 * m.wide, a.h, m.D, rows, grad(p.q), m.wide, m.D},
        {dqkv + m.wide, 3 * m.wide, a.h, m.D, rows, grad(p.k), m.wide, m.D},
        {dqkv + 2 * m.wide, 3 * m.wide, a.h, m.D, rows, grad(p.v), m.wide, m.D},
        {df_low, m.d, a.h, m.D, rows, grad(p.f_a), m.d, m.D},
        {dgate_low, m.d, a.h, m.D, rows, grad(p.g_a), m.d, m.D},
        {dbeta, m.H, a.h, m.D, rows, grad(p.b), m.H, m.D},
    }};
    matmul_grad_weight(ctx, weights);
  }
  // Six products end in dh: one after the other, in this order.
  const std::array<MatmulGradInputTask, 6> project = {{
      {w.matrix(p.q), dqkv, 3 * m.wide, rows, dh, m.D, false},
      {w.matrix(p.k), dqkv + m.wide, 3 * m.wide, rows, dh, m.D, true},
      {w.matrix(p.v), dqkv + 2 * m.wide, 3 * m.wide, rows, dh, m.D, true},
      {w.matrix(p.f_a), df_low, m.d, rows, dh, m.D, true},
      {w.matrix(p.g_a), dgate_low, m.d, rows, dh, m.D, true},
      {w.matrix(p.b), dbeta, m.H, rows, dh, m.D, true},
  }};
  const std::array<ProductGrad, 6> adapted = {{
      {p.q, dqkv, 3 * m.wide, a.h, m.D, dh, m.D},
      {p.k, dqkv + m.wide, 3 * m.wide, a.h, m.D, dh, m.D},
      {p.v, dqkv + 2 * m.wide, 3 * m.wide, a.h, m.D, dh, m.D},
      {p.f_a, df_low, m.d, a.h, m.D, dh, m.D},
      {p.g_a, dgate_low, m.d, a.h, m.D, dh, m.D},
      {p.b, dbeta, m.H, a.h, m.D, dh, m.D},
  }};
  for (size_t i = 0; i < project.size(); ++i) {
    matmul_grad_input(ctx, {&project[i], 1});
    adapters_backward(pass, {adapted[i]}, a.low, gradient);
  }
  rms_norm_backward(ctx, rows, m.D, x, m.D, w.vector(p.input_norm), m.eps, dh, m.D, dx, m.D, true,
                    grad(p.input_norm));
}

}  // namespace perigee::policy
