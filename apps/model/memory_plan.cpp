#include "apps/model/memory_plan.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <fstream>

#include "apps/output/output.h"
#include "base/error.h"
#include "base/text.h"
#include "kernels/device/device.h"
#include "kernels/kda/shape.h"
#include "kernels/mla/mla.h"
#include "policy/device/backend.h"
#include "policy/device/learn.h"
#include "policy/engine/engine.h"
#include "policy/model/forward.h"
#include "policy/model/params.h"

namespace perigee::apps {
namespace {

using policy::Dtype;
using policy::MatrixForm;
using policy::ModelConfig;
using policy::ParamLayout;
using policy::StateLayout;

constexpr int64_t kLoraTokens = 16384;
constexpr int64_t kContextBytes = int64_t{640} << 20;  // of a GPU, for each process

int64_t percent_less(double part, double whole) {
  return static_cast<int64_t>(1000 * (1 - part / whole) + 0.5);  // tenths
}

// Temporary buffers of a pass on the CPU: the residual stream and the widest half layer, in float32.
int64_t host_scratch_bytes(const ModelConfig& c, int64_t rows) {
  // Of dplr; KDA has neither the strengths nor what is written.
  const int64_t linear = 15 * c.linear_width() + 3 * c.linear_head_dim + 3 * c.linear_heads;
  const int64_t mla = c.num_heads * (c.qk_head_dim() + c.latent_width() + c.kv_lora_rank + c.v_head_dim) +
                      2 * c.latent_width();
  // Groups of heads are copied to lie one after the other, and back.
  const int64_t attention = (c.num_kv_heads > 1 ? 4 : 2) * c.num_heads * c.head_dim + c.kv_width();
  const int64_t dense = 3 * std::max(c.intermediate_size, c.shared_intermediate_size());
  const int64_t routed = c.experts_per_token * (3 * c.moe_intermediate_size + c.hidden_size) + c.num_experts;
  return 4 * rows * (5 * c.hidden_size + std::max({linear, mla, attention, dense + routed}));
}

// A training pass on the CPU that computes each half again: beside two halves at a time, the residual stream at every half
// and the states at the start of the chunks of one layer.
int64_t host_learn_scratch_bytes(const ModelConfig& c, int64_t rows) {
  return 2 * host_scratch_bytes(c, rows) + 4 * rows * c.hidden_size * (2 * c.num_layers + 2) +
         4 * rows / kernels::kKdaChunk * c.linear_width() * c.linear_head_dim;
}

// The default targets, as far as the model has them.
policy::LoraConfig lora_of(const ParamLayout& layout) {
  policy::LoraConfig lora;
  std::erase_if(lora.targets, [&](const std::string& target) {
    return std::ranges::none_of(layout.checkpoint(), [&](const policy::CheckpointTensor& t) {
      return t.name.ends_with("." + target + ".weight");
    });
  });
  return lora;
}

StateLayout state_of(const ParamLayout& layout, bool cuda) {
  return cuda ? policy::device_state_layout(layout) : StateLayout(layout.config());
}

double bytes_per_token(const StateLayout& state) {
  return static_cast<double>(state.block_bytes()) / static_cast<double>(kernels::kLatentPage);
}

ModelConfig with_mla_everywhere(ModelConfig c) {
  std::fill(c.layers.begin(), c.layers.end(), policy::LayerKind::kMla);
  return c;
}

std::string context_name(int64_t tokens) {
  if (tokens % (1 << 20) == 0) return fmt::format("{}M", tokens >> 20);
  return tokens % 1024 == 0 ? fmt::format("{}k", tokens >> 10) : std::to_string(tokens);
}

std::string bytes(int64_t n) {
  return human_bytes(static_cast<uint64_t>(n));
}

}  // namespace

MachineMemory machine_memory() {
  MachineMemory m;
  std::ifstream in("/proc/meminfo");
  std::string key, unit;
  for (uint64_t kib = 0; in >> key >> kib; std::getline(in, unit)) {
    if (key == "MemTotal:") m.total = kib << 10;
    if (key == "MemAvailable:") m.available = kib << 10;
  }
  uint64_t limit = 0;
  if (std::ifstream group("/sys/fs/cgroup/memory.max"); group >> limit && limit < m.total) {
    m.available = std::min(m.available, limit);
    m.limit = limit;
  }
  return m;
}

std::vector<int64_t> parse_contexts(const std::string& text, const std::string& option) {
  std::vector<int64_t> contexts;
  for (size_t at = 0; at <= text.size();) {
    const size_t end = std::min(text.find(',', at), text.size());
    const std::string word = text.substr(at, end - at);
    int64_t tokens = 0;
    const auto [after, error] = std::from_chars(word.data(), word.data() + word.size(), tokens);
    const std::string unit(after, word.data() + word.size());
    const int shift = unit == "k" || unit == "K" ? 10 : unit == "m" || unit == "M" ? 20 : 0;
    if (error != std::errc{} || (shift == 0 && !unit.empty()) || tokens < 1 || tokens > int64_t{1} << 31)
      throw_input("{}: {} is not a number of tokens, such as 4096, 32k or 1M", option, quote(word));
    contexts.push_back(tokens << shift);
    at = end + 1;
  }
  return contexts;
}

MemoryPlan plan_memory(const ModelConfig& config, const std::string& model, const PlanDevice& device,
                       const std::vector<int64_t>& contexts) {
  for (const int64_t tokens : contexts)
    if (tokens > config.max_length)
      throw_input("--contexts: {} tokens are more than the {} of {}", tokens, config.max_length, model);
  const bool narrow = config.dtype == Dtype::kBf16;
  const MatrixForm form = device.cuda && narrow ? MatrixForm::kTiles : MatrixForm::kPanels;
  const ParamLayout layout(config, config.dtype, form);

  MemoryPlan p;
  p.device = device;
  p.dtype = narrow ? "bfloat16" : "float32";
  p.parameters = layout.parameter_count();
  p.weight_bytes = layout.weight_bytes();
  if (p.weight_bytes > device.memory_bytes)
    throw_environment("{}: the weights alone take {} ({} parameters in {}), and {} has {}", model,
                      bytes(p.weight_bytes), p.parameters, p.dtype, device.name, bytes(device.memory_bytes));
  const policy::EngineConfig engine;
  p.running = engine.max_running;
  p.rows = std::max(engine.max_running, engine.prefill_chunk);
  const int64_t scratch =
      device.cuda ? policy::device_scratch_bytes(layout, p.rows) : host_scratch_bytes(config, p.rows);
  if (scratch == 0)
    throw_environment("{}: the plan for a GPU needs a program that was built where nvcc is installed",
                      kernels::Device::why_none());
  // Logits of the sequences that decode, and of the prompts that end in the same step.
  p.temporary_bytes = scratch + 2 * p.running * config.vocab_size * 4;
  p.left_bytes = std::max<int64_t>(0, device.memory_bytes - p.weight_bytes - p.temporary_bytes);

  const StateLayout state = state_of(layout, device.cuda);
  p.sequence_bytes = state.recurrent_bytes();
  p.block_bytes = state.block_bytes();
  p.block_tokens = kernels::kLatentPage;
  for (const int64_t tokens : contexts) {
    const int64_t size = state.recurrent_bytes() + state.blocks_for(tokens) * state.block_bytes();
    p.contexts.push_back({tokens, size, p.left_bytes / std::max<int64_t>(1, size)});
  }
  p.token_bytes = bytes_per_token(state);
  if (config.kv_lora_rank > 0)
    p.all_mla_token_bytes =
        bytes_per_token(state_of(ParamLayout(with_mla_everywhere(config), config.dtype, form), device.cuda));
  // In float32 the weights are their own masters.
  p.training_bytes_per_element = narrow ? 16 : 12;
  p.training_bytes = p.training_bytes_per_element * layout.elements();
  p.training_fits = p.weight_bytes + p.training_bytes <= device.memory_bytes;
  p.training_8bit_bytes =
      p.training_bytes - policy::MomentLayout(layout, kernels::MomentForm::kFloat32).bytes() +
      policy::MomentLayout(layout, kernels::MomentForm::kByte).bytes();
  p.training_8bit_fits = p.weight_bytes + p.training_8bit_bytes <= device.memory_bytes;
  const policy::AdapterLayout adapters(layout, lora_of(layout));
  p.lora_rank = adapters.config().rank;
  p.lora_parameters = adapters.parameter_count();
  p.lora_tokens = kLoraTokens;
  p.lora_bytes =
      3 * adapters.weight_bytes() + adapters.elements() * p.training_bytes_per_element +
      (device.cuda ? policy::device_learn_scratch_bytes(adapters, kLoraTokens, true) + 2 * kContextBytes
                   : host_learn_scratch_bytes(config, kLoraTokens));
  const int64_t shortest = p.contexts.empty() ? 0 : p.contexts.front().bytes;
  p.lora_fits = p.weight_bytes + p.temporary_bytes + p.lora_bytes + shortest <= device.memory_bytes;
  return p;
}

nlohmann::json MemoryPlan::to_json() const {
  nlohmann::json rows_json = nlohmann::json::array();
  for (const Context& c : contexts)
    rows_json.push_back({{"tokens", c.tokens}, {"bytes", c.bytes}, {"fit", c.fit}});
  return {
      {"device",
       {{"kind", device.cuda ? "cuda" : "cpu"}, {"name", device.name}, {"bytes", device.memory_bytes}}},
      {"dtype", dtype},
      {"parameters", parameters},
      {"weight_bytes", weight_bytes},
      {"temporary", {{"bytes", temporary_bytes}, {"rows", rows}, {"sequences", running}}},
      {"sequence", {{"bytes", sequence_bytes}, {"block_bytes", block_bytes}, {"block_tokens", block_tokens}}},
      {"left_bytes", left_bytes},
      {"contexts", std::move(rows_json)},
      {"token_bytes", token_bytes},
      {"all_mla_token_bytes", all_mla_token_bytes},
      {"training",
       {{"bytes", training_bytes},
        {"bytes_per_element", training_bytes_per_element},
        {"fits", training_fits},
        {"bytes_8bit", training_8bit_bytes},
        {"fits_8bit", training_8bit_fits}}},
      {"lora",
       {{"rank", lora_rank},
        {"parameters", lora_parameters},
        {"tokens", lora_tokens},
        {"bytes", lora_bytes},
        {"fits", lora_fits}}}};
}

void MemoryPlan::print(const std::string& model) const {
  fmt::print("\n{} on {}, {}\n", printable_line(model), device.name, bytes(device.memory_bytes));
  const auto line = [](const char* name, int64_t n, const std::string& what) {
    fmt::print("      {:<18} {:>10}  {}\n", name, bytes(n), what);
  };
  line("weights", weight_bytes, fmt::format("{} parameters in {}", parameters, dtype));
  line("temporary buffers", temporary_bytes,
       fmt::format("passes of {} tokens, logits of {} sequences", rows, running));
  line("left", left_bytes,
       fmt::format("a sequence takes {}, and {} for each {} tokens", bytes(sequence_bytes),
                   bytes(block_bytes), block_tokens));
  for (const Context& c : contexts)
    line(fmt::format("{} tokens", context_name(c.tokens)).c_str(), c.bytes, fmt::format("{} at once", c.fit));
  fmt::print("      {:<18} {:>8.0f} B", "cache per token", token_bytes);
  if (all_mla_token_bytes > 0) {
    const int64_t less = percent_less(token_bytes, all_mla_token_bytes);
    fmt::print("  with MLA in every layer {:.0f} B: -{}.{} %", all_mla_token_bytes, less / 10, less % 10);
  }
  fmt::print("\n");
  line("full training", training_bytes,
       fmt::format("{} bytes an element beside the weights ({}): {}", training_bytes_per_element,
                   training_bytes_per_element == 16 ? "gradient, moments, masters" : "gradient, moments",
                   training_fits ? "fits, activations apart" : "does not fit"));
  line("  in 8 bits", training_8bit_bytes,
       fmt::format("the same with learn.optimizer_state 8bit: {}",
                   training_8bit_fits ? "fits, activations apart" : "does not fit"));
  line("LoRA training", lora_bytes,
       fmt::format("rank {}, {} parameters, passes of {} tokens, the weights once: {}", lora_rank, lora_parameters,
                   lora_tokens, lora_fits ? "fits beside sampling" : "does not fit"));
}

}  // namespace perigee::apps
