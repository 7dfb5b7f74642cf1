#include "policy/model/forward.h"

#include "kernels/norm/norm.h"
#include "kernels/vocab/vocab.h"
#include "policy/model/layers.h"

namespace perigee::policy {

using namespace kernels;

StateLayout::StateLayout(const ModelConfig& c)
    : StateLayout(c, kda_state_floats({c.kda_heads, c.kda_head_dim, c.kda_head_dim}) * 4,
                  kLatentPage * c.latent_width() * 4, 4) {}

StateLayout::StateLayout(const ModelConfig& c, int64_t kda_bytes, int64_t page_bytes, int64_t activation_bytes) {
  const auto aligned = [](int64_t bytes) { return (bytes + 255) / 256 * 256; };
  for (int64_t i = 0; i < c.num_layers; ++i) {
    const bool kda = c.is_kda(i);
    kda_offset_.push_back(kda ? recurrent_bytes_ : -1);
    if (kda) recurrent_bytes_ += aligned(kda_bytes);
    conv_offset_.push_back(kda ? recurrent_bytes_ : -1);
    if (kda) recurrent_bytes_ += aligned(3 * c.kda_width() * (c.conv_size - 1) * activation_bytes);
    page_offset_.push_back(kda ? -1 : block_bytes_);
    if (!kda) block_bytes_ += aligned(page_bytes);
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
      if (c.is_kda(layer)) {
        KdaActivations a;
        kda_half_forward(pass, layer, x, a, y);
      } else {
        MlaActivations a;
        mla_half_forward(pass, layer, x, a, y);
      }
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
