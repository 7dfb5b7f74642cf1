// Where every parameter of a model lies. One ParamLayout describes three arenas of the same model:
//   weights    weight_bytes()  matrices and tables in `dtype`, vectors and router in float32 (byte_offset)
//   flat f32   elements()      gradients, Adam moments, float32 masters: a float per element (element_offset)
// Matrices lie in both as the device that multiplies them reads them: in panels (kernels/gemm/weight.h) for the CPU and
// for float32 on a GPU, in tiles (kernels/gemm/tiles.h) for bfloat16 on a GPU. Padding elements are zero and stay zero.
//
// Beside the checkpoint's tensors as they are, three are arranged for the kernels:
//   gate_up     gate_proj over up_proj (w1 over w3), [2*I, D]
//   conv        q, k, v conv weights over one another, [3*H*d, 4]
//   absorb_k/v  kv_b_proj cut by head: absorb_k[h] [latent, nope] is its key half transposed,
//               absorb_v[h] [v, latent] its value half
// CheckpointTensor says which piece of which tensor a Hugging Face tensor is.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "kernels/gemm/weight.h"
#include "policy/model/config.h"

namespace perigee::policy {

using kernels::Dtype;

enum class TensorForm {
  kPanels,     // matrix in panels, in the layout's dtype
  kTiles,      // matrix in tiles, bfloat16 (MatrixForm::kTiles)
  kPanelsF32,  // matrix in panels, float32 whatever the dtype (the router)
  kTable,      // row-major matrix, in the layout's dtype (the embedding)
  kVector,     // float32, n values (k = 1) or [n, k] row-major
};

// Where a layout's matrices are multiplied.
enum class MatrixForm {
  kPanels,
  kTiles,  // on a GPU; REQUIRES bfloat16
};

struct ParamSpec {
  std::string name;  // "layers.3.q_proj"
  TensorForm form;
  int64_t n = 0, k = 1;
  int64_t elements = 0;        // padding included
  int64_t element_offset = 0;  // multiple of 16
  int64_t byte_offset = 0;     // multiple of 64
  bool trained = true;         // false: not changed by gradients (the router's bias)
  // Whether a weights arena holds it in the layout's dtype; else in float32.
  bool in_dtype() const { return form != TensorForm::kPanelsF32 && form != TensorForm::kVector; }
};

// Indices into ParamLayout::tensors(); -1 where a layer has no such tensor.
struct LayerParams {
  int input_norm = -1, post_norm = -1;
  // KDA
  int q = -1, k = -1, v = -1, conv = -1, a_log = -1, dt_bias = -1, f_a = -1, f_b = -1, b = -1, g_a = -1,
      g_b = -1, o_norm = -1;
  // MLA (q shared with the above)
  int kv_a = -1, kv_norm = -1, absorb_k = -1, absorb_v = -1;  // the first of `heads` consecutive tensors
  // both
  int o = -1;
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
  bool f32_in_file = false;  // A_log, dt_bias and the router's bias stay float32 in bfloat16 checkpoints
};

class ParamLayout {
 public:
  ParamLayout(ModelConfig config, Dtype dtype, MatrixForm matrices = MatrixForm::kPanels);

  const ModelConfig& config() const { return config_; }
  Dtype dtype() const { return dtype_; }
  MatrixForm matrices() const { return matrices_; }
  const std::vector<ParamSpec>& tensors() const { return tensors_; }
  const ParamSpec& tensor(int i) const { return tensors_[static_cast<size_t>(i)]; }
  const LayerParams& layer(int64_t i) const { return layers_[static_cast<size_t>(i)]; }
  const std::vector<CheckpointTensor>& checkpoint() const { return checkpoint_; }
  int embed() const { return embed_; }
  int head() const { return head_; }
  int final_norm() const { return final_norm_; }

  int64_t elements() const { return elements_; }          // of a flat f32 arena, padding included
  int64_t weight_bytes() const { return weight_bytes_; }  // of a weights arena
  int64_t parameter_count() const;                        // without padding, as in the checkpoint

  // Float row-major values of a checkpoint tensor out of, or into, a flat f32 arena.
  void read_flat(const float* flat, const CheckpointTensor& t, float* values) const;
  void write_flat(float* flat, const CheckpointTensor& t, const float* values) const;
  // A weights arena from a flat f32 arena (rounding to nearest even in bfloat16), and back (exact).
  void flat_to_weights(const float* flat, std::byte* weights) const;
  void weights_to_flat(const std::byte* weights, float* flat) const;

 private:
  int add(std::string name, TensorForm form, int64_t n, int64_t k, bool trained = true);
  void map(std::string name, std::vector<int64_t> shape, int tensor, int64_t row_offset = 0,
           bool f32_in_file = false);
  void add_kda(int64_t i, LayerParams& p);
  void add_mla(int64_t i, LayerParams& p);
  void add_feed_forward(int64_t i, LayerParams& p);

  ModelConfig config_;
  Dtype dtype_;
  MatrixForm matrices_;
  std::vector<ParamSpec> tensors_;
  std::vector<LayerParams> layers_;
  std::vector<CheckpointTensor> checkpoint_;
  int embed_ = -1, head_ = -1, final_norm_ = -1;
  int64_t elements_ = 0, weight_bytes_ = 0;
};

// A weights arena seen through its layout. Borrows both.
struct Weights {
  const ParamLayout* layout = nullptr;
  const std::byte* data = nullptr;

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
// log-uniform in [1e-3, 1e-1], conv weights uniform in +-1/2, router bias 0. A pure function of (layout,
// seed); each tensor has its own stream.
void initialize(const ParamLayout& layout, uint64_t seed, float* flat);

}  // namespace perigee::policy
