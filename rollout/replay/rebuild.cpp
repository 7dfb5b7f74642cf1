#include "rollout/replay/rebuild.h"

#include <filesystem>
#include <optional>

#include "base/error.h"
#include "rollout/setup/batch.h"
#include "rollout/weights/checkpoints.h"

namespace perigee::rollout {
namespace {

// A weights arena on a 64-byte boundary.
class Arena {
 public:
  explicit Arena(int64_t bytes) : memory_(static_cast<size_t>(bytes) + 64) {
    data_ = memory_.data() + (64 - reinterpret_cast<uintptr_t>(memory_.data()) % 64) % 64;
  }
  std::byte* data() { return data_; }

 private:
  std::vector<std::byte> memory_;
  std::byte* data_;
};

}  // namespace

Rebuilder::Rebuilder(kernels::Context& ctx, const RunConfig& config, const HostModel& model,
                     const RunTasks& tasks, StoreQueries& store, std::string run_id, std::string run_dir)
    : ctx_(ctx),
      config_(config),
      model_(model),
      tasks_(tasks),
      store_(store),
      run_id_(std::move(run_id)),
      run_dir_(std::move(run_dir)) {
  for (const int64_t step : store_.train_steps(run_id_)) {
    std::optional<TrainBatch> batch = store_.train_batch(run_id_, step);
    if (batch && batch->version_after != batch->version_before)
      batches_.emplace(batch->version_after, std::move(*batch));
  }
}

// What the learner learnt from to make this version.
std::vector<policy::TrainSequence> Rebuilder::batch_for(const PolicyVersion& version) {
  if (version.phase == "warmup") return warmup_examples(config_, tasks_, version.step);
  const auto it = batches_.find(version.version);
  if (it == batches_.end())
    throw_environment("{}: the store has no batch for version {}", run_dir_, version.version);
  std::vector<policy::TrainSequence> batch = episode_sequences(store_, it->second);
  for (policy::TrainSequence& example : ptx_examples(config_, tasks_, it->second.step))
    batch.push_back(std::move(example));
  return batch;
}

Rebuilt Rebuilder::run(uint32_t first, uint32_t last,
                       const std::function<void(uint32_t, const std::byte*)>& visit,
                       policy::StepObserver* observer) {
  std::map<uint32_t, PolicyVersion> versions;
  for (PolicyVersion& v : store_.versions(run_id_)) versions.emplace(v.version, std::move(v));
  const int64_t arena_bytes = model_.model.trained().weight_bytes();
  Arena current(arena_bytes), next(arena_bytes);
  const auto hash_of = [&](const std::byte* arena) { return model_.hash(arena); };
  std::vector<std::byte> reference;
  std::unique_ptr<policy::Trainer> trainer;
  std::string phase;
  const auto enter = [&](const std::string& name) {
    if (trainer && phase == name) return;
    const auto& trainer_config = name == "warmup" ? config_.warmup.trainer : config_.learn.trainer;
    // The reference of a KL term: the weights that reinforcement learning starts from.
    if (name == "rl" && reference.empty() && config_.learn.trainer.loss.kl_coef != 0)
      reference.assign(current.data(), current.data() + arena_bytes);
    trainer = model_.trainer(ctx_, trainer_config);
    trainer->set_schedule(trainer_config.schedule, 0);
    phase = name;
  };

  // With a KL term only the start of reinforcement learning or what comes before it tells the reference.
  std::vector<Checkpoint> checkpoints = store_.checkpoints(run_id_);
  std::erase_if(checkpoints, [&](const Checkpoint& c) {
    return c.version > first ||
           (c.phase != "warmup" && c.step != 0 && config_.learn.trainer.loss.kl_coef != 0);
  });
  Rebuilt rebuilt;
  uint32_t version = 0;
  bool loaded = false;
  for (auto c = checkpoints.rbegin(); c != checkpoints.rend() && !loaded; ++c) {
    const std::string directory = (std::filesystem::path(run_dir_) / c->path).string();
    try {
      load_checkpoint_weights(directory, model_.model, model_.base_fingerprint, current.data());
      const std::string hash = hash_of(current.data());
      if (hash != c->weights_hash)
        throw_environment("{}: the weights have hash {}, not {}: they are damaged", directory, hash,
                          c->weights_hash);
      enter(c->phase);
      load_checkpoint_state(directory, c->optimizer_hash, *trainer);
      version = c->version;
      loaded = true;
    } catch (const Error& e) {
      // An older one leads to the same weights, by more steps.
      rebuilt.damaged.emplace_back(e.what());
      trainer.reset();
      reference.clear();
    }
  }
  if (!loaded) first_arena(config_, model_.model, current.data());

  for (;; ++version) {
    const auto known = versions.find(version);
    if (known != versions.end() && !known->second.weights_hash.empty()) {
      const std::string hash = hash_of(current.data());
      if (hash != known->second.weights_hash && rebuilt.other_hash++ == 0) rebuilt.first_other = version;
    }
    ++rebuilt.versions;
    if (version >= first) visit(version, current.data());
    if (version >= last) return rebuilt;
    const auto following = versions.find(version + 1);
    if (following == versions.end())
      throw_environment("{}: the store does not know version {}", run_dir_, version + 1);
    enter(following->second.phase);
    if (version >= first) trainer->observe(observer);
    trainer->step(current.data(), next.data(), batch_for(following->second),
                  reference.empty() ? nullptr : reference.data());
    std::swap(current, next);
  }
}

}  // namespace perigee::rollout
