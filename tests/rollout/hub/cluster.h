// A whole run in one thread: a Hub on a real store, workers that are scripts, and messages that a seeded scheduler
// delivers in any order that ZeroMQ allows, repeats, and loses when it kills someone. Tokens, rewards and "weights" are
// hashes of what made them, so the final hash says whether anything was different.
#pragma once
#include <gtest/gtest.h>

#include <deque>
#include <filesystem>
#include <map>
#include <memory>
#include <set>

#include "base/hash.h"
#include "base/random.h"
#include "rollout/hub/hub.h"
#include "tests/rollout/temp_dir.h"

namespace perigee::rollout {

inline Json cluster_config() {
  return {{"model", {{"config", {{"none", 0}}}}},
          {"tasks", {{"kind", "arithmetic"}}},
          {"reward", {{{"verifier", "numeric"}}}},
          {"run", {{"seed", 7}}},
          {"warmup", {{"steps", 6}, {"eval_every", 2}, {"stop_accuracy", 1.0}}},
          {"rollout",
           {{"groups_per_step", 3}, {"group_size", 2}, {"max_new_tokens", 12}, {"segment_tokens", 4}, {"lease_seconds", 5}}},
          {"learn", {{"steps", 5}}},
          {"eval", {{"every", 2}, {"tasks", 3}}},
          {"checkpoint", {{"every", 2}, {"keep", 1}}}};
}

// A worker that keeps what is not acknowledged, like HubClient.
struct Script {
  std::string role, name, id;
  uint64_t epoch = 0;
  bool joined = false;
  int64_t seq = 1;
  int64_t got = 0;  // number of the last message of the hub
  std::deque<BusMessage> kept, outbox;  // outbox: on the way to the hub, in order

  void send(BusMessage m) {
    m.header["seq"] = seq++;
    m.header["run"] = "run";
    kept.push_back(m);
    if (joined) post(m);
  }
  void post(BusMessage m) {
    m.header["epoch"] = epoch;
    outbox.push_back(std::move(m));
  }
};

class Cluster {
 public:
  Cluster(const Json& config, uint64_t seed) : config_(parse_run_config(config, "test")), random_(seed, 99) {
    StoreOptions options;
    options.open = StoreOptions::Open::kCreate;
    store_ = std::make_unique<Store>(dir_.path / "store.sqlite", options);
    auto t = store_->begin();
    RunRecord record;
    record.id = "run";
    store_->create_run(record);
    t.commit();
    start_hub(false);
  }

  void add(const std::string& role, const std::string& name) {
    auto s = std::make_unique<Script>();
    s->role = role;
    s->name = name;
    workers_[name] = std::move(s);
    restart(name);
  }

  // A new process under this name: all it knew is gone.
  void restart(const std::string& name) {
    Script& s = *workers_.at(name);
    Script fresh;
    fresh.role = s.role;
    fresh.name = s.name;
    fresh.id = name + "#" + std::to_string(++serial_);
    s = fresh;
    running_.erase(name);
    std::erase_if(waiting_scores_, [&](const auto& waiting) { return waiting.first == name; });
    if (s.role == "learner") learner_ = {};
    versions_.erase(name);
    hello(s);
  }

  void start_hub(bool keep_leases) {
    hub_.reset();
    hub_ = std::make_unique<Hub>(config_, "run", dir_.path.string(), *store_, feed(), ++epoch_, keep_leases, now_ms_);
  }
  // The hub dies with everything in its sockets; its workers live on.
  void restart_hub() {
    for (auto& [name, w] : workers_) {
      w->outbox.clear();
      w->joined = false;
    }
    start_hub(true);
    for (auto& [name, w] : workers_) hello(*w);
  }

