#include "policy/weights/adapter_checkpoint.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <set>

#include "base/error.h"
#include "base/file.h"
#include "base/json.h"
#include "base/text.h"
#include "policy/weights/safetensors.h"

namespace perigee::policy {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr const char* kWeights = "adapter_model.safetensors";
constexpr const char* kHead = "adapter_config.json";

std::string file_in(const std::string& directory, const char* name) { return (fs::path(directory) / name).string(); }

struct Piece {
  int tensor;
  TensorSpec spec;
};

std::vector<Piece> pieces_of(const AdapterLayout& layout) {
  std::vector<Piece> pieces;
  for (const AdapterLayout::Adapter& a : layout.adapters()) {
    const std::string name = "base_model.model." + a.module;
    for (const auto& [tensor, suffix] : {std::pair{a.a, ".lora_A.weight"}, std::pair{a.b, ".lora_B.weight"}}) {
      const ParamSpec& t = layout.tensor(tensor);
      pieces.push_back({tensor, {name + suffix, TensorType::kF32, {t.n, t.k}}});
    }
  }
  return pieces;
}

const json& given(const json& object, const char* key, const std::string& where) {
  const auto it = object.find(key);
  if (it == object.end() || it->is_null()) throw_input("{}: {}: missing", where, key);
  return *it;
}

template <class T>
T need(const json& object, const char* key, const std::string& where) {
  const auto it = object.find(key);
  try {
    if (it != object.end()) return it->template get<T>();
  } catch (const json::exception&) {
  }
  throw_input("{}: {}: missing, or of another type", where, key);
}

}  // namespace

bool is_adapter_directory(const std::string& directory) { return file_exists(file_in(directory, kHead)); }

void save_adapter(const std::string& directory, const AdapterLayout& layout, const float* flat, const BaseReference& base) {
  make_directories(directory);
  if (file_exists(file_in(directory, "model.safetensors")))
    throw_input("{}: holds a model; choose another directory for the adapters", directory);
  const std::vector<Piece> pieces = pieces_of(layout);
  std::vector<TensorSpec> specs;
  for (const Piece& p : pieces) specs.push_back(p.spec);
  SafetensorsWriter writer(file_in(directory, kWeights), specs, {{"format", "pt"}});
  std::vector<float> values;
  for (const Piece& p : pieces) {
    values.resize(static_cast<size_t>(p.spec.elements()));
    layout.read_flat(flat, p.tensor, values.data());
    writer.write_float32(values.data(), p.spec.elements(), TensorType::kF32);
  }
  writer.commit();
  const LoraConfig& lora = layout.config();
  const json head = {{"peft_type", "LORA"},
                     {"task_type", "CAUSAL_LM"},
                     {"r", lora.rank},
                     {"lora_alpha", lora.alpha},
                     {"lora_dropout", 0.0},
                     {"bias", "none"},
                     {"target_modules", lora.targets},
                     {"base_model_name_or_path", base.model.value("path", "")},
                     {"perigee",
                      {{"base", base.model}, {"dtype", base.dtype}, {"fingerprint", base.fingerprint}, {"seed", lora.seed}}}};
  write_file_atomic(file_in(directory, kHead), head.dump(1) + "\n");
  write_file_atomic(file_in(directory, "config.json"), to_json(layout.base().config()).dump(1) + "\n");
}

AdapterHead read_adapter_head(const std::string& directory) {
  const std::string path = file_in(directory, kHead);
  const json head = parse_json(read_file(path, uint64_t{16} << 20), path);
  if (!head.is_object() || !head.contains("perigee") || !head["perigee"].is_object())
    throw_input("{}: no object \"perigee\", which says which model the adapters belong to", path);
  const json& own = head["perigee"];
  AdapterHead out;
  // As they stand: what is no whole number, no list of names, is refused where a run's are.
  json lora;
  lora["rank"] = given(head, "r", path);
  lora["alpha"] = given(head, "lora_alpha", path);
  lora["targets"] = given(head, "target_modules", path);
  lora["seed"] = given(own, "seed", path);
  out.lora = parse_lora_config(lora, path, "");
  out.base.model = need<json>(own, "base", path);
  out.base.dtype = need<std::string>(own, "dtype", path);
  out.base.fingerprint = need<std::string>(own, "fingerprint", path);
  if (!out.base.model.is_object()) throw_input("{}: perigee.base: an object is expected", path);
  return out;
}

std::vector<float> load_adapter(const std::string& directory, const AdapterLayout& layout) {
  const SafetensorsFile file(file_in(directory, kWeights));
  const std::vector<Piece> pieces = pieces_of(layout);
  std::set<std::string> known;
  for (const Piece& p : pieces) known.insert(p.spec.name);
  for (const TensorView& t : file.tensors())
    if (!known.contains(t.name))
      throw_input("{}: tensor {} is not an adapter of this configuration", file.path(), quote(t.name, 120));
  std::vector<float> flat(static_cast<size_t>(layout.elements()), 0.0f);
  for (const Piece& p : pieces) {
    const TensorView* view = file.find(p.spec.name);
    if (view == nullptr) throw_input("{}: tensor {} is missing", file.path(), p.spec.name);
    if (!std::ranges::equal(view->shape, p.spec.shape))
      throw_input("{}: tensor {}: shape {}, but the configuration asks for {}", file.path(), p.spec.name,
                  shape_text(view->shape), shape_text(p.spec.shape));
    const std::vector<float> values = to_float32(*view);
    if (const auto bad = first_non_finite(values.data(), view->elements))
      throw_input("{}: tensor {} holds {} at element {}", file.path(), p.spec.name,
                  std::isnan(values[static_cast<size_t>(*bad)]) ? "NaN" : "infinity", *bad);
    layout.write_flat(flat.data(), p.tensor, values.data());
  }
  return flat;
}

}  // namespace perigee::policy
