#include "policy/model/params.h"

#include <fmt/format.h>

#include <cmath>
#include <cstring>

#include "base/error.h"
#include "base/random.h"
#include "kernels/attention/rope.h"

namespace perigee::policy {
ParamLayout::ParamLayout(ModelConfig config, Dtype dtype, MatrixForm matrices)
    : ArenaLayout(dtype, matrices), config_(std::move(config)) {
  const ModelConfig& c = config_;
  embed_ = add("embed", TensorForm::kTable, c.vocab_size, c.hidden_size);
  map("model.embed_tokens.weight", {c.vocab_size, c.hidden_size}, embed_);
  for (int64_t i = 0; i < c.num_layers; ++i) {
    LayerParams p;
    const std::string prefix = fmt::format("model.layers.{}.", i), name = fmt::format("layers.{}.", i);
    p.input_norm = add(name + "input_norm", TensorForm::kVector, c.hidden_size, 1);
    map(prefix + "input_layernorm.weight", {c.hidden_size}, p.input_norm);
    p.post_norm = add(name + "post_norm", TensorForm::kVector, c.hidden_size, 1);
    map(prefix + "post_attention_layernorm.weight", {c.hidden_size}, p.post_norm);
    const LayerKind kind = c.kind(i);
    is_linear(kind) ? add_linear(i, p) : is_latent(kind) ? add_mla(i, p) : add_attention(i, p);
    add_feed_forward(i, p);
    layers_.push_back(p);
    if (kind == LayerKind::kAttention) head_steps_ = kernels::rope_steps(c.head_dim, c.rope_theta);
    if (kind == LayerKind::kMlaRope) latent_steps_ = kernels::rope_steps(c.qk_rope_head_dim, c.rope_theta);
  }
  final_norm_ = add("final_norm", TensorForm::kVector, c.hidden_size, 1);
  map("model.norm.weight", {c.hidden_size}, final_norm_);
  head_ = add("head", TensorForm::kPanels, c.vocab_size, c.hidden_size);
  map("lm_head.weight", {c.vocab_size, c.hidden_size}, head_);
}

void ParamLayout::map(std::string name, std::vector<int64_t> shape, int tensor, int64_t row_offset,
                      bool f32_in_file) {
  checkpoint_.push_back({std::move(name), std::move(shape), CheckpointTensor::Piece::kRows, tensor, -1,
                         row_offset, f32_in_file});
}

int ParamLayout::add_projection(int64_t i, const char* what, int64_t n, int64_t k) {
  const int t = add(fmt::format("layers.{}.{}", i, what), TensorForm::kPanels, n, k);
  map(fmt::format("model.layers.{}.self_attn.{}.weight", i, what), {n, k}, t);
  return t;
}

void ParamLayout::add_linear(int64_t i, LayerParams& p) {
  const ModelConfig& c = config_;
  const LayerKind kind = c.kind(i);
  const bool per_channel = kind == LayerKind::kKda || kind == LayerKind::kDplr;  // the decay
  const int64_t d = c.linear_head_dim, heads = c.linear_heads, wide = heads * d, D = c.hidden_size, taps = c.conv_size;
  const std::string hf = fmt::format("model.layers.{}.self_attn.", i), name = fmt::format("layers.{}.", i);
  const auto vector = [&](const char* ours, const char* theirs, std::vector<int64_t> shape, bool f32) {
    int64_t n = 1;
    for (const int64_t s : shape) n *= s;
    const int t = add(name + ours, TensorForm::kVector, n, 1);
    map(hf + theirs, std::move(shape), t, 0, f32);
    return t;
  };
  const auto low_rank = [&](const char* a_name, const char* b_name, int& a, int& b) {
    a = add_projection(i, a_name, d, D);
    b = add_projection(i, b_name, wide, d);
  };
  p.q = add_projection(i, "q_proj", wide, D);
  p.k = add_projection(i, "k_proj", wide, D);
  p.v = add_projection(i, "v_proj", wide, D);
  if (taps > 0) {
    p.conv = add(name + "conv", TensorForm::kVector, 3 * wide, taps);
    map(hf + "q_conv1d.weight", {wide, 1, taps}, p.conv, 0);
    map(hf + "k_conv1d.weight", {wide, 1, taps}, p.conv, wide);
    map(hf + "v_conv1d.weight", {wide, 1, taps}, p.conv, 2 * wide);
  }
  p.a_log = vector("a_log", "A_log", {1, 1, heads, 1}, true);
  p.dt_bias = vector("dt_bias", "dt_bias", {per_channel ? wide : heads}, true);
  if (per_channel) low_rank("f_a_proj", "f_b_proj", p.f_a, p.f_b);
  if (kind == LayerKind::kGdn) p.a = add_projection(i, "a_proj", heads, D);
  if (kind == LayerKind::kDplr) {
    low_rank("e_a_proj", "e_b_proj", p.e_a, p.e_b);
  } else {
    p.b = add_projection(i, "b_proj", heads, D);
  }
  if (kind == LayerKind::kMamba2) p.skip = vector("skip", "D", {heads}, true);
  if (c.output_gate != OutputGate::kNone) low_rank("g_a_proj", "g_b_proj", p.g_a, p.g_b);
  p.o_norm = vector("o_norm", "o_norm.weight", {d}, false);
  p.o = add_projection(i, "o_proj", D, wide);
}

void ParamLayout::add_attention(int64_t i, LayerParams& p) {
  const ModelConfig& c = config_;
  const int64_t D = c.hidden_size, wide = c.num_heads * c.head_dim, kv = c.num_kv_heads * c.head_dim;
  p.q = add_projection(i, "q_proj", wide, D);
  p.k = add_projection(i, "k_proj", kv, D);
  p.v = add_projection(i, "v_proj", kv, D);
  p.o = add_projection(i, "o_proj", D, wide);
}

void ParamLayout::add_mla(int64_t i, LayerParams& p) {
  const ModelConfig& c = config_;
  const int64_t heads = c.num_heads, D = c.hidden_size, latent = c.kv_lora_rank;
  const std::string hf = fmt::format("model.layers.{}.self_attn.", i), name = fmt::format("layers.{}.", i);
  const int64_t q_rows = heads * (c.qk_nope_head_dim + c.qk_rope_head_dim);
  p.q = add(name + "q_proj", TensorForm::kPanels, q_rows, D);
  map(hf + "q_proj.weight", {q_rows, D}, p.q);
  p.kv_a = add(name + "kv_a_proj", TensorForm::kPanels, latent + c.qk_rope_head_dim, D);
  map(hf + "kv_a_proj_with_mqa.weight", {latent + c.qk_rope_head_dim, D}, p.kv_a);
  p.kv_norm = add(name + "kv_a_norm", TensorForm::kVector, latent, 1);
  map(hf + "kv_a_layernorm.weight", {latent}, p.kv_norm);
  for (int64_t h = 0; h < heads; ++h) {
    const int t = add(fmt::format("{}absorb_k.{}", name, h), TensorForm::kPanels, latent, c.qk_nope_head_dim);
    if (h == 0) p.absorb_k = t;
  }
  for (int64_t h = 0; h < heads; ++h) {
    const int t = add(fmt::format("{}absorb_v.{}", name, h), TensorForm::kPanels, c.v_head_dim, latent);
    if (h == 0) p.absorb_v = t;
  }
  const int64_t kv_rows = heads * (c.qk_nope_head_dim + c.v_head_dim);
  checkpoint_.push_back({hf + "kv_b_proj.weight",
                         {kv_rows, latent},
                         CheckpointTensor::Piece::kKvB,
                         p.absorb_k,
                         p.absorb_v,
                         0,
                         false});
  p.o = add(name + "o_proj", TensorForm::kPanels, D, heads * c.v_head_dim);
  map(hf + "o_proj.weight", {D, heads * c.v_head_dim}, p.o);
}

void ParamLayout::add_feed_forward(int64_t i, LayerParams& p) {
  const ModelConfig& c = config_;
  const int64_t D = c.hidden_size;
  const std::string hf = fmt::format("model.layers.{}.", i), name = fmt::format("layers.{}.", i);
  const auto gate_up = [&](const std::string& ours, const std::string& gate, const std::string& up,
                           int64_t inner) {
    const int t = add(name + ours, TensorForm::kPanels, 2 * inner, D);
    map(hf + gate + ".weight", {inner, D}, t, 0);
    map(hf + up + ".weight", {inner, D}, t, inner);
    return t;
  };
  const auto down = [&](const std::string& ours, const std::string& theirs, int64_t inner) {
    const int t = add(name + ours, TensorForm::kPanels, D, inner);
    map(hf + theirs + ".weight", {D, inner}, t);
    return t;
  };
  if (!c.is_moe(i)) {
    p.gate_up = gate_up("gate_up", "mlp.gate_proj", "mlp.up_proj", c.intermediate_size);
    p.down = down("down", "mlp.down_proj", c.intermediate_size);
    return;
  }
  const std::string moe = "block_sparse_moe.";
  p.router = add(name + "router", TensorForm::kPanelsF32, c.num_experts, D);
  map(hf + moe + "gate.weight", {c.num_experts, D}, p.router);
  p.router_bias = add(name + "router_bias", TensorForm::kVector, c.num_experts, 1, false);
  map(hf + moe + "gate.e_score_correction_bias", {c.num_experts}, p.router_bias, 0, true);
  const int64_t inner = c.moe_intermediate_size;
  for (int64_t e = 0; e < c.num_experts; ++e) {
    const std::string expert = fmt::format("{}experts.{}.", moe, e);
    const int t = gate_up(fmt::format("expert_gate_up.{}", e), expert + "w1", expert + "w3", inner);
    if (e == 0) p.expert_gate_up = t;
  }
  for (int64_t e = 0; e < c.num_experts; ++e) {
    const int t = down(fmt::format("expert_down.{}", e), fmt::format("{}experts.{}.w2", moe, e), inner);
    if (e == 0) p.expert_down = t;
  }
  if (c.num_shared_experts > 0) {
    const std::string shared = moe + "shared_experts.";
    p.gate_up =
        gate_up("shared_gate_up", shared + "gate_proj", shared + "up_proj", c.shared_intermediate_size());
    p.down = down("shared_down", shared + "down_proj", c.shared_intermediate_size());
  }
}

namespace {

// Calls visit(value index in the checkpoint tensor, element index in the flat arena) for every value.
template <class Visit>
void for_each_value(const ParamLayout& layout, const CheckpointTensor& t, Visit&& visit) {
  const ModelConfig& c = layout.config();
  if (t.piece == CheckpointTensor::Piece::kKvB) {
    const int64_t nope = c.qk_nope_head_dim, v = c.v_head_dim, latent = c.kv_lora_rank;
    for (int64_t h = 0; h < c.num_heads; ++h) {
      const ParamSpec& key = layout.tensor(t.tensor + static_cast<int>(h));
      const ParamSpec& value = layout.tensor(t.tensor2 + static_cast<int>(h));
      const int64_t row0 = h * (nope + v);
      for (int64_t i = 0; i < nope; ++i)
        for (int64_t j = 0; j < latent; ++j)
          visit((row0 + i) * latent + j, key.element_offset + key.index(j, i));
      for (int64_t i = 0; i < v; ++i)
        for (int64_t j = 0; j < latent; ++j)
          visit((row0 + nope + i) * latent + j, value.element_offset + value.index(i, j));
    }
    return;
  }
  const ParamSpec& spec = layout.tensor(t.tensor);
  int64_t count = 1;
  for (int64_t s : t.shape) count *= s;
  const int64_t rows = count / spec.k;
  PERIGEE_CHECK(rows * spec.k == count && t.row_offset + rows <= spec.n, "{}: {} values into {}", t.name,
                count, spec.name);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < spec.k; ++j)
      visit(i * spec.k + j, spec.element_offset + spec.index(t.row_offset + i, j));
}

}  // namespace