  // One message or more of randomly chosen workers reach the hub, then it commits. REQUIRES not done.
  void turn() {
    now_ms_ += 20;
    hub_->begin();
    const int64_t n = random_.next_int(1, 6);
    for (int64_t i = 0; i < n; ++i) {
      std::vector<Script*> ready;
      for (auto& [name, w] : workers_)
        if (!w->outbox.empty()) ready.push_back(w.get());
      if (ready.empty()) break;
      Script& w = *ready[static_cast<size_t>(random_.next_int(0, static_cast<int64_t>(ready.size()) - 1))];
      const BusMessage m = w.outbox.front();
      w.outbox.pop_front();
      if (losses_to_hub > 0 && m.type() != "hello" && random_.next_int(0, 19) == 0) {
        --losses_to_hub;
        continue;
      }
      hub_->handle({w.id, m}, now_ms_);
      if (repeat_ && random_.next_int(0, 9) == 0) hub_->handle({w.id, m}, now_ms_);
    }
    for (auto& o : hub_->commit(now_ms_))
      for (auto& [name, w] : workers_)
        if (w->id == o.peer) {
          if (losses_to_workers > 0 && !o.uncredited && random_.next_int(0, 19) == 0) {
            --losses_to_workers;
            hub_->unreachable(w->id);
          } else if (name == lost_) {
            continue;
          } else if (silent_losses_to_workers > 0 && !o.uncredited && random_.next_int(0, 19) == 0) {
            --silent_losses_to_workers;
          } else {
            receive(*w, o.message);
          }
        }
    if (!scores_wait)
      for (const auto& [name, m] : std::exchange(waiting_scores_, {})) score(*workers_.at(name), *decode_score(m));
    for (auto& [name, w] : workers_) {
      if (w->role == "policy") generate(*w);
      if (random_.next_int(0, 20) > 0) continue;
      if (w->joined)
        w->post(BusMessage("heartbeat", {{"upto", w->seq - 1}, {"got", w->got}}));
      else if (w->outbox.empty())
        hello(*w);  // a greeting that was not answered
    }
  }

  // The next `turns` of them with nothing arriving at this worker, as if its connection had come back without what was on it.
  void lose_all_to(const std::string& name, int turns) {
    lost_ = name;
    for (int i = 0; i < turns && !hub_->done(); ++i) turn();
    lost_.clear();
  }

  // Until the run is over. Returns the final hash.
  std::string finish(int max_turns = 20000) {
    for (int i = 0; i < max_turns && !hub_->done(); ++i) turn();
    EXPECT_TRUE(hub_->done()) << "stuck at version " << hub_->schedule().version() << ", step " << hub_->schedule().rl_step();
    EXPECT_EQ(hub_->failure(), "");
    return hub_->schedule().weights_hash();
  }

  Hub& hub() { return *hub_; }
  Store& store() { return *store_; }
  Random& random() { return random_; }
  const RunConfig& config() const { return config_; }
  Script& worker(const std::string& name) { return *workers_.at(name); }
  void repeat_messages(bool on) { repeat_ = on; }
  // Messages still to be lost on the way; the bus notices those to workers, but for the silent ones.
  int losses_to_hub = 0, losses_to_workers = 0, silent_losses_to_workers = 0;
  // Reward workers only take requests while this is set, and score all of them afterwards.
  bool scores_wait = false;
  std::map<int64_t, int> score_requests;  // by group
  bool weights_vanish = false;
  int64_t capacity = 4;  // of a policy worker that says hello from now on
  std::set<std::string> damaged;  // paths of checkpoints that cannot be loaded
  // Rewards of every group are equal where this says so.
  std::function<bool(int64_t task_index)> dull = [](int64_t) { return false; };

 private:
  struct FakeLearner {
    bool loaded = false;
    uint32_t version = 0;
    std::string hash;
    std::optional<WeightsNotice> published;
  };
  struct Generating {
    LeaseMember member;
    int32_t max_new_tokens;
    uint32_t at_least;
  };

  TaskFeed feed() {
    TaskFeed f;
    f.train = [](int64_t n) { return PreparedTask{n, {1, static_cast<int32_t>(n)}, "train", {{"n", n}}}; };
    f.held_out = [](int64_t n) { return PreparedTask{n, {2, static_cast<int32_t>(n)}, "held", {{"n", n + 1000}}}; };
    return f;
  }

