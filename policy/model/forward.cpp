#include "policy/model/forward.h"

#include "kernels/dplr/dplr.h"
#include "kernels/norm/norm.h"
#include "kernels/ssd/ssd.h"
#include "kernels/vocab/vocab.h"
#include "policy/model/layers.h"

namespace perigee::policy {

using namespace kernels;

namespace {

// Floats of one layer's state, or of a page of it.
int64_t mixer_floats(const ModelConfig& c, LayerKind kind) {
  const KdaShape shape{c.linear_heads, c.linear_head_dim, c.linear_head_dim};
  switch (kind) {
    case LayerKind::kKda:
    case LayerKind::kGdn: return kda_state_floats(shape);
    case LayerKind::kMamba2: return ssd_state_floats(shape);
    case LayerKind::kDplr: return dplr_state_floats(shape);
    case LayerKind::kMla:
    case LayerKind::kMlaRope: return kLatentPage * c.latent_width();
    case LayerKind::kAttention: return kLatentPage * c.kv_width();
  }
  PERIGEE_CHECK(false, "kind {}", static_cast<int>(kind));
  return 0;
}

}  // namespace

StateLayout::StateLayout(const ModelConfig& c)
    : StateLayout(c, [&c](LayerKind kind) { return 4 * mixer_floats(c, kind); }, 4) {}

StateLayout::StateLayout(const ModelConfig& c, const std::function<int64_t(LayerKind)>& mixer_bytes, int64_t activation_bytes) {
  const auto aligned = [](int64_t bytes) { return (bytes + 255) / 256 * 256; };
  for (int64_t i = 0; i < c.num_layers; ++i) {
    const bool linear = is_linear(c.kind(i)), conv = linear && c.conv_size > 0;
    const int64_t bytes = aligned(mixer_bytes(c.kind(i)));
    state_offset_.push_back(linear ? recurrent_bytes_ : -1);
    if (linear) recurrent_bytes_ += bytes;
    conv_offset_.push_back(conv ? recurrent_bytes_ : -1);
    if (conv) recurrent_bytes_ += aligned(3 * c.linear_width() * (c.conv_size - 1) * activation_bytes);
    page_offset_.push_back(linear ? -1 : block_bytes_);
    if (!linear) block_bytes_ += bytes;
  }
}

int64_t StateLayout::blocks_for(int64_t tokens) const {
  return block_bytes_ == 0 ? 0 : (tokens + kLatentPage - 1) / kLatentPage;
}

void forward(Context& ctx, const Weights& weights, const StateLayout& state, std::span<const int32_t> tokens,
             std::span<const SequenceSlice> sequences, float* hidden, const LayerProbe& probe) {
  const ModelConfig& c = weights.layout->config();
  const int64_t rows = static_cast<int64_t>(tokens.size()), D = c.hidden_size;
  if (rows == 0) return;
  Scratch::Mark mark(ctx.scratch);
  auto* slices = ctx.scratch.take<Slice>(static_cast<int64_t>(sequences.size()));
  int64_t covered = 0;
  for (size_t i = 0; i < sequences.size(); ++i) {
    slices[i] = sequences[i].slice;
    covered += slices[i].count;
  }
  PERIGEE_CHECK(covered == rows, "slices cover {} of {} rows", covered, rows);
  const Pass pass{ctx, weights, c, rows, &state, sequences, {slices, sequences.size()}};

  float* x = pass.take(D);
  float* y = pass.take(D);
  embedding_forward(ctx, rows, D, c.vocab_size, weights.table(weights.layout->embed()),
                    weights.layout->dtype(), tokens.data(), x);
  for (int64_t layer = 0; layer < c.num_layers; ++layer) {
    {
      Scratch::Mark half(ctx.scratch);
      MixerActivations a;
      mixer_half_forward(pass, layer, x, a, y);
      add_inplace(ctx, rows * D, y, x);
    }
    Scratch::Mark half(ctx.scratch);
    FeedForwardActivations a;
    feed_forward_forward(pass, layer, x, a, y);
    add_inplace(ctx, rows * D, y, x);
    if (probe) probe(layer, x, a.chosen);
  }
  rms_norm_forward(ctx, rows, D, x, D, weights.vector(weights.layout->final_norm()), c.rms_norm_eps, hidden,
                   D);
}

}  // namespace perigee::policy
