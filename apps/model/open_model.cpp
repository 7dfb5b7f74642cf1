#include "apps/model/open_model.h"

#include <algorithm>

#include "base/error.h"
#include "base/text.h"
#include "policy/device/backend.h"
#include "policy/device/initialize.h"
#include "policy/device/learn.h"
#include "policy/device/scorer.h"
#include "policy/device/transfer.h"
#include "policy/learn/backend.h"
#include "policy/weights/adapter_checkpoint.h"
#include "policy/weights/checkpoint.h"

namespace perigee::apps {
namespace {

using policy::Dtype;
using policy::MatrixForm;
using policy::ResidentWeights;

constexpr int64_t kLittleScratch = int64_t{1} << 20;   // to open a device with and to load by
constexpr int64_t kGraphBytes = int64_t{512} << 20;    // of decoding steps, and states that are taken in pieces
constexpr int64_t kMostDecodingPad = 64;               // rows that a decoding step is rounded up by

std::string size_text(int64_t bytes) { return human_bytes(static_cast<uint64_t>(bytes)); }

// A backend over weights that lie on the device in one place: others are copied there.
class InPlace : public policy::Backend {
 public:
  InPlace(kernels::Device& device, std::unique_ptr<policy::Backend> inner, std::byte* place, int64_t bytes)
      : device_(device), inner_(std::move(inner)), place_(place), bytes_(bytes) {}
  policy::StatePool& pool() override { return inner_->pool(); }
  void set_weights(const std::byte* weights) override {
    if (weights != place_) {
      device_.copy(place_, weights, bytes_);
      device_.synchronize();
    }
    inner_->set_weights(place_);
  }
  const float* forward(std::span<const int32_t> tokens, std::span<const policy::SequenceSlice> slices,
                       std::span<const uint8_t> wanted, std::span<Score> scores) override {
    return inner_->forward(tokens, slices, wanted, scores);
  }
  const float* keep(const float* logits) override { return inner_->keep(logits); }
  void release(const float* kept) override { inner_->release(kept); }
  void draw(std::span<Draw> draws) override { inner_->draw(draws); }
  void end_step() override { inner_->end_step(); }

