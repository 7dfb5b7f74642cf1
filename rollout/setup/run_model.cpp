#include "rollout/setup/run_model.h"

#include <filesystem>

#include "base/error.h"
#include "base/hash.h"
#include "policy/weights/checkpoint.h"

namespace perigee::rollout {
namespace {

policy::ModelConfig model_config(const RunConfig& config) {
  if (!config.model.path.empty()) return policy::load_model_config(config.model.path);
  if (config.model.config.is_string()) return policy::load_model_config(config.model.config.get<std::string>());
  return policy::parse_model_config(config.model.config, "model.config");
}

}  // namespace

std::shared_ptr<const policy::ParamLayout> make_layout(const RunConfig& config) {
  const auto dtype = config.model.dtype == "bfloat16" ? policy::Dtype::kBf16 : policy::Dtype::kF32;
  const bool tiles = config.run.device == "cuda" && dtype == policy::Dtype::kBf16 && config.run.numerics != "portable";
  const auto matrices = tiles ? policy::MatrixForm::kTiles : policy::MatrixForm::kPanels;
  return std::make_shared<const policy::ParamLayout>(model_config(config), dtype, matrices);
}

std::vector<float> initial_weights(const RunConfig& config, const policy::ParamLayout& layout) {
  if (!config.model.path.empty()) return policy::load_model(config.model.path, layout.dtype(), layout.matrices()).flat;
  std::vector<float> flat(static_cast<size_t>(layout.elements()));
  policy::initialize(layout, config.seed(), flat.data());
  return flat;
}

std::unique_ptr<policy::Tokenizer> make_tokenizer(const RunConfig& config, const policy::ModelConfig& model) {
  if (!config.tokenizer.path.empty()) {
    namespace fs = std::filesystem;
    const fs::path path(config.tokenizer.path);
    const fs::path file = fs::is_directory(path) ? path / "tiktoken.model" : path;
    // Without the file the loader would take bytes for tokens: right for a model's directory, never for a path that was named.
    if (file.filename() != "tiktoken.model" || !fs::is_regular_file(file))
      throw_input("tokenizer.path: {}: no tiktoken.model there; name one, its directory, or leave the key out for bytes",
                  config.tokenizer.path);
    return policy::load_tokenizer(fs::absolute(file).parent_path().string(), model);
  }
  if (!config.model.path.empty()) return policy::load_tokenizer(config.model.path, model);
  if (model.vocab_size < policy::ByteTokenizer::kMinVocab)
    throw_input("model.config: vocab_size {} is below the {} of the byte tokenizer", model.vocab_size,
                policy::ByteTokenizer::kMinVocab);
  return std::make_unique<policy::ByteTokenizer>(model.vocab_size);
}

RunModel make_run_model(const RunConfig& config) {
  RunModel model;
  model.layout = make_layout(config);
  if (config.learn.lora) model.adapters = std::make_shared<const policy::AdapterLayout>(*model.layout, *config.learn.lora);
  return model;
}

void first_arena(const RunConfig& config, const RunModel& model, std::byte* arena) {
  if (!model.adapters) {
    model.layout->flat_to_weights(initial_weights(config, *model.layout).data(), arena);
    return;
  }
  std::vector<float> flat(static_cast<size_t>(model.adapters->elements()));
  policy::initialize_adapter(*model.adapters, flat.data());
  model.adapters->flat_to_weights(flat.data(), arena);
}

std::string arena_hash(const std::byte* arena, int64_t bytes, const std::string& base_fingerprint) {
  const std::string own = hash128(arena, static_cast<size_t>(bytes)).hex();
  if (base_fingerprint.empty()) return own;
  const std::string both = own + base_fingerprint;
  return hash128(both.data(), both.size()).hex();
}

}  // namespace perigee::rollout
