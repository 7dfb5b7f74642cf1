// What the roles of a run say to each other, as messages of base/net/bus.h. Grammar: docs/formats/bus.md.
//
// Encoding never fails. Decoding is of bytes that another process sent: nullopt when anything is missing, of another
// type, out of range or of inconsistent length.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "base/episode.h"
#include "base/net/bus.h"
#include "policy/engine/engine.h"
#include "policy/learn/trainer.h"

namespace perigee::rollout {

using net::Json;
using BusMessage = net::Message;

// One member of a leased group. committed: tokens of earlier attempts, to be fed again.
struct LeaseMember {
  EpisodeKey key;
  uint64_t seed = 0;
  int32_t first_index = 0;  // of the next segment
  std::vector<int32_t> committed;
  std::vector<uint8_t> mask = {};  // [committed] 1: sampled; empty: all
};

// Work for a policy worker: generate these members of one group.
struct Lease {
  int64_t group_id = 0;
  uint32_t version = 0;        // that the worker has; informative where any will do
  int32_t max_new_tokens = 0;  // committed ones included
  float temperature = 1;
  Json sampling = Json::object();  // further sampling parameters (sampling_from_json)
  int64_t task_index = 0;          // where the folder of an agent's tools comes from
  bool held_out = false;           // its task is one of those
  std::vector<int32_t> prompt;
  std::vector<LeaseMember> members;
};
BusMessage encode(const Lease& lease);
std::optional<Lease> decode_lease(const BusMessage& message);

// Tokens on the way to the store.
BusMessage encode(const Segment& segment);
std::optional<Segment> decode_segment(const BusMessage& message);

// Work for a reward worker: what the finished episodes of a group are worth, all of them at once, since some rewards
// compare them.
struct ScoreMember {
  int64_t episode_id = 0;
  std::vector<int32_t> tokens;  // generated, the stop token included
  std::vector<uint8_t> mask;    // [tokens] 1: sampled; empty: all
  FinishReason finish = FinishReason::kNone;
};
struct ScoreRequest {
  int64_t group_id = 0;
  Json task;  // GroupRecord::task: prompt, answer, verifier
  int32_t max_new_tokens = 0;
  std::vector<ScoreMember> members;
};
BusMessage encode(const ScoreRequest& request);
std::optional<ScoreRequest> decode_score(const BusMessage& message);

struct ScoredGroup {
  int64_t group_id = 0;
  std::vector<Reward> rewards;  // by member
  std::vector<bool> correct;    // by member: what accuracy counts
};
BusMessage encode(const ScoredGroup& scored);
std::optional<ScoredGroup> decode_scored(const BusMessage& message);

// Work for the learner: one step of reinforcement learning.
struct TrainRequest {
  int64_t step = 0;
  uint32_t version_before = 0, version_after = 0;
  bool publish = true;  // hand the new weights over (a step that is only run again need not)
  std::vector<policy::TrainSequence> batch;
};
BusMessage encode(const TrainRequest& request);
std::optional<TrainRequest> decode_train(const BusMessage& message);

// A weights version in shared memory.
struct WeightsNotice {
  uint32_t version = 0;
  std::string shm, hash;
  int64_t bytes = 0;
};
BusMessage encode(std::string_view type, const WeightsNotice& notice);
std::optional<WeightsNotice> decode_weights(const BusMessage& message);

// The learner's word that a step is done.
struct Stepped {
  std::string phase;
  int64_t step = 0;
  uint32_t version = 0;
  std::string hash;
  std::vector<std::pair<std::string, double>> metrics;
};
BusMessage encode(const Stepped& stepped);
std::optional<Stepped> decode_stepped(const BusMessage& message);

// Sampling parameters but for the temperature, which has a field of its own. Only what differs from the default is
// written; sampling_from_json gives nullopt for what it does not know.
Json sampling_to_json(const kernels::SamplingParams& params);
std::optional<kernels::SamplingParams> sampling_from_json(const Json& value, float temperature);

// logit_bias as an object from token ids to what is added: {"257": -5, "12": "-inf"}; the list is by ascending token,
// each at most once. REQUIRES of the way to JSON that no token is there twice. nullopt: of another form.
using LogitBias = std::vector<std::pair<int32_t, float>>;
Json logit_bias_to_json(const LogitBias& bias);
std::optional<LogitBias> logit_bias_from_json(const Json& value);

// The field as T, or nullopt when absent or of another type (numbers: out of T's range).
template <class T>
std::optional<T> field(const Json& header, const char* key) {
  const auto it = header.find(key);
  if (it == header.end()) return std::nullopt;
  if constexpr (std::is_same_v<T, bool>) {
    if (!it->is_boolean()) return std::nullopt;
    return it->template get<bool>();
  } else if constexpr (std::is_same_v<T, std::string>) {
    if (!it->is_string()) return std::nullopt;
    return it->template get<std::string>();
  } else if constexpr (std::is_floating_point_v<T>) {
    if (!it->is_number()) return std::nullopt;
    return it->template get<T>();
  } else {
    static_assert(std::is_integral_v<T>);
    if (!it->is_number_integer()) return std::nullopt;
    if (it->is_number_unsigned()) {
      const uint64_t n = it->template get<uint64_t>();
      if (n > static_cast<uint64_t>(std::numeric_limits<T>::max())) return std::nullopt;
      return static_cast<T>(n);
    }
    const int64_t n = it->template get<int64_t>();
    if (std::is_unsigned_v<T> && n < 0) return std::nullopt;
    if constexpr (sizeof(T) < sizeof(int64_t))
      if (n < static_cast<int64_t>(std::numeric_limits<T>::min()) || n > static_cast<int64_t>(std::numeric_limits<T>::max()))
        return std::nullopt;
    return static_cast<T>(n);
  }
}

}  // namespace perigee::rollout
