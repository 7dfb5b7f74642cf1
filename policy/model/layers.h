// The halves of a layer, forward and backward, as forward.cpp and train_pass.cpp string them together.
// Private to policy/model. Each half computes y = f(norm(x)); the caller adds y to the residual stream.
//
// gradient is a flat arena of what is trained: the model, or the adapters beside a frozen one (pass.frozen()).
// Activation structs hold what the backward reads; their memory is ctx.scratch, released by whoever holds the
// mark.
#pragma once
#include <span>

#include "kernels/kda/kda.h"
#include "kernels/mla/mla.h"
#include "kernels/moe/moe.h"
#include "kernels/gemm/gemm.h"
#include "policy/model/forward.h"
#include "policy/model/low_rows.h"

namespace perigee::policy {

// What every layer of one pass shares.
struct Pass {
  kernels::Context& ctx;
  const Weights& weights;
  const ModelConfig& config;
  int64_t rows;
  // Inference: the sequences' memory. Training (state == null): every slice starts at position 0 and its
  // memory is temporary.
  const StateLayout* state;
  std::span<const SequenceSlice> sequences;  // inference
  std::span<const kernels::Slice> slices;    // both

  bool training() const { return state == nullptr; }
  // Gradients are of the adapters alone.
  bool frozen() const { return weights.adapter != nullptr; }
  const ParamLayout& layout() const { return *weights.layout; }
  float* take(int64_t width) const { return ctx.scratch.take<float>(rows * width); }
};

// Of the four linear mixers; what one does not have stays null.
struct LinearActivations {
  float* h = nullptr;                              // [rows, D] normalised input
  float* qkv = nullptr;                            // [rows, 3Hd] before the convolution
  float *q = nullptr, *k = nullptr, *v = nullptr;  // [rows, Hd] after it
  float *qn = nullptr, *kn = nullptr;              // [rows, Hd] normalised (mamba2: q and k themselves)
  float *f_low = nullptr, *f = nullptr;            // kda, dplr: [rows, d], [rows, Hd]
  float *e_low = nullptr, *e = nullptr;            // dplr: likewise
  float *a = nullptr, *b = nullptr;                // gdn: a; all but dplr: b [rows, H]
  float* g = nullptr;                              // [rows, Hd]; mamba2: [rows, H]
  float* beta = nullptr;                           // kda, gdn: [rows, H]
  float* delta = nullptr;                          // mamba2: [rows, H]
  float* written = nullptr;                        // dplr: eta k; mamba2: delta v [rows, Hd]
  float *gate_low = nullptr, *gate = nullptr;      // [rows, d], [rows, Hd]
  float *o = nullptr, *normed = nullptr;           // [rows, Hd]
  float* chunk_states = nullptr;                   // training: S at every chunk's start
  LowRows<float> low;
};
void linear_half_forward(const Pass& pass, int64_t layer, const float* x, LinearActivations& a, float* y);
// dy [rows, D]; dx accumulated.
void linear_half_backward(const Pass& pass, int64_t layer, const float* x, const LinearActivations& a,
                          const float* dy, float* dx, float* gradient);

struct MlaActivations {
  float* h = nullptr;                   // [rows, D]
  float* q = nullptr;                   // [rows, H * (nope + rope)]
  float* kv = nullptr;                  // [rows, latent + rope] before the norm
  float* c = nullptr;                   // [rows, latent + rope] what the heads attend to
  float* qa = nullptr;                  // [rows, H * (latent + rope)] absorbed query
  float *ol = nullptr, *lse = nullptr;  // [rows, H * latent], [rows, H]
  float* o = nullptr;                   // [rows, H * v]
  LowRows<float> low;
};
void mla_half_forward(const Pass& pass, int64_t layer, const float* x, MlaActivations& a, float* y);
void mla_half_backward(const Pass& pass, int64_t layer, const float* x, const MlaActivations& a,
                       const float* dy, float* dx, float* gradient);

struct AttentionActivations {
  float* h = nullptr;    // [rows, D]
  float* q = nullptr;    // [rows, heads * head_dim] rotated
  float* kv = nullptr;   // [rows, 2 * kv_heads * head_dim] keys (rotated), then values
  float* o = nullptr;    // [rows, heads * head_dim]
  float* lse = nullptr;  // [rows, heads]; training
  LowRows<float> low;
};
void attention_half_forward(const Pass& pass, int64_t layer, const float* x, AttentionActivations& a, float* y);
void attention_half_backward(const Pass& pass, int64_t layer, const float* x, const AttentionActivations& a,
                             const float* dy, float* dx, float* gradient);

// The mixer of a layer, whichever it is.
struct MixerActivations {
  LinearActivations linear;
  MlaActivations mla;
  AttentionActivations attention;
};
void mixer_half_forward(const Pass& pass, int64_t layer, const float* x, MixerActivations& a, float* y);
void mixer_half_backward(const Pass& pass, int64_t layer, const float* x, const MixerActivations& a, const float* dy,
                         float* dx, float* gradient);

struct FeedForwardActivations {
  float* h = nullptr;                          // [rows, D]
  float *gate_up = nullptr, *inner = nullptr;  // dense or shared: [rows, 2I], [rows, I]
  // mixture of experts; slots = rows * top_k
  float *logits = nullptr, *route_weights = nullptr;  // [rows, E], [rows, top_k]
  int32_t *chosen = nullptr, *source = nullptr, *slot = nullptr;
  int64_t* offsets = nullptr;       // [E + 1]
  float* dispatched = nullptr;      // [slots, D]
  float* expert_gate_up = nullptr;  // [slots, 2I]
  float* expert_inner = nullptr;    // [slots, I]
  float* expert_out = nullptr;      // [slots, D]
  LowRows<float> low;
  ExpertLow<float> expert_gate_up_low = {}, expert_down_low = {};
};
void feed_forward_forward(const Pass& pass, int64_t layer, const float* x, FeedForwardActivations& a,
                          float* y);
void feed_forward_backward(const Pass& pass, int64_t layer, const float* x, const FeedForwardActivations& a,
                           const float* dy, float* dx, float* gradient);

// Flat gradient of a tensor of the model. Of a frozen model (vectors only): memory that nobody reads.
inline float* grad_of(const Pass& pass, int tensor, float* gradient) {
  if (pass.frozen()) return pass.ctx.scratch.take<float>(pass.layout().tensor(tensor).elements);
  return gradient + pass.layout().tensor(tensor).element_offset;
}

}  // namespace perigee::policy
