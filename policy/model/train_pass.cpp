#include <cstring>
#include <optional>

#include "kernels/norm/norm.h"
#include "kernels/vocab/vocab.h"
#include "policy/model/forward.h"
#include "policy/model/layers.h"

namespace perigee::policy {

using namespace kernels;

namespace {
struct LayerActivations {
  const float *mixer_input = nullptr, *feed_forward_input = nullptr;  // [rows, D]
  MixerActivations mixer;
  FeedForwardActivations feed_forward;
};
}  // namespace

struct TrainPass::Activations {
  int64_t rows = 0;
  std::vector<int32_t> tokens;
  std::vector<Slice> slices;
  std::vector<LayerActivations> layers;
  const float* last = nullptr;  // [rows, D] the residual stream after the last layer
};

TrainPass::TrainPass(Context& ctx, const Weights& weights, bool recompute)
    : ctx_(ctx),
      mark_(ctx.scratch),
      weights_(weights),
      recompute_(recompute),
      acts_(std::make_unique<Activations>()) {}

TrainPass::~TrainPass() = default;

const float* TrainPass::forward(std::span<const int32_t> tokens, std::span<const int64_t> lengths,
                                const LayerProbe& probe) {
  const ModelConfig& c = weights_.layout->config();
  const int64_t rows = static_cast<int64_t>(tokens.size()), D = c.hidden_size, L = c.num_layers;
  Activations& s = *acts_;
  s.rows = rows;
  s.tokens.assign(tokens.begin(), tokens.end());
  s.layers.assign(static_cast<size_t>(L), {});
  int64_t begin = 0;
  for (int64_t n : lengths) {
    s.slices.push_back({begin, n, 0});
    begin += n;
  }
  PERIGEE_CHECK(begin == rows, "lengths {} rows {}", begin, rows);
  const Pass pass{ctx_, weights_, c, rows, nullptr, {}, s.slices};

  float* hidden = pass.take(D);
  // Inputs of every half, and what leaves the last one.
  float* stream = ctx_.scratch.take<float>(rows * D * (2 * L + 1));
  float* x = stream;
  embedding_forward(ctx_, rows, D, c.vocab_size, weights_.table(weights_.layout->embed()),
                    weights_.layout->dtype(), s.tokens.data(), x);
  float* y = pass.take(D);
  const auto next = [&] {
    float* sum = x + rows * D;
    std::memcpy(sum, x, static_cast<size_t>(rows * D) * sizeof(float));
    add_inplace(ctx_, rows * D, y, sum);
    x = sum;
  };
  for (int64_t layer = 0; layer < L; ++layer) {
    LayerActivations& a = s.layers[static_cast<size_t>(layer)];
    a.mixer_input = x;
    {
      std::optional<Scratch::Mark> half;
      if (recompute_) half.emplace(ctx_.scratch);
      mixer_half_forward(pass, layer, x, a.mixer, y);
    }
    next();
    a.feed_forward_input = x;
    std::optional<Scratch::Mark> half;
    if (recompute_) half.emplace(ctx_.scratch);
    feed_forward_forward(pass, layer, x, a.feed_forward, y);
    if (c.is_moe(layer)) {
      for (int64_t e = 0; e < c.num_experts; ++e)
        expert_load_.push_back(a.feed_forward.offsets[e + 1] - a.feed_forward.offsets[e]);
    }
    next();
    if (probe) probe(layer, x, a.feed_forward.chosen);
  }
  s.last = x;
  rms_norm_forward(ctx_, rows, D, x, D, weights_.vector(weights_.layout->final_norm()), c.rms_norm_eps,
                   hidden, D);
  return hidden;
}

void TrainPass::backward(const float* dhidden, float* gradient) {
  const ParamLayout& layout = *weights_.layout;
  const ModelConfig& c = layout.config();
  Activations& s = *acts_;
  const int64_t rows = s.rows, D = c.hidden_size;
  PERIGEE_CHECK(s.last != nullptr);
  const Pass pass{ctx_, weights_, c, rows, nullptr, {}, s.slices};
  Scratch::Mark mark(ctx_.scratch);
  float* dx = pass.take(D);  // gradient of the residual stream
  float* dy = pass.take(D);  // the same, frozen while a half adds its own part to dx
  float* unused = pass.take(D);
  rms_norm_backward(ctx_, rows, D, s.last, D, weights_.vector(layout.final_norm()), c.rms_norm_eps, dhidden,
                    D, dx, D, false, grad_of(pass, layout.final_norm(), gradient));
  for (int64_t layer = c.num_layers - 1; layer >= 0; --layer) {
    LayerActivations& a = s.layers[static_cast<size_t>(layer)];
    {
      Scratch::Mark half(ctx_.scratch);
      if (recompute_) feed_forward_forward(pass, layer, a.feed_forward_input, a.feed_forward, unused);
      std::memcpy(dy, dx, static_cast<size_t>(rows * D) * sizeof(float));
      feed_forward_backward(pass, layer, a.feed_forward_input, a.feed_forward, dy, dx, gradient);
    }
    Scratch::Mark half(ctx_.scratch);
    std::memcpy(dy, dx, static_cast<size_t>(rows * D) * sizeof(float));
    if (recompute_) mixer_half_forward(pass, layer, a.mixer_input, a.mixer, unused);
    mixer_half_backward(pass, layer, a.mixer_input, a.mixer, dy, dx, gradient);
  }
  if (!pass.frozen())
    embedding_backward(ctx_, rows, D, c.vocab_size, s.tokens.data(), dx,
                       grad_of(pass, layout.embed(), gradient));
  s.last = nullptr;
}

}  // namespace perigee::policy
