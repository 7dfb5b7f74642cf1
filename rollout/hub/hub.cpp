#include "rollout/hub/hub.h"

#include <algorithm>
#include <filesystem>
#include <utility>

namespace perigee::rollout {

Hub::Hub(const RunConfig& config, const std::string& run_id, const std::string& run_dir, Store& store, TaskFeed feed,
         uint64_t epoch, bool keep_leases, int64_t now_ms)
    : config_(config),
      run_id_(run_id),
      run_dir_(run_dir),
      store_(store),
      epoch_(epoch),
      book_(store, run_id, {static_cast<int64_t>(config.rollout.lease_seconds * 1000), 60000}),
      schedule_(config, run_id, store, book_, std::move(feed)),
      rate_ms_(now_ms) {
  transaction_.emplace(store_.begin());
  schedule_.restore(now_ms, keep_leases);
  transaction_->commit();
  transaction_.reset();
}

void Hub::begin() {
  transaction_.emplace(store_.begin());
  for (const auto& id : std::exchange(unreachable_, {})) {
    counts_.lost_peers += peers_.contains(id);
    forget_peer(id);
  }
}

void Hub::forget_peer(const std::string& id) {
  const auto it = peers_.find(id);
  if (it == peers_.end()) return;
  book_.worker_left(id);
  if (schedule_.is_learner(id)) schedule_.learner_left();
  peers_.erase(it);
}

void Hub::hello(const net::Inbound& in, int64_t now_ms) {
  const Json& h = in.message.header;
  const auto role = field<std::string>(h, "role"), name = field<std::string>(h, "name"), run = field<std::string>(h, "run");
  if (!role || !name || !run) {
    ++counts_.unreadable;
    return;
  }
  if (*run != run_id_) {
    ++counts_.wrong_run;
    return;
  }
  // Who comes back under its name is a new process: the old one is no more.
  std::vector<std::string> former;
  for (const auto& [id, peer] : peers_)
    if (peer.name == *name && id != in.peer) former.push_back(id);
  for (const auto& id : former) forget_peer(id);
  Peer& peer = peers_[in.peer];
  peer.role = *role;
  peer.name = *name;
  // Where its numbers go on: what came before was acknowledged, by this hub or a former one.
  peer.last_seq = std::max(peer.last_seq, field<int64_t>(h, "from").value_or(1) - 1);
  peer.acked_seq = std::max(peer.acked_seq, peer.last_seq);

  std::vector<EpisodeKey> drop;
  if (*role == "policy") {
    book_.policy_worker_joined(in.peer, field<int64_t>(h, "capacity").value_or(1), field<int64_t>(h, "version").value_or(-1));
    std::vector<EpisodeKey> held;
    if (const auto holds = h.find("holds"); holds != h.end() && holds->is_array())
      for (const Json& k : *holds)
        if (k.is_array() && k.size() == 2 && k[0].is_number_integer() && k[1].is_number_integer())
          held.push_back({k[0].get<int64_t>(), k[1].get<int32_t>()});
    drop = book_.claim(in.peer, held, now_ms);
  } else if (*role == "reward") {
    book_.reward_worker_joined(in.peer);
  } else if (*role == "learner") {
    std::optional<WeightsNotice> published;
    if (h.contains("published")) {
      BusMessage m;
      m.header = h["published"];
      if (m.header.is_object()) published = decode_weights(m);
    }
    const auto version = field<uint32_t>(h, "version");
    schedule_.learner_joined(in.peer, version.has_value(), version.value_or(0),
                             field<uint32_t>(h, "target").value_or(version.value_or(0)), published);
  }
  Json dropped = Json::array();
  for (const auto& k : drop) dropped.push_back({k.episode_id, k.attempt});
  out_.push_back({in.peer, BusMessage("welcome", {{"drop", std::move(dropped)}})});
  // A worker that has these weights already says so and nothing is mapped twice.
  if (*role == "policy" && schedule_.announced())
    out_.push_back({in.peer, encode("weights", *schedule_.announced())});
}

void Hub::handle(const net::Inbound& in, int64_t now_ms) {
  ++counts_.messages;
  const Json& h = in.message.header;
  if (in.message.type() == "hello") {
    hello(in, now_ms);
    return;
  }
  const auto it = peers_.find(in.peer);
  if (it == peers_.end() || field<uint64_t>(h, "epoch") != epoch_) {
    ++counts_.strangers;
    out_.push_back({in.peer, BusMessage(net::kWho), true});
    return;
  }
  Peer& peer = it->second;
  if (const auto seq = field<int64_t>(h, "seq")) {
    if (*seq <= peer.last_seq) {
      ++counts_.duplicates;
      peer.acked_seq = std::min(peer.acked_seq, *seq - 1);  // acknowledged again
      return;
    }
    if (*seq != peer.last_seq + 1) {
      ++counts_.gaps;
      out_.push_back({in.peer, BusMessage(net::kWho), true});
      return;
    }
    peer.last_seq = *seq;
    if (field<std::string>(h, "run") != run_id_) {
      ++counts_.wrong_run;
      return;
    }
  }
  apply(in.peer, peer, in.message, now_ms);
}

void Hub::apply(const std::string& peer_id, Peer& peer, const BusMessage& message, int64_t now_ms) {
  const std::string type = message.type();
  if (type == "moot") {
    // A message that is not needed any more: it only keeps the numbers without a gap.
  } else if (type == "heartbeat") {
    book_.renew(peer_id, now_ms);
    if (field<int64_t>(message.header, "upto").value_or(0) > peer.last_seq) {
      ++counts_.gaps;
      out_.push_back({peer_id, BusMessage(net::kWho), true});
    } else if (const auto got = field<int64_t>(message.header, "got")) {
      look_for_lost(peer_id, peer, *got, now_ms);
    }
  } else if (type == "segment" && peer.role == "policy") {
    if (const auto segment = decode_segment(message))
      book_.take_segment(*segment);
    else
      ++counts_.unreadable;
  } else if (type == "weights_ready" && peer.role == "policy") {
    book_.policy_worker_has(peer_id, field<int64_t>(message.header, "version").value_or(-1));
  } else if (type == "weights_missing" && peer.role == "policy") {
    if (const auto notice = decode_weights(message))
      schedule_.weights_missing(notice->version, notice->shm);
    else
      ++counts_.unreadable;
  } else if (type == "scored" && peer.role == "reward") {
    if (const auto scored = decode_scored(message))
      book_.take_scores(*scored);
    else
      ++counts_.unreadable;
  } else if (type == "failed") {
    failure_ = field<std::string>(message.header, "line").value_or("a role failed without a word");
  } else if (peer.role == "learner") {
    apply_learner(message);
  } else if (peer.role == "supervisor" && type == "stop") {
    if (!done_) end("stopped", {{"event", "stopped"}, {"version", schedule_.version()}, {"hash", schedule_.weights_hash()}});
  } else if (peer.role == "supervisor" && type == "gone") {
    const auto name = field<std::string>(message.header, "name");
    std::vector<std::string> ids;
    for (const auto& [id, p] : peers_)
      if (name && p.name == *name) ids.push_back(id);
    for (const auto& id : ids) forget_peer(id);
  } else {
    ++counts_.unreadable;
  }
}

void Hub::look_for_lost(const std::string& peer_id, Peer& peer, int64_t got, int64_t now_ms) {
  if (got >= peer.sent || got != std::exchange(peer.got, got)) {
    peer.behind_beats = 0;
    peer.behind_since_ms = now_ms;
    return;
  }
  // Several heartbeats: a worker that was busy for long says one before it looks at what came meanwhile.
  if (++peer.behind_beats < kLostBeats || now_ms - peer.behind_since_ms < kLostMs) return;
  peer.behind_beats = 0;
  peer.behind_since_ms = now_ms;
  ++counts_.lost_messages;
  out_.push_back({peer_id, BusMessage(net::kWho), true});
}

void Hub::apply_learner(const BusMessage& message) {
  const Json& h = message.header;
  const std::string type = message.type();
  if (type == "loaded") {
    const auto version = field<uint32_t>(h, "version");
    const auto hash = field<std::string>(h, "hash");
    if (version && hash) return schedule_.learner_loaded(*version, *hash);
  } else if (type == "load_failed") {
    const auto version = field<uint32_t>(h, "version");
    const auto line = field<std::string>(h, "line");
    if (version && line) return schedule_.learner_load_failed(*version, *line);
  } else if (type == "stepped") {
    if (const auto stepped = decode_stepped(message)) return schedule_.learner_stepped(*stepped);
  } else if (type == "published") {
    if (const auto notice = decode_weights(message)) return schedule_.learner_published(*notice);
  } else if (type == "saved") {
    Checkpoint c;
    const auto version = field<uint32_t>(h, "version");
    const auto path = field<std::string>(h, "path"), hash = field<std::string>(h, "weights_hash"),
               optimizer = field<std::string>(h, "optimizer_hash");
    if (version && path && hash && optimizer) {
      c.version = *version;
      c.path = *path;
      c.weights_hash = *hash;
      c.optimizer_hash = *optimizer;
      c.bytes = field<int64_t>(h, "bytes").value_or(0);
      return schedule_.learner_saved(c);
    }
  }
  ++counts_.unreadable;
}

void Hub::end(const std::string& state, const Json& event) {
  done_ = true;
  store_.set_run_state(run_id_, state);
  events_.push_back(event);
}

void Hub::report_rate(int64_t now_ms) {
  if (now_ms - rate_ms_ < 1000) return;
  const double seconds = static_cast<double>(now_ms - rate_ms_) / 1000;
  const int64_t tokens = book_.counts().tokens;
  int64_t open = 0, scored = 0;
  for (const auto& [id, g] : book_.groups()) {
    open += !g.scored;
    scored += g.scored;
  }
  events_.push_back({{"event", "rate"},
                     {"tokens_per_s", static_cast<double>(tokens - rate_tokens_) / seconds},
                     {"groups_open", open},
                     {"groups_scored", scored},
                     {"stalls", stalls_}});
  rate_ms_ = now_ms;
  rate_tokens_ = tokens;
}

std::vector<Outgoing> Hub::last_words(const std::string& line) const {
  std::vector<Outgoing> out;
  for (const auto& [id, peer] : peers_)
    if (peer.role == "supervisor")
      out.push_back({id, BusMessage("event", {{"run", run_id_},
                                              {"epoch", epoch_},
                                              {"body", {{"event", "trouble"}, {"role", "hub"}, {"line", line}}}})});
  return out;
}

std::vector<Outgoing> Hub::commit(int64_t now_ms) {
  if (!done_ && failure_.empty()) {
    schedule_.advance(now_ms, out_, events_);
    failure_ = schedule_.failure();
    done_ = schedule_.finished();
    report_rate(now_ms);
  }
  if (!done_ && !failure_.empty()) end("failed", {{"event", "failed"}, {"line", failure_}});
  transaction_->commit();
  transaction_.reset();
  ++counts_.commits;
  for (const auto& path : schedule_.take_obsolete()) {
    std::error_code ec;  // a directory left behind costs space and nothing else
    std::filesystem::remove_all(std::filesystem::path(run_dir_) / path, ec);
  }

  std::vector<Outgoing> out;
  for (auto& [id, peer] : peers_)
    if (peer.last_seq > peer.acked_seq) {
      out.push_back({id, BusMessage("ack", {{"upto", peer.last_seq}})});
      peer.acked_seq = peer.last_seq;
    }
  for (auto& o : out_) {
    if (o.peer != kAllPolicyWorkers) {
      out.push_back(std::move(o));
      continue;
    }
    for (const auto& [id, peer] : peers_)
      if (peer.role == "policy") out.push_back({id, o.message});
  }
  out_.clear();
  for (const auto& [id, peer] : peers_)
    if (peer.role == "supervisor")
      for (const auto& e : events_) out.push_back({id, BusMessage("event", {{"body", e}})});
  events_.clear();
  if (done_)
    for (const auto& [id, peer] : peers_)
      if (peer.role != "supervisor") out.push_back({id, BusMessage("stop")});
  for (auto& o : out) {
    o.message.header["run"] = run_id_;
    if (o.uncredited) continue;
    o.message.header["epoch"] = epoch_;
    if (const auto it = peers_.find(o.peer); it != peers_.end()) o.message.header["no"] = ++it->second.sent;
  }
  return out;
}

}  // namespace perigee::rollout
