#include "policy/weights/checkpoint.h"

#include <cmath>
#include <filesystem>
#include <unordered_set>

#include "base/file.h"
#include "base/text.h"
#include "policy/weights/safetensors_set.h"

namespace perigee::policy {
namespace {

int64_t element_count(const CheckpointTensor& t) {
  int64_t count = 1;
  for (int64_t s : t.shape) count *= s;
  return count;
}

}  // namespace

LoadedModel load_model(const std::string& directory, Dtype dtype, MatrixForm matrices) {
  LoadedModel out;
  auto layout = std::make_shared<ParamLayout>(load_model_config(directory), dtype, matrices);
  const SafetensorsSet set(directory);
  std::unordered_set<std::string> known;
  for (const CheckpointTensor& t : layout->checkpoint()) known.insert(t.name);
  for (const TensorView* t : set.tensors())
    if (!known.contains(t->name))
      throw_input("{}: tensor {} is not part of the architecture in {}/config.json", t->file,
                  quote(t->name, 120), directory);

  out.flat.assign(static_cast<size_t>(layout->elements()), 0.0f);
  std::vector<float> values;
  for (const CheckpointTensor& t : layout->checkpoint()) {
    const TensorView& view = set.need(t.name, t.shape);
    values.resize(static_cast<size_t>(view.elements));
    to_float32(view, 0, view.elements, values.data());
    if (const auto bad = first_non_finite(values.data(), view.elements))
      throw_input("{}: tensor {} holds {} at element {}", view.file, t.name,
                  std::isnan(values[static_cast<size_t>(*bad)]) ? "NaN" : "infinity", *bad);
    layout->write_flat(out.flat.data(), t, values.data());
  }
  out.layout = std::move(layout);
  return out;
}

void save_model(const std::string& directory, const ParamLayout& layout, const float* flat, Dtype dtype,
                int64_t max_shard_bytes, bool overwrite) {
  namespace fs = std::filesystem;
  if (!overwrite && fs::exists(fs::path(directory) / "config.json"))
    throw_input("{}: already holds a model; choose another directory", directory);
  make_directories(directory);
  std::vector<TensorSpec> specs;
  for (const CheckpointTensor& t : layout.checkpoint())
    specs.push_back({t.name, t.f32_in_file ? TensorType::kF32 : tensor_type_of(dtype), t.shape});
  SafetensorsSetWriter writer(directory, specs, max_shard_bytes, {{"format", "pt"}});
  std::vector<float> values;
  for (const CheckpointTensor& t : layout.checkpoint()) {
    values.resize(static_cast<size_t>(element_count(t)));
    layout.read_flat(flat, t, values.data());
    writer.write_float32(values.data(), static_cast<int64_t>(values.size()));
  }
  writer.commit();
  ModelConfig config = layout.config();
  config.dtype = dtype;
  write_file_atomic((fs::path(directory) / "config.json").string(), to_json(config).dump(1) + "\n");
}

}  // namespace perigee::policy
