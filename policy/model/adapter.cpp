#include "policy/model/adapter.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>

#include "base/error.h"
#include "base/json.h"
#include "base/random.h"
#include "base/text.h"

namespace perigee::policy {
namespace {

using nlohmann::json;

const std::vector<std::string>& known_targets() {
  static const std::vector<std::string> names = {
      "q_proj",   "k_proj",   "v_proj",   "o_proj",             "f_a_proj",  "f_b_proj", "a_proj",    "b_proj", "e_a_proj",
      "e_b_proj", "g_a_proj", "g_b_proj", "kv_a_proj_with_mqa", "gate_proj", "up_proj",  "down_proj", "w1",     "w3",       "w2"};
  return names;
}

// Modules of the architecture that have no adapters here, and why.
const std::map<std::string, std::string>& refused_targets() {
  static const std::map<std::string, std::string> reasons = {
      {"kv_b_proj", "it is multiplied head by head into query and output, which adapters do not follow"},
      {"experts", "name an expert's matrices: w1 (gate), w3 (up), w2 (down)"},
      {"gate", "the router is frozen"},
      {"embed_tokens", "the embedding is frozen"},
      {"lm_head", "the head is frozen"},
      {"q_conv1d", "convolutions are frozen"},
      {"k_conv1d", "convolutions are frozen"},
      {"v_conv1d", "convolutions are frozen"},
  };
  return reasons;
}

// "model.layers.3.self_attn.q_proj" of "model.layers.3.self_attn.q_proj.weight".
std::string module_of(const std::string& tensor) {
  return tensor.substr(0, tensor.rfind('.'));
}

std::string last_name(const std::string& module) {
  return module.substr(module.rfind('.') + 1);
}

}  // namespace

LoraConfig parse_lora_config(const json& value, std::string_view where, std::string_view prefix) {
  JsonReader in(value, where, prefix);
  LoraConfig c;
  c.rank = in.integer("rank", 1, kMostRank, c.rank);
  c.alpha = in.number("alpha", 1e-3, 1e6, static_cast<double>(2 * c.rank));
  c.seed = static_cast<uint64_t>(in.integer("seed", 0, int64_t{1} << 53, 0));
  if (const json* list = in.find("targets"); list != nullptr && !list->is_null()) {
    if (!list->is_array() || list->empty())
      in.fail("targets", fmt::format("{} is not a list of module names such as [\"q_proj\", \"v_proj\"]", json_brief(*list)));
    c.targets.clear();
    for (const json& item : *list) {
      if (!item.is_string()) in.fail("targets", fmt::format("{} is not a module's name", json_brief(item)));
      const std::string name = item.get<std::string>();
      if (const auto refused = refused_targets().find(name); refused != refused_targets().end())
        in.fail("targets", fmt::format("{} takes no adapter: {}", name, refused->second));
      if (std::find(known_targets().begin(), known_targets().end(), name) == known_targets().end()) {
        const std::string hint = did_you_mean(name, known_targets());
        in.fail("targets", fmt::format("unknown module {}{}", quote(name),
                                       hint.empty() ? "; known are " + join(known_targets()) : hint));
      }
      if (std::find(c.targets.begin(), c.targets.end(), name) != c.targets.end())
        in.fail("targets", fmt::format("{} is there twice", name));
      c.targets.push_back(name);
    }
  }
  in.finish();
  return c;
}

json to_json(const LoraConfig& c) {
  return {{"rank", c.rank}, {"alpha", c.alpha}, {"targets", c.targets}, {"seed", c.seed}};
}

AdapterLayout::AdapterLayout(const ParamLayout& base, LoraConfig config)
    : ArenaLayout(base.dtype(), base.matrices()), base_(base), config_(std::move(config)) {
  PERIGEE_CHECK(config_.rank >= 1 && config_.rank <= kMostRank && !config_.targets.empty());
  const bool tiles = base.matrices() == MatrixForm::kTiles;
  if (tiles && config_.rank % 8 != 0)
    throw_input("lora.rank is {}: bfloat16 on a GPU takes multiples of 8", config_.rank);
  std::vector<bool> met(config_.targets.size(), false);
  std::map<int, std::vector<Part>> parts;  // by tensor
  for (const CheckpointTensor& t : base.checkpoint()) {
    if (t.piece != CheckpointTensor::Piece::kRows || t.shape.size() != 2) continue;
    const std::string module = module_of(t.name);
    const auto found = std::find(config_.targets.begin(), config_.targets.end(), last_name(module));
    const bool wanted = found != config_.targets.end();
    if (wanted) {
      met[static_cast<size_t>(found - config_.targets.begin())] = true;
      Adapter a;
      a.module = module;
      a.base = t.tensor;
      a.row = t.row_offset;
      a.n = t.shape[0];
      a.k = t.shape[1];
      a.a = add(module + ".lora_A", TensorForm::kPanels, config_.rank, a.k);
      a.b = add(module + ".lora_B", TensorForm::kPanels, a.n, config_.rank);
      adapters_.push_back(std::move(a));
    }
    parts[t.tensor].push_back({t.row_offset, t.shape[0], wanted ? static_cast<int>(adapters_.size()) - 1 : -1});
  }
  for (size_t i = 0; i < met.size(); ++i)
    if (!met[i]) throw_input("lora.targets: no layer of the model has {}", config_.targets[i]);

  of_tensor_.resize(base.tensors().size());
  const int64_t unit = tiles ? 64 : kernels::kPanel;
  for (const auto& [tensor, list] : parts) {
    const bool adapted = std::any_of(list.begin(), list.end(), [](const Part& p) { return p.adapter >= 0; });
    if (!adapted) continue;
    // Those of experts are added to whole products, so that theirs may be cut anywhere.
    const bool expert = base.tensor(tensor).name.find(".expert_") != std::string::npos;
    for (const Part& p : list)
      if (p.row % unit != 0 && !expert)
        throw_input("lora.targets: gate_proj and up_proj of {} have {} outputs each; adapters take multiples of {}",
                    base.tensor(tensor).name, p.row, unit);
    of_tensor_[static_cast<size_t>(tensor)] = {static_cast<int32_t>(parts_.size()), static_cast<int32_t>(list.size())};
    parts_.insert(parts_.end(), list.begin(), list.end());
  }
}

std::span<const AdapterLayout::Part> AdapterLayout::parts(int base_tensor) const {
  const Range r = of_tensor_[static_cast<size_t>(base_tensor)];
  return {parts_.data() + r.begin, static_cast<size_t>(r.count)};
}

void AdapterLayout::read_flat(const float* flat, int i, float* values) const {
  const ParamSpec& t = tensor(i);
  for (int64_t r = 0; r < t.n; ++r)
    for (int64_t c = 0; c < t.k; ++c) *values++ = flat[t.element_offset + t.index(r, c)];
}

void AdapterLayout::write_flat(float* flat, int i, const float* values) const {
  const ParamSpec& t = tensor(i);
  for (int64_t r = 0; r < t.n; ++r)
    for (int64_t c = 0; c < t.k; ++c) flat[t.element_offset + t.index(r, c)] = *values++;
}

void initialize_adapter(const AdapterLayout& layout, float* flat) {
  std::memset(flat, 0, static_cast<size_t>(layout.elements()) * 4);
  for (const AdapterLayout::Adapter& a : layout.adapters()) {
    const ParamSpec& t = layout.tensor(a.a);
    Random random(layout.config().seed, static_cast<uint64_t>(a.a));
    const double deviation = 1 / std::sqrt(static_cast<double>(t.k));
    for (int64_t r = 0; r < t.n; ++r)
      for (int64_t c = 0; c < t.k; ++c)
        flat[t.element_offset + t.index(r, c)] = static_cast<float>(deviation * random.next_normal());
  }
}

}  // namespace perigee::policy
