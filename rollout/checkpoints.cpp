#include "rollout/checkpoints.h"

#include <unistd.h>

#include <filesystem>

#include "base/error.h"
#include "base/file.h"
#include "base/hash.h"

namespace perigee::rollout {
namespace {

namespace fs = std::filesystem;
constexpr const char* kOptimizer = "optimizer.bin";

}  // namespace

SavedCheckpoint save_checkpoint(const std::string& directory, const policy::ParamLayout& layout, const std::byte* weights,
                                const policy::Trainer& trainer) {
  const fs::path target(directory), parent = target.parent_path();
  make_directories(parent.string());
  const fs::path temporary = parent / fmt::format(".{}-{}", target.filename().string(), ::getpid());
  std::error_code ec;
  fs::remove_all(temporary, ec);
  SavedCheckpoint saved;
  std::vector<float> flat(static_cast<size_t>(layout.elements()));
  layout.weights_to_flat(weights, flat.data());
  policy::save_model(temporary.string(), layout, flat.data(), policy::Dtype::kF32);
  std::vector<std::byte> state(static_cast<size_t>(trainer.state_bytes()));
  trainer.save_state(state.data());
  {
    AtomicFile file((temporary / kOptimizer).string());
    file.write(state.data(), state.size());
    file.commit();
  }
  saved.weights_hash = hash128(weights, static_cast<size_t>(layout.weight_bytes())).hex();
  saved.optimizer_hash = hash128(state.data(), state.size()).hex();
  for (const auto& entry : fs::directory_iterator(temporary)) saved.bytes += static_cast<int64_t>(entry.file_size());
  // One of that name is from a learner that died before the store knew of it.
  fs::remove_all(target, ec);
  fs::rename(temporary, target, ec);
  if (ec) throw_environment("cannot rename {} to {}: {}", temporary.string(), target.string(), ec.message());
  sync_directory(parent.string());
  return saved;
}

void load_checkpoint_weights(const std::string& directory, const policy::ParamLayout& layout, std::byte* weights) {
  const auto loaded = policy::load_model(directory, layout.dtype());
  if (static_cast<int64_t>(loaded.flat.size()) != layout.elements())
    throw_environment("checkpoint {} is of another model", directory);
  layout.flat_to_weights(loaded.flat.data(), weights);
}

void load_checkpoint_state(const std::string& directory, const std::string& optimizer_hash, policy::Trainer& trainer) {
  const std::string path = (fs::path(directory) / kOptimizer).string();
  const std::string state = read_file(path, uint64_t{1} << 44);
  if (static_cast<int64_t>(state.size()) != trainer.state_bytes())
    throw_environment("{} has {} bytes, not {}: it is damaged or of another model", path, state.size(), trainer.state_bytes());
  const std::string hash = hash128(state.data(), state.size()).hex();
  if (hash != optimizer_hash) throw_environment("{} has hash {}, not {}: it is damaged", path, hash, optimizer_hash);
  trainer.load_state(reinterpret_cast<const std::byte*>(state.data()));
}

}  // namespace perigee::rollout
