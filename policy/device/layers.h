// The halves of a layer on a GPU, forward and backward. Private to policy/device; the equations and names are those of
// policy/model/layers.h, and T, the type of activations, is float or bf16.
//
// A half computes f(norm(in)) and adds it to the residual stream x, which is float32 for both types: the last product of
// a half is finished and then added once, as on the CPU. x may be in.
#pragma once
#include <span>

#include "kernels/attention/shape.h"
#include "kernels/device/batch.h"
#include "kernels/device/device.h"
#include "kernels/mla/mla_expanded_device.h"
#include "kernels/moe/row_device.h"
#include "kernels/norm/norm_device.h"
#include "policy/model/forward.h"
#include "policy/model/low_rows.h"

namespace perigee::policy::device {

using kernels::Device;
using kernels::DeviceBatch;

// Of one activation: bfloat16 with weights in tiles, else float32.
inline int64_t activation_bytes(const ArenaLayout& layout) { return layout.matrices() == MatrixForm::kTiles ? 2 : 4; }

// Prompts whose keys are written out (numerics `fast`, kernels/mla/mla_expanded_device.h).
struct Expanded {
  std::span<const kernels::ExpandedRound> rounds;  // host
  const kernels::ExpandedPiece* pieces = nullptr;  // device
  bool merges = false;
  DeviceBatch rest;  // the batch with what is left for the absorbed form; no slices: nothing is
};
// Rows of the arena, for a model of this shape.
int64_t expanded_arena_rows(const ModelConfig& config);

// What every layer of one pass shares. Weights hold device memory.
struct Pass {
  Device& device;
  const Weights& weights;
  const ModelConfig& config;
  DeviceBatch batch;
  const StateLayout* state;      // inference: where a layer's part of a sequence's memory lies; training: null
  const int32_t* active = nullptr;  // device: rows from *active on are padding of a decoding batch; null: none are
  const Expanded* expanded = nullptr;  // inference; null: everything is exact

