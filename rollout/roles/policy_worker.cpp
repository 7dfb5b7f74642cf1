// The policy worker: leases in, tokens out. One thread: receive what is there, take one engine step, send segments. In an
// environment the calls of tools run beside it, and a segment ends where the policy goes on after their answers.
#include <fmt/format.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <map>
#include <optional>

#include "policy/engine/engine.h"
#include "rollout/roles/agent_episodes.h"
#include "rollout/roles/roles.h"
#include "rollout/setup/run_model.h"
#include "rollout/setup/run_tasks.h"
#include "rollout/setup/workspace.h"
#include "rollout/weights/compute.h"
#include "rollout/weights/weights_channel.h"

namespace perigee::rollout {
namespace {

// Segments that the hub has not acknowledged; beyond this the engine waits for it.
constexpr int64_t kMaxUnacknowledgedBytes = int64_t{64} << 20;

class PolicyWorker {
 public:
  explicit PolicyWorker(const RoleContext& role)
      : role_(role),
        model_(make_run_model(role.config)),
        layout_(model_.layout),
        tokenizer_(make_tokenizer(role.config, layout_->config())),
        stop_tokens_(stop_tokens(layout_->config(), *tokenizer_)),
        compute_(role.config, model_, role.run_dir, role.stop),
        engine_(compute_.engine_backend(), *layout_, role.config.engine),
        client_(role.zmq, role.endpoint, "policy", role.name, role.run_id, [this] { return hello(); },
                client_options(role.config)) {
    if (!environment_config(role.config)) return;
    tasks_.emplace(role.config, layout_->config(), *tokenizer_);
    // Of this worker alone: what one of its name left that was killed goes.
    const std::filesystem::path work = std::filesystem::path(role.run_dir) / "work" / role.name;
    remove_workspace(work);
    agents_.emplace(engine_, *tokenizer_, *tasks_->environment(), work);
  }

  RoleResult run() {
    std::vector<policy::GeneratedToken> tokens;
    while (!role_.stop.stop_requested() && !stopped_) {
      if (agents_) take_answers();
      const bool work = !engine_.idle() && have_weights_ && client_.unacknowledged_bytes() < kMaxUnacknowledgedBytes;
      const bool tools = agents_ && agents_->waiting();
      if (!work && tools) agents_->wait(1);
      int timeout_ms = work || tools ? 0 : 100;
      while (auto message = client_.receive(timeout_ms)) {
        handle(*message);
        timeout_ms = 0;
      }
      if (!work || stopped_) continue;
      tokens.clear();
      engine_.step(tokens);
      for (const auto& t : tokens) take(t);
    }
    return {};
  }

 private:
  struct Running {
    EpisodeKey key;
    Segment segment;      // the one being filled
    bool fed = false;     // its last token was not sampled
  };

  Json hello() const {
    Json holds = Json::array();
    for (const auto& [id, r] : running_) holds.push_back({r.key.episode_id, r.key.attempt});
    // Finished ones whose last segment is on its way are still this worker's.
    client_.for_each_kept([&](const BusMessage& m) {
      if (m.type() == "segment") holds.push_back({m.header["episode"], m.header["attempt"]});
    });
    Json fields{{"capacity", role_.config.engine.max_running}, {"holds", std::move(holds)}};
    if (have_weights_) fields["version"] = engine_.version();
    return fields;
  }

  void handle(const BusMessage& message) {
    const std::string type = message.type();
    if (type == "lease") {
      if (const auto lease = decode_lease(message)) begin(*lease);
    } else if (type == "cancel" || type == "welcome") {
      const auto keys = message.header.find(type == "cancel" ? "episodes" : "drop");
      if (keys == message.header.end() || !keys->is_array()) return;
      for (const Json& k : *keys)
        if (k.is_array() && k.size() == 2 && k[0].is_number_integer() && k[1].is_number_integer())
          drop({k[0].get<int64_t>(), k[1].get<int32_t>()});
    } else if (type == "weights") {
      if (const auto notice = decode_weights(message)) change_weights(*notice);
    } else if (type == "stop") {
      stopped_ = true;
    }
  }

  void change_weights(const WeightsNotice& notice) {
    const bool same = have_weights_ && engine_.version() == notice.version && hash_ == notice.hash;
    if (!same) {
      if (!weights_.take(notice, model_.trained().weight_bytes(), compute_.base_fingerprint())) {
        // The learner died, or newer ones are on their way: the hub knows which.
        std::fputs(fmt::format("weights version {} are not there any more ({})\n", notice.version, notice.shm).c_str(), stderr);
        client_.send_durable(encode("weights_missing", notice));
        return;
      }
      engine_.set_weights(weights_.data(), notice.version);
      weights_.release_former();
      have_weights_ = true;
      hash_ = notice.hash;
    }
    client_.send_durable(BusMessage("weights_ready", {{"version", notice.version}}));
  }

