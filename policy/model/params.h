// The parameters of a model: which tensors they are, and where each lies in an arena (arena.h).
//
// Beside the checkpoint's tensors as they are, three are arranged for the kernels:
//   gate_up     gate_proj over up_proj (w1 over w3), [2*I, D]
//   conv        q, k, v conv weights over one another, [3*H*d, 4] (linear mixers)
//   absorb_k/v  kv_b_proj cut by head: absorb_k[h] [latent, nope] is its key half transposed,
//               absorb_v[h] [v, latent] its value half
// CheckpointTensor says which piece of which tensor a Hugging Face tensor is.
#pragma once
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "policy/model/arena.h"
#include "policy/model/config.h"

namespace perigee::policy {

// Indices into ParamLayout::tensors(); -1 where a layer has no such tensor.
struct LayerParams {
  int input_norm = -1, post_norm = -1;
  // every mixer; k and v not of MLA
  int q = -1, k = -1, v = -1, o = -1;
  // linear mixers (docs/mixers.md says which has which)
  int conv = -1, a_log = -1, dt_bias = -1, f_a = -1, f_b = -1, a = -1, b = -1, e_a = -1, e_b = -1, skip = -1, g_a = -1,
      g_b = -1, o_norm = -1;
  // MLA
  int kv_a = -1, kv_norm = -1, absorb_k = -1, absorb_v = -1;  // the first of `heads` consecutive tensors
  // dense feed-forward, or the shared experts
  int gate_up = -1, down = -1;
  // mixture of experts
  int router = -1, router_bias = -1;
  int expert_gate_up = -1, expert_down = -1;  // the first of `experts` consecutive ones
};

// How one tensor of a Hugging Face checkpoint maps to a tensor here.
struct CheckpointTensor {
  enum class Piece {
    kRows,  // its rows are rows [row_offset, row_offset + rows) of `tensor` (for vectors: elements)
    kKvB,   // kv_b_proj: `tensor` is absorb_k of head 0, `tensor2` absorb_v of head 0
  };
  std::string name;            // "model.layers.3.self_attn.q_proj.weight"
  std::vector<int64_t> shape;  // as in the checkpoint
  Piece piece = Piece::kRows;
  int tensor = -1, tensor2 = -1;
  int64_t row_offset = 0;
  bool f32_in_file = false;  // A_log, dt_bias, D and the router's bias stay float32 in bfloat16 checkpoints
};

class ParamLayout : public ArenaLayout {
 public:
  ParamLayout(ModelConfig config, Dtype dtype, MatrixForm matrices = MatrixForm::kPanels);

  const ModelConfig& config() const { return config_; }
  const LayerParams& layer(int64_t i) const { return layers_[static_cast<size_t>(i)]; }
  const std::vector<CheckpointTensor>& checkpoint() const { return checkpoint_; }
  int embed() const { return embed_; }
  int head() const { return head_; }
  int final_norm() const { return final_norm_; }
  // Of the rotation in layers of this kind (kernels/attention/rope.h): mla_rope or attention. Empty: no layer has it.
  std::span<const uint64_t> rope_steps(LayerKind kind) const {
    return kind == LayerKind::kAttention ? head_steps_ : latent_steps_;
  }

  // Float row-major values of a checkpoint tensor out of, or into, a flat f32 arena.
  void read_flat(const float* flat, const CheckpointTensor& t, float* values) const;
  void write_flat(float* flat, const CheckpointTensor& t, const float* values) const;

 private:
  void map(std::string name, std::vector<int64_t> shape, int tensor, int64_t row_offset = 0,
           bool f32_in_file = false);
  void add_linear(int64_t i, LayerParams& p);
  void add_mla(int64_t i, LayerParams& p);
  void add_attention(int64_t i, LayerParams& p);
  // A matrix that the checkpoint has under the same name.
  int add_projection(int64_t i, const char* what, int64_t n, int64_t k);
  void add_feed_forward(int64_t i, LayerParams& p);

  ModelConfig config_;
  std::vector<LayerParams> layers_;
  std::vector<CheckpointTensor> checkpoint_;
  std::vector<uint64_t> head_steps_, latent_steps_;
  int embed_ = -1, head_ = -1, final_norm_ = -1;
};

class AdapterLayout;  // policy/model/adapter.h

// A weights arena seen through its layout, and the adapters that are added to it, if any. Borrows all of them.
struct Weights {
  const ParamLayout* layout = nullptr;
  const std::byte* data = nullptr;
  const AdapterLayout* adapter = nullptr;  // null: none; then the model itself is what gradients are of
  const std::byte* adapter_data = nullptr;

  kernels::Weight matrix(int i) const {
    const ParamSpec& t = layout->tensor(i);
    return {data + t.byte_offset, t.in_dtype() ? layout->dtype() : Dtype::kF32, t.n, t.k};
  }
  const float* vector(int i) const {
    return reinterpret_cast<const float*>(data + layout->tensor(i).byte_offset);
  }
  const void* table(int i) const { return data + layout->tensor(i).byte_offset; }
};

// Random initialisation into a flat f32 arena: matrices normal(0, initializer_range), residual outputs (o,
// down) scaled by 1/sqrt(2 L), norms 1, A_log = log U(1, 16), dt_bias such that softplus(dt_bias) is
// log-uniform in [1e-3, 1e-1], conv weights uniform in +-1/2, D 1, router bias 0. A pure function of (layout,
// seed); each tensor has its own stream.
void initialize(const ParamLayout& layout, uint64_t seed, float* flat);

}  // namespace perigee::policy
