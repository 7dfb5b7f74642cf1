#include "bench/work.h"

#include <algorithm>
#include <cmath>

#include "kernels/gemm/weight.h"

namespace perigee::bench {

using namespace policy;

namespace {

// Calls visit(spec, is an expert's) for every matrix but the embedding.
template <class Visit>
void for_each_matrix(const ParamLayout& layout, Visit&& visit) {
  const ModelConfig& c = layout.config();
  std::vector<bool> expert(layout.tensors().size(), false);
  for (int64_t i = 0; i < c.num_layers; ++i) {
    if (!c.is_moe(i)) continue;
    for (int64_t e = 0; e < c.num_experts; ++e) {
      expert[static_cast<size_t>(layout.layer(i).expert_gate_up + e)] = true;
      expert[static_cast<size_t>(layout.layer(i).expert_down + e)] = true;
    }
  }
  for (size_t t = 0; t < expert.size(); ++t) {
    const ParamSpec& p = layout.tensors()[t];
    if (p.form != TensorForm::kVector && p.form != TensorForm::kTable) visit(p, expert[t]);
  }
}

}  // namespace

ModelConfig quickstart_size() {
  ModelConfig c;
  c.vocab_size = 288;
  c.hidden_size = 64;
  c.num_layers = 4;
  c.intermediate_size = 128;
  c.num_heads = 2;
  c.kv_lora_rank = 32;
  c.qk_nope_head_dim = 32;
  c.qk_rope_head_dim = 16;
  c.v_head_dim = 32;
  c.linear_heads = 2;
  c.linear_head_dim = 32;
  c.conv_size = 4;
  c.num_experts = 8;
  c.experts_per_token = 2;
  c.num_shared_experts = 1;
  c.moe_intermediate_size = 64;
  c.first_k_dense_replace = 1;
  c.layers = {LayerKind::kKda, LayerKind::kKda, LayerKind::kKda, LayerKind::kMla};
  c.moe = {false, true, true, true};
  return c;
}

double active_elements(const ParamLayout& layout) {
  const ModelConfig& c = layout.config();
  const double chosen = c.num_experts > 0 ? static_cast<double>(c.experts_per_token) / static_cast<double>(c.num_experts) : 0;
  double elements = 0;
  for_each_matrix(layout, [&](const ParamSpec& p, bool expert) {
    elements += static_cast<double>(p.n * p.k) * (expert ? chosen : 1.0);
  });
  return elements;
}

double decode_step_bytes(const ParamLayout& layout, const StateLayout& state, int64_t batch, int64_t depth) {
  const ModelConfig& c = layout.config();
  const double missed = c.num_experts > 0 ? std::pow(1.0 - static_cast<double>(c.experts_per_token) /
                                                               static_cast<double>(c.num_experts),
                                                     static_cast<double>(batch))
                                          : 0;
  double bytes = 0;
  for_each_matrix(layout, [&](const ParamSpec& p, bool expert) {
    bytes += static_cast<double>(p.n * p.k) * static_cast<double>(p.in_dtype() ? kernels::dtype_bytes(layout.dtype()) : 4) *
             (expert ? 1.0 - missed : 1.0);
  });
  const double recurrent = static_cast<double>(state.recurrent_bytes());
  const double latents = static_cast<double>(state.block_bytes()) / 64.0 * static_cast<double>(depth);
  return bytes + static_cast<double>(batch) * (recurrent * (1.0 + 1.0 / 16) + latents);
}

double prefill_flops(const ParamLayout& layout, int64_t tokens) {
  const ModelConfig& c = layout.config();
  const auto n = static_cast<double>(tokens);
  double flops = 0;
  for_each_matrix(layout, [&](const ParamSpec& p, bool expert) {
    const double share = expert ? static_cast<double>(c.experts_per_token) / static_cast<double>(c.num_experts) : 1.0;
    const double rows = &p == &layout.tensor(layout.head()) ? 1.0 : n;
    flops += 2.0 * static_cast<double>(p.n * p.k) * share * rows;
  });
  for (int64_t i = 0; i < c.num_layers; ++i)
    flops += c.kind(i) == LayerKind::kKda ? 4.0 * static_cast<double>(c.linear_heads * c.linear_head_dim * c.linear_head_dim) * n
                         : static_cast<double>(c.num_heads * (c.qk_head_dim() + c.v_head_dim)) * n * n;
  return flops;
}

}  // namespace perigee::bench