  void begin(const Lease& lease) {
    policy::GenerationGroup group;
    group.prompt = lease.prompt;
    group.stop_tokens = stop_tokens_;
    const auto sampling = sampling_from_json(lease.sampling, lease.temperature);
    if (!sampling) throw_environment("group {}: sampling parameters {} are not known here", lease.group_id, lease.sampling.dump());
    for (const auto& m : lease.members) {
      stop_generating(m.key.episode_id);
      policy::GenerationRequest request;
      request.id = static_cast<uint64_t>(m.key.episode_id);
      request.seed = m.seed;
      request.committed = m.committed;
      request.max_new_tokens = lease.max_new_tokens;
      request.sampling = *sampling;
      if (agents_) {
        request.hold = true;
        request.reserve_tokens = lease.max_new_tokens;
      }
      group.members.push_back(std::move(request));
      Running running;
      running.key = m.key;
      running.segment.index = m.first_index;
      running_[m.key.episode_id] = std::move(running);
      if (agents_) begin_agent(lease, m);
    }
    try {
      engine_.submit(std::move(group));
    } catch (const Error& e) {
      // The same would happen to any worker: the run is misconfigured.
      for (const auto& m : lease.members) stop_generating(m.key.episode_id);
      client_.send_durable(BusMessage("failed", {{"line", fmt::format("group {} cannot be generated: {}", lease.group_id, e.what())}}));
    }
  }

  void begin_agent(const Lease& lease, const LeaseMember& m) {
    AgentEpisodes::Begin begin;
    begin.id = static_cast<uint64_t>(m.key.episode_id);
    begin.folder = fmt::format("{}{}.{}", m.key.episode_id < 0 ? "evaluation-" : "", std::abs(m.key.episode_id), m.key.attempt);
    begin.committed = m.committed;
    begin.mask = m.mask;
    begin.max_new_tokens = lease.max_new_tokens;
    if (tasks_->environment()->has_folder()) begin.files = tasks_->files(lease.task_index, lease.held_out);
    agents_->begin(begin);
  }

  void stop_generating(int64_t episode_id) {
    if (running_.erase(episode_id) == 0) return;
    engine_.cancel(static_cast<uint64_t>(episode_id));
    if (agents_) agents_->drop(static_cast<uint64_t>(episode_id));
  }

  // Tools that answered, and agents whose time is over.
  void take_answers() {
    for (auto& a : agents_->advance()) {
      const auto it = running_.find(static_cast<int64_t>(a.id));
      if (it == running_.end()) continue;
      Running& r = it->second;
      for (auto& event : a.events) r.segment.tools.push_back(std::move(event));
      if (a.finish == FinishReason::kNone) continue;
      r.segment.finish = a.finish;
      send(r);
      running_.erase(it);
    }
  }

  void drop(const EpisodeKey& key) {
    const auto it = running_.find(key.episode_id);
    if (it != running_.end() && it->second.key == key) stop_generating(key.episode_id);
    client_.forget([&](const BusMessage& m) {
      return m.type() == "segment" && m.header["episode"] == key.episode_id && m.header["attempt"] == key.attempt;
    });
  }

  void take(const policy::GeneratedToken& t) {
    const auto it = running_.find(static_cast<int64_t>(t.id));
    if (it == running_.end()) return;
    Running& r = it->second;
    // What a tool answered is committed with the turn that asked for it, before the policy goes on.
    if (r.fed && !t.fed) send(r);
    Segment& s = r.segment;
    if (t.fed) s.mask.resize(s.tokens.size(), 1);
    s.tokens.push_back(t.token);
    s.logprobs.push_back(t.logprob);
    s.versions.push_back(t.version);
    if (t.fed) s.mask.push_back(0);
    r.fed = t.fed;
    s.finish = agents_ ? agents_->take(t) : t.finish;
    // A turn that asks for tools waits for their answers, so that what is committed never ends between the two.
    const bool held = t.finish != FinishReason::kNone;
    const bool full = static_cast<int64_t>(s.tokens.size()) >= role_.config.rollout.segment_tokens;
    if (s.finish == FinishReason::kNone && (t.fed || held || !full)) return;
    const bool over = s.finish != FinishReason::kNone;
    send(r);
    if (over) running_.erase(it);
  }

  void send(Running& r) {
    r.segment.episode_id = r.key.episode_id;
    r.segment.attempt = r.key.attempt;
    client_.send_durable(encode(r.segment));
    const int32_t next = r.segment.index + 1;
    r.segment = Segment();
    r.segment.index = next;
    r.fed = false;
  }

  const RoleContext& role_;
  RunModel model_;
  std::shared_ptr<const policy::ParamLayout> layout_;
  std::unique_ptr<policy::Tokenizer> tokenizer_;
  std::vector<int32_t> stop_tokens_;
  Compute compute_;
  policy::Engine engine_;
  std::optional<RunTasks> tasks_;        // in an environment
  std::optional<AgentEpisodes> agents_;  // likewise
  WeightsSubscriber weights_;
  bool have_weights_ = false, stopped_ = false;
  std::string hash_;
  std::map<int64_t, Running> running_;
  HubClient client_;
};

}  // namespace

RoleResult run_policy_worker(const RoleContext& role) { return PolicyWorker(role).run(); }

}  // namespace perigee::rollout
