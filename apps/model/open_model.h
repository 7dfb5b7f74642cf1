// A model directory opened for computing: layout, weights, tokenizer, on the CPU or on the GPU.
#pragma once
#include <functional>
#include <memory>
#include <string>

#include "policy/device/resident.h"
#include "policy/engine/backend.h"
#include "policy/engine/engine.h"
#include "policy/learn/trainer.h"
#include "policy/model/adapter.h"
#include "policy/tokenizer/tokenizer.h"

#include "apps/command_line/command.h"

namespace perigee::apps {

class OpenModel {
 public:
  struct Options {
    std::string dtype = "auto";   // "float32", "bfloat16", or "auto" for that of the checkpoint
    std::string device = "cpu";   // or "cuda"
    bool portable = false;        // on a GPU: activations in float32 whatever the weights are, with the bits of the CPU
    // Called when all is there but the weights, which take long: the place to refuse what cannot be done.
    std::function<void(const OpenModel&)> before_weights;
  };

  // A directory of adapters (policy/weights/adapter_checkpoint.h) opens the model they stand beside too.
  // ERRORS (input): what load_model says; adapters whose model cannot be had here; no GPU, or a model that its kernels do
  // not take. (environment): the weights alone do not fit into the GPU's memory, with the numbers.
  explicit OpenModel(const std::string& directory) : OpenModel(directory, Options()) {}
  OpenModel(const std::string& directory, const Options& options);
  ~OpenModel();

  const policy::ParamLayout& layout() const { return *layout_; }
  const policy::ModelConfig& config() const { return layout_->config(); }
  const policy::Tokenizer& tokenizer() const { return *tokenizer_; }
  bool on_gpu() const { return device_ != nullptr; }
  std::string place() const;  // "the CPU", "NVIDIA H200"
  // What an engine or a trainer is handed: the arena of the weights (of a whole model on a GPU: in its memory), or of the
  // adapters (on the host).
  bool has_adapters() const { return adapters_ != nullptr; }
  const std::byte* arena() const { return adapters_ ? adapter_arena_.data() : weights_.data(); }
  // A word that other weights, or the same in another type, do not have: a hash of all of them.
  std::string fingerprint() const;

  // Of sequences, where this model computes.
  policy::StateLayout state_layout() const;
  // Bytes of the GPU's memory, as much as was free when the model was opened, that states may take beside the weights and an
  // engine's temporaries. < 0: not even those fit. REQUIRES on_gpu().
  int64_t room_for_states(const policy::EngineConfig& engine) const;
  // ERRORS (environment): weights, temporaries and engine.memory_bytes do not fit into the GPU's memory, with the numbers;
  // advice: what to do. On the CPU memory is taken as it is needed: nothing is refused.
  void check_room(const policy::EngineConfig& engine, const std::string& advice) const;

  // One after the other on a GPU: the former is gone before the next is made. It is used on one thread, and dies before
  // this object does; set_weights takes arenas of this model and of other_weights().
  std::unique_ptr<policy::Backend> engine_backend(kernels::Context& ctx, const policy::EngineConfig& engine) const;
  // Log-probability of each token of `tokens` given those before it; 0 for the first.
  std::vector<float> score(kernels::Context& ctx, const std::vector<int32_t>& tokens, float temperature) const;

  // Weights of another directory for the place of these: of the same architecture, and when they are adapters, beside the
  // same model. ERRORS (input): they are not. Thread safe.
  policy::ResidentWeights other_weights(const std::string& directory) const;
  // They are this model's from now on: an engine was given them already.
  void replace_weights(policy::ResidentWeights weights);

 private:
  void open_whole(const std::string& directory, policy::Dtype dtype);
  void open_adapters(const std::string& directory);
  void make_layout(const policy::ModelConfig& config, policy::Dtype dtype);
  void before_weights() const;
  policy::ResidentWeights load(const std::string& directory, kernels::Device* device) const;
  void weights_from_seed(const nlohmann::json& model, const std::string& directory);
  int64_t passes_bytes(const policy::EngineConfig& engine) const;
  kernels::Device& device(int64_t scratch_bytes) const;

  const Options options_;
  int64_t free_bytes_ = 0;  // of the GPU, before anything of this model lay there
  mutable std::unique_ptr<kernels::Device> device_;
  std::shared_ptr<const policy::ParamLayout> layout_;
  mutable policy::ResidentWeights weights_;  // an engine on a GPU writes others there
  policy::ResidentWeights adapter_arena_;
  std::unique_ptr<const policy::AdapterLayout> adapters_;
  std::string base_fingerprint_;  // of the model that the adapters say they stand beside
  std::unique_ptr<policy::Tokenizer> tokenizer_;
};

// --device and --dtype of the commands that open a model.
void declare_place(Command& command, OpenModel::Options& options);
// ERRORS (input): names the option and the values it takes.
policy::Dtype parse_dtype(const std::string& name);
void check_device_name(const std::string& name);

}  // namespace perigee::apps
