#include "apps/compare/model_facts.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>

#include "kernels/mla/mla.h"
#include "policy/model/forward.h"
#include "policy/model/params.h"

namespace perigee::apps::compare {
namespace {

using policy::LayerKind;
using policy::ModelConfig;

double matrix_operations(const policy::ParamLayout& layout) {
  const ModelConfig& c = layout.config();
  std::vector<double> share(layout.tensors().size(), 1.0);
  for (int64_t i = 0; i < c.num_layers; ++i) {
    if (!c.is_moe(i)) continue;
    for (int64_t e = 0; e < c.num_experts; ++e)
      for (const int first : {layout.layer(i).expert_gate_up, layout.layer(i).expert_down})
        share[static_cast<size_t>(first + e)] =
            static_cast<double>(c.experts_per_token) / static_cast<double>(c.num_experts);
  }
  double elements = 0;
  for (size_t t = 0; t < share.size(); ++t) {
    const policy::ParamSpec& p = layout.tensors()[t];
    if (p.form != policy::TensorForm::kVector && p.form != policy::TensorForm::kTable)
      elements += static_cast<double>(p.n * p.k) * share[t];
  }
  return 2 * elements;
}

double mixer_operations(const ModelConfig& c, LayerKind kind, double context) {
  const auto state = static_cast<double>(c.linear_heads * c.linear_head_dim * c.linear_head_dim);
  switch (kind) {
    case LayerKind::kKda:
    case LayerKind::kGdn:
    case LayerKind::kDplr:
      return 7 * state;  // decay, S'k, S + k u', S'q
    case LayerKind::kMamba2:
      return 5 * state;  // decay, S + k v', S'q
    case LayerKind::kMla:
    case LayerKind::kMlaRope:
      return 2 * static_cast<double>(c.num_heads * (c.qk_head_dim() + c.v_head_dim)) * context;
    case LayerKind::kAttention:
      return 4 * static_cast<double>(c.num_heads * c.head_dim) * context;
  }
  return 0;
}

}  // namespace

nlohmann::json ModelFacts::to_json() const {
  return {{"mixers", mixers},
          {"parameters", parameters},
          {"operations_per_token", operations()},
          {"matrix_operations_per_token", matrix_operations},
          {"mixer_operations_per_token", mixer_operations},
          {"operations_at_context", context},
          {"cache_bytes_per_token", cache_bytes_per_token},
          {"state_bytes", state_bytes}};
}

ModelFacts model_facts(const ModelConfig& config, int64_t context) {
  ModelFacts f;
  f.parameters = policy::parameter_count(config);
  f.context = context;
  const policy::ParamLayout layout(config, policy::Dtype::kF32);
  f.matrix_operations = matrix_operations(layout);
  std::vector<std::pair<LayerKind, int>> counts;
  for (const LayerKind kind : config.layers) {
    f.mixer_operations += mixer_operations(config, kind, static_cast<double>(context));
    const auto it =
        std::find_if(counts.begin(), counts.end(), [&](const auto& c) { return c.first == kind; });
    if (it == counts.end())
      counts.emplace_back(kind, 1);
    else
      ++it->second;
  }
  for (const auto& [kind, n] : counts)
    f.mixers += fmt::format("{}{} {}", f.mixers.empty() ? "" : ", ", n, policy::layer_kind_name(kind));
  const policy::StateLayout state(config);
  f.cache_bytes_per_token = static_cast<double>(state.block_bytes()) / kernels::kLatentPage;
  f.state_bytes = state.recurrent_bytes();
  return f;
}

}  // namespace perigee::apps::compare
