// How a set of weights goes from the learner to policy workers: through named shared memory, written once, mapped
// read-only, with only the name and the hash on the bus.
#pragma once
#include <cstdint>
#include <map>
#include <string>

#include "base/shm.h"
#include "rollout/wire/protocol.h"

namespace perigee::rollout {

// "/perigee-<hash of the run directory>-": what all names of a run begin with.
std::string shm_prefix(const std::string& run_dir);
// Removes what a killed run left behind; returns how many there were.
int64_t remove_leftovers(const std::string& run_dir);

// The learner's end. Names are unique to the object; they are removed when retired or when it dies.
class WeightsPublisher {
 public:
  // base_fingerprint: of the model that the weights stand beside (rollout/setup/run_model.h, arena_hash); empty: none.
  WeightsPublisher(const std::string& run_dir, int64_t weight_bytes, std::string base_fingerprint = {});
  ~WeightsPublisher();
  WeightsPublisher(const WeightsPublisher&) = delete;
  WeightsPublisher& operator=(const WeightsPublisher&) = delete;

  // Memory for this version, to be written in full. An earlier one of the same version is replaced.
  // Throws Error(kEnvironment) when there is no room.
  std::byte* begin(uint32_t version);
  // Takes back a begin whose writing failed.
  void abandon(uint32_t version);
  const std::byte* data(uint32_t version) const;  // REQUIRES begun and not retired
  WeightsNotice notice(uint32_t version) const;   // hashes
  // Removes versions below; the latest always stays.
  void retire(uint32_t below);

 private:
  std::string prefix_, base_fingerprint_;
  int64_t weight_bytes_;
  int64_t serial_ = 0;
  std::map<uint32_t, SharedMemory> objects_;
};

// A policy worker's end.
class WeightsSubscriber {
 public:
  // Maps a version. False when its name is gone (a newer one, or a new learner, is on its way). Throws
  // Error(kEnvironment) when size or hash are not what the notice says. The former mapping lives until release_former().
  bool take(const WeightsNotice& notice, int64_t weight_bytes, const std::string& base_fingerprint = {});
  const std::byte* data() const { return current_.data(); }
  void release_former() { former_ = SharedMemory(); }

 private:
  SharedMemory current_, former_;
};

}  // namespace perigee::rollout
