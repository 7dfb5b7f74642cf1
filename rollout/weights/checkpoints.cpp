#include "rollout/weights/checkpoints.h"

#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>

#include "base/error.h"
#include "base/file.h"
#include "base/hash.h"
#include "rollout/weights/base_weights.h"

namespace perigee::rollout {
namespace {

namespace fs = std::filesystem;
constexpr const char* kOptimizer = "optimizer.bin";

bool same_content(const fs::path& a, const fs::path& b) {
  std::ifstream x(a, std::ios::binary), y(b, std::ios::binary);
  std::vector<char> p(1 << 20), q(1 << 20);
  while (x && y) {
    x.read(p.data(), static_cast<std::streamsize>(p.size()));
    y.read(q.data(), static_cast<std::streamsize>(q.size()));
    if (x.gcount() != y.gcount() || !std::equal(p.begin(), p.begin() + x.gcount(), q.begin())) return false;
  }
  return x.eof() && y.eof();
}

// Every file of `fresh` is in `there`, with the same bytes.
bool same_files(const fs::path& fresh, const fs::path& there) {
  for (const auto& entry : fs::directory_iterator(fresh))
    if (!same_content(entry.path(), there / entry.path().filename())) return false;
  return true;
}

// "v" and eight digits, as the hub names them.
bool is_checkpoint_name(const std::string& name) {
  return name.size() == 9 && name[0] == 'v' && name.find_first_not_of("0123456789", 1) == std::string::npos;
}

}  // namespace

SavedCheckpoint save_checkpoint(const std::string& directory, const RunConfig& config, const RunModel& model,
                                const std::string& base_fingerprint, const std::byte* weights,
                                const policy::Trainer& trainer) {
  const policy::ArenaLayout& trained = model.trained();
  const fs::path target(directory), parent = target.parent_path();
  make_directories(parent.string());
  const fs::path temporary = parent / fmt::format(".{}-{}", target.filename().string(), ::getpid());
  std::error_code ec;
  fs::remove_all(temporary, ec);
  // On a full disk what was written would keep it full.
  struct Remove {
    const fs::path& path;
    ~Remove() {
      std::error_code ignored;
      fs::remove_all(path, ignored);
    }
  } remove{temporary};
  SavedCheckpoint saved;
  std::vector<float> flat(static_cast<size_t>(trained.elements()));
  trained.weights_to_flat(weights, flat.data());
  if (model.adapters)
    policy::save_adapter(temporary.string(), *model.adapters, flat.data(), base_reference(config, *model.layout, base_fingerprint));
  else
    policy::save_model(temporary.string(), *model.layout, flat.data(), policy::Dtype::kF32);
  std::vector<std::byte> state(static_cast<size_t>(trainer.state_bytes()));
  trainer.save_state(state.data());
  {
    AtomicFile file((temporary / kOptimizer).string());
    file.write(state.data(), state.size());
    file.commit();
  }
  saved.weights_hash = arena_hash(weights, trained.weight_bytes(), base_fingerprint);
  saved.optimizer_hash = hash128(state.data(), state.size()).hex();
  for (const auto& entry : fs::directory_iterator(temporary)) saved.bytes += static_cast<int64_t>(entry.file_size());
  // One of that name is from a learner that died before the store knew of it, or it was damaged.
  const bool replaces = fs::exists(target, ec);
  if (replaces && same_files(temporary, target)) return saved;
  const fs::path former = parent / fmt::format(".{}-{}-former", target.filename().string(), ::getpid());
  fs::remove_all(former, ec);
  if (replaces) {
    fs::rename(target, former, ec);
    if (ec) throw_environment("cannot rename {} to {}: {}", target.string(), former.string(), ec.message());
  }
  fs::rename(temporary, target, ec);
  if (ec) throw_environment("cannot rename {} to {}: {}", temporary.string(), target.string(), ec.message());
  sync_directory(parent.string());
  if (replaces) fs::remove_all(former, ec);
  return saved;
}

void sweep_checkpoints(const std::string& run_dir, const std::vector<std::string>& forgotten) {
  std::error_code ec;
  std::vector<fs::path> obsolete;
  for (const auto& entry : fs::directory_iterator(fs::path(run_dir) / "checkpoints", ec))
    if (entry.path().filename().string().starts_with(".v")) obsolete.push_back(entry.path());
  for (const std::string& path : forgotten)
    if (const fs::path name = fs::path(path).filename(); is_checkpoint_name(name.string()))
      obsolete.push_back(fs::path(run_dir) / "checkpoints" / name);
  for (const auto& path : obsolete) fs::remove_all(path, ec);  // what stays costs space and nothing else
}

void load_checkpoint_weights(const std::string& directory, const RunModel& model, const std::string& base_fingerprint,
                             std::byte* weights) {
  if (model.adapters) {
    const policy::AdapterHead head = policy::read_adapter_head(directory);
    if (head.base.fingerprint != base_fingerprint)
      throw_environment("{}: its adapters belong to a model with fingerprint {}, and the run's has {}: the files at model.path "
                        "changed, or other code made the weights",
                        directory, head.base.fingerprint, base_fingerprint);
    model.adapters->flat_to_weights(policy::load_adapter(directory, *model.adapters).data(), weights);
    return;
  }
  const policy::ParamLayout& layout = *model.layout;
  const auto loaded = policy::load_model(directory, layout.dtype(), layout.matrices());
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