  void hello(Script& s) {
    Json h{{"role", s.role}, {"name", s.name}, {"run", "run"}};
    if (s.role == "policy") {
      h["capacity"] = capacity;
      if (versions_.contains(s.name)) h["version"] = versions_[s.name];
      Json holds = Json::array();
      for (const auto& g : running_[s.name]) holds.push_back({g.member.key.episode_id, g.member.key.attempt});
      for (const auto& m : s.kept)
        if (m.type() == "segment") holds.push_back({m.header["episode"], m.header["attempt"]});
      h["holds"] = holds;
    }
    if (s.role == "learner" && learner_.loaded) {
      h["version"] = learner_.version;
      h["target"] = learner_.version;
      if (learner_.published) h["published"] = encode("published", *learner_.published).header;
    }
    h["from"] = s.kept.empty() ? s.seq : s.kept.front().header["seq"].get<int64_t>();
    s.joined = false;
    s.outbox.push_back(BusMessage("hello", h));
  }

  void receive(Script& s, const BusMessage& m) {
    const std::string type = m.type();
    if (type == "who") {
      hello(s);
    } else if (type == "welcome") {
      s.epoch = m.header["epoch"];
      s.got = m.header["no"];
      s.joined = true;
      for (const auto& k : m.header["drop"]) drop(s, k);
      for (const auto& k : s.kept) s.post(k);
    } else if (!s.joined || m.header["epoch"] != s.epoch) {
      return;
    } else if (m.header["no"] != s.got + 1) {
      hello(s);
    } else if (s.got = m.header["no"]; type == "ack") {
      while (!s.kept.empty() && s.kept.front().header["seq"] <= m.header["upto"]) s.kept.pop_front();
    } else if (type == "cancel") {
      for (const auto& k : m.header["episodes"]) drop(s, k);
    } else if (type == "lease") {
      const auto lease = decode_lease(m);
      for (const auto& member : lease->members) running_[s.name].push_back({member, lease->max_new_tokens, lease->version});
    } else if (type == "weights") {
      // Weights live as long as the learner that published them.
      const auto learner = workers_.find("learner");
      if (weights_vanish || m.header["shm"] != "/none-" + learner->second->id) {
        s.send(encode("weights_missing", *decode_weights(m)));
        return;
      }
      versions_[s.name] = m.header["version"];
      s.send(BusMessage("weights_ready", {{"version", m.header["version"]}}));
    } else if (type == "score") {
      ++score_requests[m.header["group"]];
      waiting_scores_.emplace_back(s.name, m);
    } else if (s.role == "learner") {
      learn(s, m);
    }
  }

  void drop(Script& s, const Json& key) {
    std::erase_if(running_[s.name], [&](const Generating& g) {
      return g.member.key.episode_id == key[0] && g.member.key.attempt == key[1];
    });
    for (auto& m : s.kept)
      if (m.type() == "segment" && m.header["episode"] == key[0] && m.header["attempt"] == key[1])
        m = BusMessage("moot", {{"seq", m.header["seq"]}, {"run", "run"}});
  }

  // One segment of one episode that is being generated.
  void generate(Script& s) {
    auto& list = running_[s.name];
    if (list.empty() || !versions_.contains(s.name)) return;
    const auto at = static_cast<size_t>(random_.next_int(0, static_cast<int64_t>(list.size()) - 1));
    Generating& g = list[at];
    Segment segment;
    segment.episode_id = g.member.key.episode_id;
    segment.attempt = g.member.key.attempt;
    segment.index = g.member.first_index;
    const auto length = std::min<int64_t>(g.max_new_tokens, 3 + static_cast<int64_t>(g.member.seed % 11));
    for (int64_t i = 0; i < config_.rollout.segment_tokens; ++i) {
      const auto position = g.member.committed.size();
      const auto w = philox(g.member.seed, position);
      g.member.committed.push_back(static_cast<int32_t>(w[0] % 50));
      segment.tokens.push_back(g.member.committed.back());
      segment.logprobs.push_back(-uniform_float(w[1]));
      segment.versions.push_back(static_cast<uint32_t>(versions_[s.name]));
      if (static_cast<int64_t>(g.member.committed.size()) >= length) {
        segment.finish = length >= g.max_new_tokens ? FinishReason::kLength : FinishReason::kStop;
        break;
      }
    }
    ++g.member.first_index;
    const bool over = segment.finish != FinishReason::kNone;
    if (over) list.erase(list.begin() + static_cast<long>(at));
    s.send(encode(segment));
  }