  int64_t rows() const { return batch.rows; }
  bool training() const { return batch.training(); }
  const LayerParams& params(int64_t layer) const { return weights.layout->layer(layer); }
  // Gradients are of the adapters alone: flat is an arena of theirs, not of the model.
  bool frozen() const { return weights.adapter != nullptr; }
  // Of a tensor of the model; of a frozen one (vectors only) memory that nobody reads.
  float* gradient_of(int tensor, float* flat) const {
    const ParamSpec& t = weights.layout->tensor(tensor);
    return frozen() ? device.scratch.take<float>(t.elements) : flat + t.element_offset;
  }
  float* gradient_or_null(int tensor, float* flat) const { return frozen() ? nullptr : gradient_of(tensor, flat); }
  template <class T>
  T* take(int64_t width) const {
    return device.scratch.take<T>(rows() * width);
  }
};

// How a mixer's half comes by its norm: it makes it from `in` (neither), has it in h, or makes the residual stream x and
// the norm from what the experts of the layer before left (kernels/moe/row_device.h).
template <class T>
struct Before {
  T* h = nullptr;
  const kernels::RowCombination* combination = nullptr;
};

// Of the four linear mixers (docs/mixers.md); what one does not have stays null.
template <class T>
struct LinearActivations {
  T* h = nullptr;                                      // [rows, D] normalised input
  T* qkv = nullptr;                                    // [rows, 3Hd] before the convolution
  T *q = nullptr, *k = nullptr, *v = nullptr;          // [rows, Hd] after it, q and k normalised (not of mamba2)
  T *f_low = nullptr, *e_low = nullptr, *gate_low = nullptr;  // [rows, d]
  float *f = nullptr, *e = nullptr;                    // [rows, Hd]
  float *a = nullptr, *b = nullptr;                    // [rows, H]
  float* g = nullptr;                                  // [rows, Hd]; mamba2: [rows, H]
  float *beta = nullptr, *delta = nullptr;             // [rows, H]
  T* written = nullptr;                                // dplr: eta k; mamba2: delta v [rows, Hd]
  T *gate = nullptr, *o = nullptr, *normed = nullptr;  // [rows, Hd]
  T* chunk_states = nullptr;                           // training
  LowRows<T> low;
};
// x: the residual stream, added to; null: only the activations are wanted again.
template <class T>
void linear_half_forward(const Pass& pass, int64_t layer, LinearActivations<T>& a, const float* in, float* x,
                         const Before<T>& before = {});
// in: the residual stream as it entered the half. dy [rows, D]: its gradient as it left; dx [rows, D]: the same in
// float32, to which the half adds its own part. gradient: flat, accumulated.
template <class T>
void linear_half_backward(const Pass& pass, int64_t layer, const float* in, const LinearActivations<T>& a, const T* dy,
                          float* dx, float* gradient);

template <class T>
struct MlaActivations {
  T* h = nullptr;         // [rows, D]
  T* q = nullptr;         // [rows, H * (nope + rope)]
  float* kv = nullptr;    // [rows, latent + rope] before the norm
  T* c = nullptr;         // [rows, latent + rope] what the heads attend to; training
  T* qa = nullptr;        // [rows, H * (latent + rope)] absorbed query
  T* ol = nullptr;        // [rows, H * latent]
  float* lse = nullptr;   // [rows, H]; training
  T* o = nullptr;         // [rows, H * v]
  bool kept = false;      // ol and lse have memory of the caller's, and are not computed again where x is null
  LowRows<T> low;
};
// q [rows, H * (nope + rope)] -> o [rows, H * v] of the rows in pass.expanded. bf16.
template <class T>
void expanded_attention(const Pass& pass, int64_t layer, const T* q, T* o);
template <class T>
void mla_half_forward(const Pass& pass, int64_t layer, MlaActivations<T>& a, const float* in, float* x,
                      const Before<T>& before = {});
template <class T>
void mla_half_backward(const Pass& pass, int64_t layer, const float* in, const MlaActivations<T>& a, const T* dy, float* dx,
                       float* gradient);

template <class T>
struct AttentionActivations {
  T* h = nullptr;         // [rows, D]
  T* q = nullptr;         // [rows, heads * head_dim] rotated
  T* kv = nullptr;        // [rows, 2 * kv_heads * head_dim] keys, rotated, then values
  T* o = nullptr;         // [rows, heads * head_dim]
  float* lse = nullptr;   // [rows, heads]; training
  bool kept = false;      // o and lse have memory of the caller's, and are not computed again where x is null
  LowRows<T> low;
};
template <class T>
void attention_half_forward(const Pass& pass, int64_t layer, AttentionActivations<T>& a, const float* in, float* x,
                            const Before<T>& before = {});
template <class T>
void attention_half_backward(const Pass& pass, int64_t layer, const float* in, const AttentionActivations<T>& a,
                             const T* dy, float* dx, float* gradient);

// The mixer of a layer, whichever it is.
template <class T>
struct MixerActivations {
  LinearActivations<T> linear;
  MlaActivations<T> mla;
  AttentionActivations<T> attention;
};
template <class T>
void mixer_half_forward(const Pass& pass, int64_t layer, MixerActivations<T>& a, const float* in, float* x,
                        const Before<T>& before = {});
template <class T>
void mixer_half_backward(const Pass& pass, int64_t layer, const float* in, const MixerActivations<T>& a, const T* dy,
                         float* dx, float* gradient);

template <class T>
struct FeedForwardActivations {
  T* h = nullptr;                           // [rows, D]
  T *gate_up = nullptr, *inner = nullptr;   // dense or shared: [rows, 2I], [rows, I]
  // mixture of experts; slots = rows * top_k
  float *logits = nullptr, *route_weights = nullptr;  // [rows, E], [rows, top_k]
  int32_t *chosen = nullptr, *source = nullptr, *slot = nullptr, *offsets = nullptr;
  T *expert_gate_up = nullptr, *expert_inner = nullptr, *expert_out = nullptr;  // [slots, 2Ie], [slots, Ie], [slots, D]
  LowRows<T> low;
  ExpertLow<T> expert_gate_up_low = {}, expert_down_low = {};
};
// The norm that comes after a half, which the half may do along with its own last launch.
template <class T>
struct NextNorm {
  const float* weight = nullptr;
  T* y = nullptr;  // [rows, D]
  bool done = false;
  // Of one row: memory that outlives this half, so that the next one can combine the experts; then `left` says what it is to.
  T* out = nullptr;          // [top_k + 1, D]; null: there is none
  float* weights = nullptr;  // [top_k]
  bool at_once = false;      // nothing comes after that could
  kernels::RowCombination left;
};
template <class T>
void feed_forward_forward(const Pass& pass, int64_t layer, FeedForwardActivations<T>& a, const float* in, float* x,
                          NextNorm<T>* next = nullptr);
// dy32 [rows, D] is dy before it was rounded to T.
template <class T>
void feed_forward_backward(const Pass& pass, int64_t layer, const float* in, const FeedForwardActivations<T>& a, const T* dy,
                           const float* dy32, float* dx, float* gradient);

kernels::AttentionShape attention_shape(const ModelConfig& config);

// The residual stream is float32 for both types; only float has bits to keep.
template <class T>
inline constexpr kernels::RowSums kRowSums = sizeof(T) == 4 ? kernels::RowSums::kCpu : kernels::RowSums::kBlocks;

// What a sequence holds, for activations of type T.
template <class T>
StateLayout state_layout(const ModelConfig& config);

// tokens device [rows] -> hidden device T [rows, hidden_size] after the final norm.
template <class T>
void forward(const Pass& pass, const int32_t* tokens, T* hidden);

}  // namespace perigee::policy::device
