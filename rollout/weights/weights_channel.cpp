#include "rollout/weights/weights_channel.h"

#include <unistd.h>

#include <atomic>
#include <filesystem>
#include <random>

#include "base/hash.h"
#include "rollout/setup/run_model.h"

namespace perigee::rollout {

std::string shm_prefix(const std::string& run_dir) {
  std::error_code ec;
  const std::string path = std::filesystem::weakly_canonical(run_dir, ec).string();
  return fmt::format("/perigee-{}-", hash_hex(path.empty() ? run_dir : path).substr(0, 16));
}

int64_t remove_leftovers(const std::string& run_dir) {
  int64_t n = 0;
  for (const auto& name : SharedMemory::list(shm_prefix(run_dir))) n += SharedMemory::remove(name);
  return n;
}

WeightsPublisher::WeightsPublisher(const std::string& run_dir, int64_t weight_bytes, std::string base_fingerprint)
    : base_fingerprint_(std::move(base_fingerprint)), weight_bytes_(weight_bytes) {
  std::random_device random;
  prefix_ = fmt::format("{}{}-{:08x}-", shm_prefix(run_dir), ::getpid(), random());
}

WeightsPublisher::~WeightsPublisher() {
  for (const auto& [version, object] : objects_) SharedMemory::remove(object.name());
}

std::byte* WeightsPublisher::begin(uint32_t version) {
  abandon(version);
  // A name is used once: a worker that reads an old notice finds nothing rather than something else.
  auto object = SharedMemory::create(fmt::format("{}v{}-{}", prefix_, version, ++serial_), weight_bytes_);
  return (objects_[version] = std::move(object)).writable();
}

void WeightsPublisher::abandon(uint32_t version) {
  const auto it = objects_.find(version);
  if (it == objects_.end()) return;
  SharedMemory::remove(it->second.name());
  objects_.erase(it);
}

const std::byte* WeightsPublisher::data(uint32_t version) const {
  const auto it = objects_.find(version);
  PERIGEE_CHECK(it != objects_.end(), "version {}", version);
  return it->second.data();
}

WeightsNotice WeightsPublisher::notice(uint32_t version) const {
  const auto it = objects_.find(version);
  PERIGEE_CHECK(it != objects_.end(), "version {}", version);
  const SharedMemory& object = it->second;
  return {version, object.name(), arena_hash(object.data(), object.bytes(), base_fingerprint_), object.bytes()};
}

void WeightsPublisher::retire(uint32_t below) {
  while (objects_.size() > 1 && objects_.begin()->first < below) {
    SharedMemory::remove(objects_.begin()->second.name());
    objects_.erase(objects_.begin());
  }
}

bool WeightsSubscriber::take(const WeightsNotice& notice, int64_t weight_bytes, const std::string& base_fingerprint) {
  SharedMemory fresh;
  if (!SharedMemory::open(notice.shm, fresh)) return false;
  if (fresh.bytes() != weight_bytes || notice.bytes != weight_bytes)
    throw_environment("weights version {} have {} bytes, not {}: learner and policy worker disagree about the model",
                      notice.version, fresh.bytes(), weight_bytes);
  const std::string hash = arena_hash(fresh.data(), fresh.bytes(), base_fingerprint);
  if (hash != notice.hash)
    throw_environment("weights version {} in {} have hash {}, not {}", notice.version, notice.shm, hash, notice.hash);
  former_ = std::move(current_);
  current_ = std::move(fresh);
  return true;
}

}  // namespace perigee::rollout