  void score(Script& s, const ScoreRequest& request) {
    ScoredGroup scored;
    scored.group_id = request.group_id;
    for (const auto& member : request.members) {
      int64_t sum = 0;
      for (const int32_t t : member.tokens) sum += t;
      Reward r;
      r.episode_id = member.episode_id;
      r.total = dull(request.task["n"].get<int64_t>()) ? 0.5 : static_cast<double>(sum % 3);
      r.components = {{"sum", r.total, 1, "ok", ""}};
      scored.rewards.push_back(r);
      scored.correct.push_back(sum % 3 == 0);
    }
    s.send(encode(scored));
  }

  void step(Script& s, const std::string& phase, int64_t number, const std::string& what) {
    learner_.hash = hash_hex(learner_.hash + what);
    ++learner_.version;
    s.send(encode(Stepped{phase, number, learner_.version, learner_.hash, {{"loss", 1.0}}}));
  }
  void publish(Script& s) {
    learner_.published = WeightsNotice{learner_.version, "/none-" + s.id, learner_.hash, 64};
    s.send(encode("published", *learner_.published));
  }

  void learn(Script& s, const BusMessage& m) {
    const std::string type = m.type();
    const Json& h = m.header;
    if (type == "load") {
      const std::string path = h["path"];
      if (damaged.contains(path)) {
        s.send(BusMessage("load_failed", {{"version", h["version"]}, {"line", path + " is damaged"}}));
        return;
      }
      learner_.loaded = true;
      learner_.version = h["version"];
      learner_.hash = path.empty() ? "start" : saved_.at(path);
      s.send(BusMessage("loaded", {{"version", learner_.version}, {"hash", learner_.hash}}));
    } else if (type == "warm") {
      for (int64_t k = h["from"]; k <= h["to"].get<int64_t>(); ++k) step(s, "warmup", k, "w" + std::to_string(k));
    } else if (type == "train") {
      EXPECT_EQ(h["before"].get<uint32_t>(), learner_.version);
      std::string what = h["sequences"].dump();
      for (const auto& f : m.frames) what += f;
      step(s, "rl", h["step"], what);
      if (h["publish"].get<bool>()) publish(s);
    } else if (type == "publish") {
      publish(s);
    } else if (type == "save") {
      saved_[h["path"]] = learner_.hash;
      s.send(BusMessage("saved", {{"version", learner_.version},
                                  {"path", h["path"]},
                                  {"weights_hash", learner_.hash},
                                  {"optimizer_hash", "o"},
                                  {"bytes", 1}}));
    }
  }

  TempDir dir_;
  RunConfig config_;
  Random random_;
  std::unique_ptr<Store> store_;
  std::unique_ptr<Hub> hub_;
  std::map<std::string, std::unique_ptr<Script>> workers_;
  std::map<std::string, std::vector<Generating>> running_;
  std::map<std::string, int64_t> versions_;
  std::vector<std::pair<std::string, BusMessage>> waiting_scores_;  // by worker
  std::map<std::string, std::string> saved_;
  FakeLearner learner_;
  uint64_t epoch_ = 0;
  int64_t now_ms_ = 1000;
  int serial_ = 0;
  bool repeat_ = false;
  std::string lost_;
};

}  // namespace perigee::rollout