void ParamLayout::read_flat(const float* flat, const CheckpointTensor& t, float* values) const {
  for_each_value(*this, t, [&](int64_t value, int64_t element) { values[value] = flat[element]; });
}

void ParamLayout::write_flat(float* flat, const CheckpointTensor& t, const float* values) const {
  for_each_value(*this, t, [&](int64_t value, int64_t element) { flat[element] = values[value]; });
}

namespace {

// Fills tensor `index` (all n rows) from draw().
template <class Draw>
void fill(const ParamLayout& layout, int index, float* flat, Draw&& draw) {
  const ParamSpec& t = layout.tensor(index);
  for (int64_t i = 0; i < t.n; ++i)
    for (int64_t j = 0; j < t.k; ++j)
      flat[t.element_offset + t.index(i, j)] = static_cast<float>(draw());
}

}  // namespace

void initialize(const ParamLayout& layout, uint64_t seed, float* flat) {
  const ModelConfig& c = layout.config();
  std::memset(flat, 0, static_cast<size_t>(layout.elements()) * 4);
  const double range = c.initializer_range,
               residual = range / std::sqrt(2.0 * static_cast<double>(c.num_layers));
  const auto normal = [&](int index, double std_dev) {
    Random random(seed, static_cast<uint64_t>(index));
    fill(layout, index, flat, [&] { return std_dev * random.next_normal(); });
  };
  const auto ones = [&](int index) { fill(layout, index, flat, [] { return 1.0; }); };

  normal(layout.embed(), range);
  normal(layout.head(), range);
  ones(layout.final_norm());
  for (int64_t i = 0; i < c.num_layers; ++i) {
    const LayerParams& p = layout.layer(i);
    ones(p.input_norm);
    ones(p.post_norm);
    normal(p.q, range);
    normal(p.o, residual);
    for (const int t : {p.k, p.v, p.f_a, p.f_b, p.a, p.b, p.e_a, p.e_b, p.g_a, p.g_b})
      if (t >= 0) normal(t, range);
    if (is_linear(c.kind(i))) {
      if (p.conv >= 0) {
        Random conv(seed, static_cast<uint64_t>(p.conv));
        fill(layout, p.conv, flat, [&] { return conv.next_float() - 0.5; });
      }
      Random a(seed, static_cast<uint64_t>(p.a_log)), dt(seed, static_cast<uint64_t>(p.dt_bias));
      fill(layout, p.a_log, flat, [&] { return std::log(1.0 + 15.0 * a.next_float()); });
      fill(layout, p.dt_bias, flat, [&] {
        const double rate = std::exp(std::log(1e-3) + (std::log(1e-1) - std::log(1e-3)) * dt.next_float());
        return std::log(std::expm1(rate));  // the inverse of softplus
      });
      if (p.skip >= 0) ones(p.skip);
      ones(p.o_norm);
    } else if (is_latent(c.kind(i))) {
      normal(p.kv_a, range);
      ones(p.kv_norm);
      for (int h = 0; h < static_cast<int>(c.num_heads); ++h) {
        normal(p.absorb_k + h, range);
        normal(p.absorb_v + h, range);
      }
    }
    if (c.is_moe(i)) {
      normal(p.router, range);
      for (int e = 0; e < static_cast<int>(c.num_experts); ++e) {
        normal(p.expert_gate_up + e, range);
        normal(p.expert_down + e, residual);
      }
    }
    if (p.gate_up >= 0) {
      normal(p.gate_up, range);
      normal(p.down, residual);
    }
  }
}

}  // namespace perigee::policy
