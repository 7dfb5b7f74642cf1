// The model's forward pass over a packed batch: one function for prefill, decode and the learner, so that
// they compute the same bits. Layers are pre-norm residual blocks (kimi_linear); see docs/architecture.md for
// the equations.
#pragma once
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "kernels/context.h"
#include "kernels/sequence.h"
#include "policy/model/params.h"

namespace perigee::policy {

// How one sequence's memory is laid out: a fixed recurrent part (states and convolution windows of all layers with a
// linear mixer) and blocks of kernels::kLatentPage tokens that each hold a page of every other layer, [layers][64][width]:
// of MLA latent rows, of softmax attention keys and values. Sizes and offsets are in bytes.
class StateLayout {
 public:
  // mixer_bytes: of a linear mixer the state of one layer, of another kind a page of one layer. activation_bytes: of one
  // value of a convolution window.
  StateLayout(const ModelConfig& config, const std::function<int64_t(LayerKind)>& mixer_bytes, int64_t activation_bytes);
  // The CPU's: everything in float32.
  explicit StateLayout(const ModelConfig& config);
  int64_t recurrent_bytes() const { return recurrent_bytes_; }
  int64_t block_bytes() const { return block_bytes_; }
  int64_t blocks_for(int64_t tokens) const;
  // Of a layer with a linear mixer, in the recurrent part; there is no window without a convolution.
  int64_t state_offset(int64_t layer) const { return state_offset_[static_cast<size_t>(layer)]; }
  int64_t conv_offset(int64_t layer) const { return conv_offset_[static_cast<size_t>(layer)]; }
  // Of any other layer, in a block.
  int64_t page_offset(int64_t layer) const { return page_offset_[static_cast<size_t>(layer)]; }

 private:
  std::vector<int64_t> state_offset_, conv_offset_, page_offset_;
  int64_t recurrent_bytes_ = 0, block_bytes_ = 0;
};

// Rows of the batch that continue one sequence, and where its memory lies.
struct SequenceSlice {
  kernels::Slice slice;
  std::byte* recurrent = nullptr;      // inout [recurrent_bytes]; zero at position 0
  std::span<std::byte* const> blocks;  // inout; at least blocks_for(position + count)
};

// Called after each layer with the residual stream x [rows, hidden] and the chosen experts [rows, top_k]
// (null for a dense layer). For tests and inspection.
using LayerProbe = std::function<void(int64_t layer, const float* x, const int32_t* chosen)>;

// tokens [rows] -> hidden [rows, hidden_size] after the final norm. Slices cover disjoint rows; rows outside
// every slice are not allowed. Temporaries come from ctx.scratch.
void forward(kernels::Context& ctx, const Weights& weights, const StateLayout& state,
             std::span<const int32_t> tokens, std::span<const SequenceSlice> slices, float* hidden,
             const LayerProbe& probe = {});

// Forward and backward over whole sequences (each from position 0), for the learner.
// Between forward() and the object's end its activations live in ctx.scratch: objects nest like a stack.
class TrainPass {
 public:
  // recompute: keep only the inputs of each half layer and compute the rest again in backward().
  TrainPass(kernels::Context& ctx, const Weights& weights, bool recompute);
  ~TrainPass();
  TrainPass(const TrainPass&) = delete;
  TrainPass& operator=(const TrainPass&) = delete;

  // lengths: of the sequences, in the order they lie in tokens. Returns hidden [rows, hidden_size] after the
  // final norm, with the same bits as perigee::policy::forward.
  const float* forward(std::span<const int32_t> tokens, std::span<const int64_t> lengths,
                       const LayerProbe& probe = {});

  // dhidden [rows, hidden_size] -> gradient, accumulated: [layout.elements()], or with adapters [adapter.elements()] of
  // theirs alone. Once per forward.
  void backward(const float* dhidden, float* gradient);

  // Tokens sent to each expert in the forward, [moe layers][experts] in layer order.
  const std::vector<int64_t>& expert_load() const { return expert_load_; }

 private:
  struct Activations;
  kernels::Context& ctx_;
  kernels::Scratch::Mark mark_;
  Weights weights_;
  bool recompute_;
  std::unique_ptr<Activations> acts_;
  std::vector<int64_t> expert_load_;
};

}  // namespace perigee::policy
