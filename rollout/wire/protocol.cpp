#include "rollout/wire/protocol.h"

#include <cmath>

namespace perigee::rollout {
namespace {

constexpr int64_t kMaxTokens = int64_t{1} << 31;

// Reads the fields of a header; ok() turns false with the first that is not there.
class Fields {
 public:
  explicit Fields(const Json& header) : header_(header) {}
  template <class T>
  void get(const char* key, T& out) {
    if (auto v = field<T>(header_, key))
      out = std::move(*v);
    else
      ok_ = false;
  }
  bool ok() const { return ok_; }

 private:
  const Json& header_;
  bool ok_ = true;
};

template <class T>
void append(std::vector<T>& to, const std::vector<T>& from) {
  to.insert(to.end(), from.begin(), from.end());
}

}  // namespace

BusMessage encode(const Lease& lease) {
  BusMessage m("lease", {{"group", lease.group_id},
                      {"version", lease.version},
                      {"max_new_tokens", lease.max_new_tokens},
                      {"temperature", lease.temperature},
                      {"sampling", lease.sampling},
                      {"task_index", lease.task_index},
                      {"held_out", lease.held_out}});
  Json members = Json::array();
  for (const auto& member : lease.members)
    members.push_back({{"episode", member.key.episode_id},
                       {"attempt", member.key.attempt},
                       {"seed", member.seed},
                       {"index", member.first_index}});
  m.header["members"] = std::move(members);
  m.frames.push_back(net::to_frame(lease.prompt));
  for (const auto& member : lease.members) {
    m.frames.push_back(net::to_frame(member.committed));
    m.frames.push_back(net::to_frame(member.mask));
  }
  return m;
}

std::optional<Lease> decode_lease(const BusMessage& message) {
  Lease lease;
  Fields f(message.header);
  f.get("group", lease.group_id);
  f.get("version", lease.version);
  f.get("max_new_tokens", lease.max_new_tokens);
  f.get("temperature", lease.temperature);
  f.get("task_index", lease.task_index);
  f.get("held_out", lease.held_out);
  const auto members = message.header.find("members");
  if (!f.ok() || members == message.header.end() || !members->is_array() ||
      message.frames.size() != 2 * members->size() + 1 || !message.header.contains("sampling"))
    return std::nullopt;
  lease.sampling = message.header["sampling"];
  auto prompt = net::from_frame<int32_t>(message.frames[0]);
  if (!prompt) return std::nullopt;
  lease.prompt = std::move(*prompt);
  for (size_t i = 0; i < members->size(); ++i) {
    const Json& row = (*members)[i];
    if (!row.is_object()) return std::nullopt;
    LeaseMember member;
    Fields g(row);
    g.get("episode", member.key.episode_id);
    g.get("attempt", member.key.attempt);
    g.get("seed", member.seed);
    g.get("index", member.first_index);
    auto committed = net::from_frame<int32_t>(message.frames[2 * i + 1]);
    auto mask = net::from_frame<uint8_t>(message.frames[2 * i + 2]);
    if (!g.ok() || !committed || !mask || (!mask->empty() && mask->size() != committed->size())) return std::nullopt;
    member.committed = std::move(*committed);
    member.mask = std::move(*mask);
    lease.members.push_back(std::move(member));
  }
  return lease;
}

BusMessage encode(const Segment& segment) {
  BusMessage m("segment", {{"episode", segment.episode_id},
                        {"attempt", segment.attempt},
                        {"index", segment.index},
                        {"finish", finish_name(segment.finish)}});
  m.frames = {net::to_frame(segment.tokens), net::to_frame(segment.logprobs), net::to_frame(segment.versions),
              net::to_frame(segment.mask)};
  if (segment.tools.empty()) return m;
  Json rows = Json::array();
  for (const ToolEvent& e : segment.tools) {
    rows.push_back({{"turn", e.turn}, {"started_us", e.started_us}, {"duration_us", e.duration_us}, {"status", e.status},
                    {"digest", e.digest}});
    // What a policy or a tool wrote is bytes, not text.
    for (const std::string* bytes : {&e.name, &e.input, &e.output}) m.frames.push_back(*bytes);
  }
  m.header["tools"] = std::move(rows);
  return m;
}

namespace {

// The events in the frames from the fifth on; false: not of the form.
bool decode_tools(const BusMessage& message, std::vector<ToolEvent>& tools) {
  constexpr size_t kFirst = 4, kEach = 3;
  const auto rows = message.header.find("tools");
  if (rows == message.header.end()) return message.frames.size() == kFirst;
  if (!rows->is_array() || message.frames.size() != kFirst + kEach * rows->size()) return false;
  for (size_t i = 0; i < rows->size(); ++i) {
    const Json& row = (*rows)[i];
    if (!row.is_object()) return false;
    ToolEvent e;
    Fields g(row);
    g.get("turn", e.turn);
    g.get("started_us", e.started_us);
    g.get("duration_us", e.duration_us);
    g.get("status", e.status);
    g.get("digest", e.digest);
    if (!g.ok() || e.turn < 0) return false;
    e.name = message.frames[kFirst + kEach * i];
    e.input = message.frames[kFirst + kEach * i + 1];
    e.output = message.frames[kFirst + kEach * i + 2];
    tools.push_back(std::move(e));
  }
  return true;
}

}  // namespace

std::optional<Segment> decode_segment(const BusMessage& message) {
  Segment segment;
  std::string finish;
  Fields f(message.header);
  f.get("episode", segment.episode_id);
  f.get("attempt", segment.attempt);
  f.get("index", segment.index);
  f.get("finish", finish);
  const auto reason = parse_finish(finish);
  if (!f.ok() || !reason || message.frames.size() < 4 || !decode_tools(message, segment.tools)) return std::nullopt;
  auto tokens = net::from_frame<int32_t>(message.frames[0]);
  auto logprobs = net::from_frame<float>(message.frames[1]);
  auto versions = net::from_frame<uint32_t>(message.frames[2]);
  auto mask = net::from_frame<uint8_t>(message.frames[3]);
  if (!tokens || !logprobs || !versions || !mask) return std::nullopt;
  const size_t n = tokens->size();
  if (logprobs->size() != n || versions->size() != n || (!mask->empty() && mask->size() != n)) return std::nullopt;
  if (segment.attempt < 1 || segment.index < 0 || (n == 0 && *reason == FinishReason::kNone)) return std::nullopt;
  segment.finish = *reason;
  segment.tokens = std::move(*tokens);
  segment.logprobs = std::move(*logprobs);
  segment.versions = std::move(*versions);
  segment.mask = std::move(*mask);
  return segment;
}

BusMessage encode(const ScoreRequest& request) {
  BusMessage m("score",
            {{"group", request.group_id}, {"task", request.task}, {"max_new_tokens", request.max_new_tokens}});
  Json rows = Json::array();
  for (const auto& member : request.members) {
    rows.push_back({{"episode", member.episode_id}, {"finish", finish_name(member.finish)}});
    m.frames.push_back(net::to_frame(member.tokens));
    m.frames.push_back(net::to_frame(member.mask));
  }
  m.header["members"] = std::move(rows);
  return m;
}

std::optional<ScoreRequest> decode_score(const BusMessage& message) {
  ScoreRequest request;
  Fields f(message.header);
  f.get("group", request.group_id);
  f.get("max_new_tokens", request.max_new_tokens);
  const auto rows = message.header.find("members");
  const auto task = message.header.find("task");
  if (!f.ok() || rows == message.header.end() || !rows->is_array() || 2 * rows->size() != message.frames.size() ||
      task == message.header.end() || !task->is_object())
    return std::nullopt;
  request.task = *task;
  for (size_t i = 0; i < rows->size(); ++i) {
    const Json& row = (*rows)[i];
    if (!row.is_object()) return std::nullopt;
    ScoreMember member;
    std::string finish;
    Fields g(row);
    g.get("episode", member.episode_id);
    g.get("finish", finish);
    const auto reason = parse_finish(finish);
    auto tokens = net::from_frame<int32_t>(message.frames[2 * i]);
    auto mask = net::from_frame<uint8_t>(message.frames[2 * i + 1]);
    if (!g.ok() || !reason || !tokens || !mask || (!mask->empty() && mask->size() != tokens->size())) return std::nullopt;
    member.finish = *reason;
    member.tokens = std::move(*tokens);
    member.mask = std::move(*mask);
    request.members.push_back(std::move(member));
  }
  return request;
}

BusMessage encode(const ScoredGroup& scored) {
  Json rows = Json::array();
  for (size_t i = 0; i < scored.rewards.size(); ++i) {
    const Reward& reward = scored.rewards[i];
    Json components = Json::array();
    for (const auto& c : reward.components)
      components.push_back({{"name", c.name},
                            {"value", c.value},
                            {"weight", c.weight},
                            {"status", c.status},
                            {"detail", c.detail}});
    rows.push_back({{"episode", reward.episode_id},
                    {"total", reward.total},
                    {"failed", reward.failed},
                    {"correct", static_cast<bool>(scored.correct[i])},
                    {"components", std::move(components)}});
  }
  return BusMessage("scored", {{"group", scored.group_id}, {"rewards", std::move(rows)}});
}

std::optional<ScoredGroup> decode_scored(const BusMessage& message) {
  ScoredGroup scored;
  Fields f(message.header);
  f.get("group", scored.group_id);
  const auto rows = message.header.find("rewards");
  if (!f.ok() || rows == message.header.end() || !rows->is_array()) return std::nullopt;
  for (const Json& row : *rows) {
    if (!row.is_object()) return std::nullopt;
    Reward reward;
    bool correct = false;
    Fields g(row);
    g.get("episode", reward.episode_id);
    g.get("total", reward.total);
    g.get("failed", reward.failed);
    g.get("correct", correct);
    const auto components = row.find("components");
    if (!g.ok() || components == row.end() || !components->is_array() || !std::isfinite(reward.total))
      return std::nullopt;
    for (const Json& item : *components) {
      if (!item.is_object()) return std::nullopt;
      RewardComponent c;
      Fields h(item);
      h.get("name", c.name);
      h.get("value", c.value);
      h.get("weight", c.weight);
      h.get("status", c.status);
      h.get("detail", c.detail);
      if (!h.ok() || !std::isfinite(c.value)) return std::nullopt;
      reward.components.push_back(std::move(c));
    }
    scored.rewards.push_back(std::move(reward));
    scored.correct.push_back(correct);
  }
  return scored;
}

BusMessage encode(const TrainRequest& request) {
  BusMessage m("train", {{"step", request.step},
                      {"before", request.version_before},
                      {"after", request.version_after},
                      {"publish", request.publish}});
  Json rows = Json::array();
  std::vector<int32_t> tokens;
  std::vector<uint8_t> mask;
  std::vector<float> mu;
  for (const auto& s : request.batch) {
    rows.push_back({{"n", s.tokens.size()},
                    {"temperature", s.temperature},
                    {"advantage", s.advantage}});
    append(tokens, s.tokens);
    append(mask, s.mask);
    append(mu, s.mu);
  }
  m.header["sequences"] = std::move(rows);
  m.frames = {net::to_frame(tokens), net::to_frame(mask), net::to_frame(mu)};
  return m;
}

std::optional<TrainRequest> decode_train(const BusMessage& message) {
  TrainRequest request;
  Fields f(message.header);
  f.get("step", request.step);
  f.get("before", request.version_before);
  f.get("after", request.version_after);
  f.get("publish", request.publish);
  const auto rows = message.header.find("sequences");
  if (!f.ok() || rows == message.header.end() || !rows->is_array() || message.frames.size() != 3) return std::nullopt;
  auto tokens = net::from_frame<int32_t>(message.frames[0]);
  auto mask = net::from_frame<uint8_t>(message.frames[1]);
  auto mu = net::from_frame<float>(message.frames[2]);
  if (!tokens || !mask || !mu || mask->size() != tokens->size() || mu->size() != tokens->size()) return std::nullopt;
  int64_t at = 0;
  const auto total = static_cast<int64_t>(tokens->size());
  for (const Json& row : *rows) {
    if (!row.is_object()) return std::nullopt;
    policy::TrainSequence s;
    int64_t n = 0;
    Fields g(row);
    g.get("n", n);
    g.get("temperature", s.temperature);
    g.get("advantage", s.advantage);
    if (!g.ok() || n < 1 || n > kMaxTokens || at + n > total) return std::nullopt;
    s.tokens.assign(tokens->begin() + at, tokens->begin() + at + n);
    s.mask.assign(mask->begin() + at, mask->begin() + at + n);
    s.mu.assign(mu->begin() + at, mu->begin() + at + n);
    at += n;
    request.batch.push_back(std::move(s));
  }
  if (at != total) return std::nullopt;
  return request;
}

BusMessage encode(std::string_view type, const WeightsNotice& notice) {
  return BusMessage(
      type, {{"version", notice.version}, {"shm", notice.shm}, {"hash", notice.hash}, {"bytes", notice.bytes}});
}

std::optional<WeightsNotice> decode_weights(const BusMessage& message) {
  WeightsNotice notice;
  Fields f(message.header);
  f.get("version", notice.version);
  f.get("shm", notice.shm);
  f.get("hash", notice.hash);
  f.get("bytes", notice.bytes);
  if (!f.ok() || notice.bytes <= 0) return std::nullopt;
  return notice;
}

BusMessage encode(const Stepped& stepped) {
  Json metrics = Json::array();
  for (const auto& [name, value] : stepped.metrics) metrics.push_back({name, value});
  return BusMessage("stepped", {{"phase", stepped.phase},
                             {"step", stepped.step},
                             {"version", stepped.version},
                             {"hash", stepped.hash},
                             {"metrics", std::move(metrics)}});
}

std::optional<Stepped> decode_stepped(const BusMessage& message) {
  Stepped stepped;
  Fields f(message.header);
  f.get("phase", stepped.phase);
  f.get("step", stepped.step);
  f.get("version", stepped.version);
  f.get("hash", stepped.hash);
  const auto metrics = message.header.find("metrics");
  if (!f.ok() || metrics == message.header.end() || !metrics->is_array()) return std::nullopt;
  for (const Json& row : *metrics) {
    if (!row.is_array() || row.size() != 2 || !row[0].is_string() || !row[1].is_number()) return std::nullopt;
    stepped.metrics.emplace_back(row[0].get<std::string>(), row[1].get<double>());
  }
  return stepped;
}

}  // namespace perigee::rollout