 private:
  kernels::Device& device_;
  std::unique_ptr<policy::Backend> inner_;
  std::byte* place_;
  int64_t bytes_;
};

int64_t rows_of(const policy::EngineConfig& engine) { return std::max(engine.prefill_chunk, engine.max_running); }

}  // namespace

policy::Dtype parse_dtype(const std::string& name) {
  if (name == "float32") return Dtype::kF32;
  if (name == "bfloat16") return Dtype::kBf16;
  throw_input("--dtype {}: float32 or bfloat16 is expected", quote(name));
}

void check_device_name(const std::string& name) {
  if (name != "cpu" && name != "cuda") throw_input("--device {}: cpu or cuda is expected", quote(name));
}

void declare_place(Command& command, OpenModel::Options& o) {
  command
      .option("--device", o.device, "NAME", "cpu or cuda: where it computes. float32 gives the same bits on both")
      .option("--dtype", o.dtype, "NAME", "compute with float32 or bfloat16 weights; auto: as in the checkpoint");
}

OpenModel::OpenModel(const std::string& directory, const Options& options) : options_(options) {
  check_device_name(options_.device);
  if (options_.dtype != "auto") parse_dtype(options_.dtype);
  const bool adapters = policy::is_adapter_directory(directory);
  // Before a GPU is looked for: a mistyped directory is the likelier mistake.
  const Dtype checkpoint = adapters ? Dtype::kF32 : policy::load_model_config(directory).dtype;
  if (options_.device == "cuda") {
    if (kernels::Device::count() == 0)
      throw_input("--device cuda: {}; use --device cpu", kernels::Device::why_none());
    free_bytes_ = device(kLittleScratch).info().free_bytes;
  }
  if (adapters)
    open_adapters(directory);
  else
    open_whole(directory, options_.dtype == "auto" ? checkpoint : parse_dtype(options_.dtype));
}

OpenModel::~OpenModel() = default;

std::string OpenModel::place() const { return on_gpu() ? device_->info().name : "the CPU"; }

void OpenModel::make_layout(const policy::ModelConfig& config, Dtype dtype) {
  const bool tiles = on_gpu() && dtype == Dtype::kBf16 && !options_.portable;
  layout_ = std::make_shared<const policy::ParamLayout>(config, dtype, tiles ? MatrixForm::kTiles : MatrixForm::kPanels);
  if (on_gpu()) policy::check_device_model(*layout_);
}

void OpenModel::before_weights() const {
  if (on_gpu() && layout_->weight_bytes() > free_bytes_)
    throw_environment("the weights take {} ({} parameters in {}), and {} has {} free", size_text(layout_->weight_bytes()),
                      layout_->parameter_count(), layout_->dtype() == Dtype::kBf16 ? "bfloat16" : "float32", place(),
                      size_text(free_bytes_));
  if (options_.before_weights) options_.before_weights(*this);
}

ResidentWeights OpenModel::load(const std::string& directory, kernels::Device* device) const {
  if (device == nullptr) {
    const policy::LoadedModel model = policy::load_model(directory, layout_->dtype());
    auto weights = ResidentWeights::create(nullptr, layout_->weight_bytes());
    layout_->flat_to_weights(model.flat.data(), weights.writable());
    return weights;
  }
  auto weights = ResidentWeights::create(device, layout_->weight_bytes());
  policy::device_load(*device, *layout_, directory, weights.writable());
  device->synchronize();
  return weights;
}

void OpenModel::open_whole(const std::string& directory, Dtype dtype) {
  make_layout(policy::load_model_config(directory), dtype);
  tokenizer_ = policy::load_tokenizer(directory, layout_->config());
  before_weights();
  weights_ = load(directory, device_.get());
}

// The frozen model of adapters that were trained beside one that came from a seed.
void OpenModel::weights_from_seed(const nlohmann::json& model, const std::string& directory) {
  const std::string made_on = model.value("made_on", "");
  const bool tiles = layout_->matrices() == MatrixForm::kTiles;
  if (made_on == "cuda" && !tiles)
    throw_input("{}: its adapters stand beside a model that a GPU made from a seed, which the CPU cannot make again{}",
                directory, on_gpu() ? "" : "; use --device cuda");
  if (!model.contains("seed") || (made_on != "cpu" && made_on != "cuda"))
    throw_input("{}: adapter_config.json does not say where the model of its adapters comes from", directory);
  const auto seed = model["seed"].get<uint64_t>();
  weights_ = ResidentWeights::create(device_.get(), layout_->weight_bytes());
  if (made_on == "cuda") {
    policy::device_initialize(*device_, *layout_, seed, weights_.writable());
  } else {
    std::vector<float> flat(static_cast<size_t>(layout_->elements()));
    policy::initialize(*layout_, seed, flat.data());
    if (!on_gpu()) {
      layout_->flat_to_weights(flat.data(), weights_.writable());
      return;
    }
    std::vector<std::byte> arena(static_cast<size_t>(layout_->weight_bytes()));
    layout_->flat_to_weights(flat.data(), arena.data());
    device_->copy_in(weights_.writable(), arena.data(), layout_->weight_bytes());
  }
  device_->synchronize();
}

void OpenModel::open_adapters(const std::string& directory) {
  const policy::AdapterHead head = policy::read_adapter_head(directory);
  const Dtype type = parse_dtype(options_.dtype == "auto" ? head.base.dtype : options_.dtype);
  const std::string path = head.base.model.value("path", "");
  const std::string place = path.empty() ? directory : path;
  make_layout(policy::load_model_config(place), type);
  adapters_ = std::make_unique<const policy::AdapterLayout>(*layout_, head.lora);
  tokenizer_ = policy::load_tokenizer(place, layout_->config());
  before_weights();
  if (path.empty())
    weights_from_seed(head.base.model, directory);
  else
    weights_ = load(path, device_.get());
  base_fingerprint_ = head.base.fingerprint;
  // A fingerprint is of the form that the run computed with: that of bfloat16 differs between the CPU and a GPU.
  const bool tiles = layout_->matrices() == MatrixForm::kTiles;
  const bool comparable =
      type == Dtype::kF32 || (path.empty() && tiles == (head.base.model.value("made_on", "") == "cuda"));
  if (options_.dtype == "auto" && comparable) {
    const std::string mine = on_gpu() ? policy::weights_fingerprint(*device_, weights_.data(), weights_.bytes())
                                      : policy::weights_fingerprint(weights_.data(), weights_.bytes());
    if (mine != head.base.fingerprint)
      throw_input("{}: its adapters belong to a model with fingerprint {}, and {} gives one with {}", directory,
                  head.base.fingerprint, path.empty() ? "the seed" : path, mine);
  }
  adapter_arena_ = ResidentWeights::create(nullptr, adapters_->weight_bytes());
  adapters_->flat_to_weights(policy::load_adapter(directory, *adapters_).data(), adapter_arena_.writable());
}

std::string OpenModel::fingerprint() const {
  std::string word = on_gpu() ? policy::weights_fingerprint(*device_, weights_.data(), weights_.bytes())
                              : policy::weights_fingerprint(weights_.data(), weights_.bytes());
  if (adapters_) word += "+" + policy::weights_fingerprint(adapter_arena_.data(), adapter_arena_.bytes());
  return word;
}

policy::StateLayout OpenModel::state_layout() const {
  return on_gpu() ? policy::device_state_layout(*layout_) : policy::StateLayout(config());
}

// One device object: its block of temporaries grows by making it anew. What is mapped stays: it is the process's.
kernels::Device& OpenModel::device(int64_t scratch_bytes) const {
  if (!device_ || static_cast<int64_t>(device_->scratch.capacity_bytes()) < scratch_bytes) {
    device_.reset();
    device_ = std::make_unique<kernels::Device>(0, scratch_bytes);
  }
  return *device_;
}

// What an engine takes of a GPU beside weights and states: temporaries, logits of the sequences that decode and of the prompts
// that end in the same step, graphs, and adapters.
int64_t OpenModel::passes_bytes(const policy::EngineConfig& engine) const {
  const int64_t rows = rows_of(engine);
  const int64_t scratch =
      adapters_ ? policy::device_scratch_bytes(*adapters_, rows) : policy::device_scratch_bytes(*layout_, rows);
  return scratch + 2 * (engine.max_running + kMostDecodingPad) * (config().vocab_size * 4 + 12) + kGraphBytes +
         (adapters_ ? adapters_->weight_bytes() : 0);
}

int64_t OpenModel::room_for_states(const policy::EngineConfig& engine) const {
  PERIGEE_CHECK(on_gpu());
  return free_bytes_ - layout_->weight_bytes() - passes_bytes(engine);
}

void OpenModel::check_room(const policy::EngineConfig& engine, const std::string& advice) const {
  if (!on_gpu() || engine.memory_bytes <= room_for_states(engine)) return;
  throw_environment(
      "{} of GPU memory are needed, and {} has {} free (weights {}, passes of {} tokens and logits for {} at a time {}, states "
      "{}); {}",
      size_text(layout_->weight_bytes() + passes_bytes(engine) + engine.memory_bytes), place(), size_text(free_bytes_),
      size_text(layout_->weight_bytes()), rows_of(engine), engine.max_running, size_text(passes_bytes(engine)),
      size_text(engine.memory_bytes), advice);
}

std::unique_ptr<policy::Backend> OpenModel::engine_backend(kernels::Context& ctx, const policy::EngineConfig& engine) const {
  if (!on_gpu())
    return adapters_ ? policy::host_backend(ctx, *adapters_, weights_.data(), engine.memory_bytes)
                     : policy::host_backend(ctx, *layout_, engine.memory_bytes);
  if (adapters_)
    return policy::device_backend(device(policy::device_scratch_bytes(*adapters_, rows_of(engine))), *adapters_, engine,
                                  weights_.data());
  kernels::Device& where = device(policy::device_scratch_bytes(*layout_, rows_of(engine)));
  return std::make_unique<InPlace>(where, policy::device_backend(where, *layout_, engine, weights_.data()),
                                   weights_.writable(), weights_.bytes());
}

std::vector<float> OpenModel::score(kernels::Context& ctx, const std::vector<int32_t>& tokens, float temperature) const {
  const auto n = static_cast<int64_t>(tokens.size());
  if (on_gpu() && !adapters_) {
    std::vector<float> logprobs(tokens.size(), 0.0f);
    if (n < 2) return logprobs;
    std::vector<policy::ScoredSequence> sequences(1);
    sequences[0].tokens = tokens;
    sequences[0].temperature = temperature;
    policy::device_score(device(policy::device_score_scratch_bytes(*layout_, n)), {layout_.get(), weights_.data()}, n,
                         sequences);
    std::ranges::copy(sequences[0].logprobs, logprobs.begin() + 1);
    return logprobs;
  }
  policy::TrainSequence sequence;
  sequence.tokens = tokens;
  sequence.mask.assign(tokens.size(), 1);
  sequence.mask[0] = 0;
  sequence.mu.assign(tokens.size(), 0.0f);
  sequence.temperature = temperature;
  const policy::TrainerConfig trainer;
  const auto backend = [&]() -> std::unique_ptr<policy::LearnBackend> {
    if (on_gpu())
      return policy::device_learn_backend(device(policy::device_learn_scratch_bytes(*adapters_, n, trainer.recompute)),
                                          *adapters_, trainer.recompute, weights_.data());
    return adapters_ ? policy::host_learn_backend(ctx, *adapters_, weights_.data(), trainer.recompute)
                     : policy::host_learn_backend(ctx, *layout_, trainer.recompute);
  };
  auto learner = adapters_ ? std::make_unique<policy::Trainer>(backend(), *adapters_, trainer)
                           : std::make_unique<policy::Trainer>(backend(), *layout_, trainer);
  return learner->logprobs(arena(), {sequence});
}

ResidentWeights OpenModel::other_weights(const std::string& directory) const {
  const bool adapters = policy::is_adapter_directory(directory);
  policy::ModelConfig other = policy::load_model_config(directory);
  other.dtype = config().dtype;
  if (adapters != has_adapters() || !(other == config()))
    throw_input("{}: another architecture than that of the model being served, or adapters in place of a model", directory);
  if (!adapters) {
    if (!on_gpu()) return load(directory, nullptr);
    kernels::Device device(0, kLittleScratch);  // the engine's own is at work
    return load(directory, &device);
  }
  policy::AdapterHead head = policy::read_adapter_head(directory);
  head.lora.seed = adapters_->config().seed;
  if (!(head.lora == adapters_->config()) || head.base.fingerprint != base_fingerprint_)
    throw_input("{}: its adapters stand beside another model than those being served, or have another form", directory);
  auto arena = ResidentWeights::create(nullptr, adapters_->weight_bytes());
  adapters_->flat_to_weights(policy::load_adapter(directory, *adapters_).data(), arena.writable());
  return arena;
}

void OpenModel::replace_weights(ResidentWeights weights) {
  if (adapters_)
    adapter_arena_ = std::move(weights);
  else if (!on_gpu())  // on a GPU they were copied to where the engine reads
    weights_ = std::move(weights);
}

}  // namespace perigee::apps
