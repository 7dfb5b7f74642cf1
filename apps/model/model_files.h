// A model directory opened for computing: layout, weights arena, tokenizer.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "kernels/sampling/sampling.h"
#include "policy/device/resident.h"
#include "policy/engine/backend.h"
#include "policy/learn/trainer.h"
#include "policy/model/adapter.h"
#include "policy/tokenizer/tokenizer.h"

#include "apps/command_line/command.h"

namespace perigee::apps {

class OpenModel {
 public:
  // A directory of adapters (policy/weights/adapter_checkpoint.h) opens the model they stand beside too.
  // dtype: "float32", "bfloat16", or "auto" for that of the checkpoint. ERRORS (input): what load_model says; adapters
  // whose model cannot be had here.
  OpenModel(const std::string& directory, const std::string& dtype);

  const policy::ParamLayout& layout() const { return *layout_; }
  const policy::ModelConfig& config() const { return layout_->config(); }
  // What an engine or a trainer is handed: the arena of the weights, or of the adapters.
  bool has_adapters() const { return adapters_ != nullptr; }
  const std::byte* arena() const { return adapters_ ? adapter_arena_.data() : weights_.data(); }
  // A word that other weights, or the same in another type, do not have: a hash of all of them.
  std::string fingerprint() const;
  std::unique_ptr<policy::Backend> engine_backend(kernels::Context& ctx, int64_t memory_bytes) const;
  std::unique_ptr<policy::Trainer> trainer(kernels::Context& ctx) const;
  const policy::Tokenizer& tokenizer() const { return *tokenizer_; }

 private:
  void open(const std::string& directory, policy::Dtype dtype);
  void open_adapters(const std::string& directory, const std::string& dtype);

  std::shared_ptr<const policy::ParamLayout> layout_;
  policy::ResidentWeights weights_, adapter_arena_;
  std::unique_ptr<const policy::AdapterLayout> adapters_;
  std::unique_ptr<policy::Tokenizer> tokenizer_;
};

// ERRORS (input): names the option and the values it takes.
policy::Dtype parse_dtype(const std::string& name);

// "1,2,3" or "[1, 2, 3]" or numbers separated by blanks. ERRORS (input): not a number, or outside [0, vocab).
std::vector<int32_t> parse_ids(const std::string& text, int64_t vocab);

// The sampling options of generate.
struct SamplingOptions {
  double temperature = 1, top_p = 1, min_p = 0;
  int64_t top_k = 0;
  double repetition_penalty = 1, presence_penalty = 0, frequency_penalty = 0;
  std::vector<std::string> logit_bias;  // ID=B
  int64_t seed = 0;
  kernels::SamplingParams params(int64_t vocab) const;  // ERRORS (input): out of range
};
void declare_sampling(Command& command, SamplingOptions& options);

}  // namespace perigee::apps
