// perigee diff of two runs.
#include <fmt/format.h>

#include <cstring>
#include <map>
#include <set>

#include "apps/command_line/run_argument.h"
#include "apps/output/output.h"
#include "apps/runs/diff.h"
#include "rollout/run/run.h"

namespace perigee::apps {
namespace {

// "rollout.group_size" -> value, for every leaf; lists are leaves.
void flatten(const nlohmann::json& value, const std::string& path,
             std::map<std::string, nlohmann::json>& out) {
  if (!value.is_object() || value.empty()) {
    if (!path.empty()) out[path] = value;
    return;
  }
  for (const auto& [key, v] : value.items()) flatten(v, path.empty() ? key : path + "." + key, out);
}

struct RunSide {
  RunPlace place;
  RunRecord record;
  std::map<std::string, nlohmann::json> config;
  std::map<std::pair<bool, int64_t>, std::map<std::string, double>> metrics;  // by (rl, step)
  std::map<std::pair<bool, int64_t>, std::string> hashes;  // of the version that the step made
  std::vector<Evaluation> evaluations;
  std::vector<PolicyVersion> versions;
};

RunSide open_run(const std::string& name) {
  RunSide side;
  side.place = find_run({name, false});
  StoreReader store(side.place.store());
  side.record = store.run(side.place.id);
  flatten(rollout::run_config_of(side.place.directory.string()).effective, "", side.config);
  for (const StepMetrics& m : store.metrics(side.place.id))
    for (const auto& [key, value] : m.values) side.metrics[{m.phase != "warmup", m.step}][key] = value;
  side.versions = store.versions(side.place.id);
  for (const PolicyVersion& v : side.versions)
    side.hashes[{v.phase != "warmup" && v.step > 0, v.step}] = v.weights_hash;
  side.evaluations = store.evaluations(side.place.id);
  return side;
}

std::string step_name(const std::pair<bool, int64_t>& step) {
  return fmt::format("{} {}", step.first ? "step" : "warm-up", step.second);
}

// Numbers that say how fast a machine was, not what was learnt.
bool is_timing(const std::string& metric) {
  return metric.ends_with("_seconds") || metric.ends_with("_per_s") || metric.ends_with("_per_second") ||
         metric == "seconds";
}

struct RunDiff {
  std::vector<std::string> keys;  // of the configuration, with other values
  std::optional<std::pair<bool, int64_t>> first_hash;
  int64_t hashes_compared = 0, other_hashes = 0;
  // Of each metric the first step with another value, and how many.
  struct Metric {
    std::pair<bool, int64_t> first;
    int64_t steps = 0;
    double a = 0, b = 0;  // there
  };
  std::map<std::string, Metric> metrics;
  int64_t steps_compared = 0;
};

bool same_number(double x, double y) {
  return std::memcmp(&x, &y, sizeof x) == 0 || x == y;
}

RunDiff compare(const RunSide& a, const RunSide& b) {
  RunDiff d;
  std::set<std::string> keys;
  for (const auto* side : {&a, &b})
    for (const auto& [key, value] : side->config) keys.insert(key);
  for (const std::string& key : keys) {
    const auto x = a.config.find(key), y = b.config.find(key);
    if (x == a.config.end() || y == b.config.end() || x->second != y->second) d.keys.push_back(key);
  }
  for (const auto& [step, hash] : a.hashes) {
    const auto other = b.hashes.find(step);
    if (other == b.hashes.end() || hash.empty() || other->second.empty()) continue;
    ++d.hashes_compared;
    if (hash == other->second) continue;
    ++d.other_hashes;
    if (!d.first_hash) d.first_hash = step;
  }
  for (const auto& [step, values] : a.metrics) {
    const auto other = b.metrics.find(step);
    if (other == b.metrics.end()) continue;
    ++d.steps_compared;
    for (const auto& [name, value] : values) {
      const auto y = other->second.find(name);
      if (y == other->second.end() || same_number(value, y->second) || is_timing(name)) continue;
      auto [it, fresh] = d.metrics.try_emplace(name, RunDiff::Metric{step, 0, value, y->second});
      ++it->second.steps;
    }
  }
  return d;
}

std::string value_text(const RunSide& s, const std::string& key) {
  const auto it = s.config.find(key);
  return it == s.config.end()
             ? "-"
             : printable_line(it->second.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace), 60);
}

// A row for each evaluation that either has, by phase and step.
std::map<std::pair<bool, int64_t>, std::pair<const Evaluation*, const Evaluation*>> evaluations(
    const RunSide& a, const RunSide& b) {
  std::map<std::pair<bool, int64_t>, std::pair<const Evaluation*, const Evaluation*>> out;
  for (const Evaluation& e : a.evaluations) out[{e.phase != "warmup", e.step}].first = &e;
  for (const Evaluation& e : b.evaluations) out[{e.phase != "warmup", e.step}].second = &e;
  return out;
}

std::optional<double> last_metric(const RunSide& s, const std::string& name) {
  for (auto it = s.metrics.rbegin(); it != s.metrics.rend(); ++it)
    if (const auto v = it->second.find(name); v != it->second.end()) return v->second;
  return std::nullopt;
}

nlohmann::json config_json(const RunSide& s, const std::string& key) {
  const auto it = s.config.find(key);
  return it == s.config.end() ? nlohmann::json() : it->second;
}

std::string last_hash(const RunSide& s) {
  return s.versions.empty() ? "-" : s.versions.back().weights_hash;
}

constexpr const char* kReward = "reward_mean";

}  // namespace

int diff_runs(const std::string& name_a, const std::string& name_b, bool json) {
  const RunSide a = open_run(name_a), b = open_run(name_b);
  const RunDiff d = compare(a, b);
  const bool same = !d.first_hash && d.hashes_compared > 0 && a.versions.size() == b.versions.size();
  const auto accuracy = evaluations(a, b);
  if (json) {
    const auto step_json = [](const std::pair<bool, int64_t>& s) {
      return nlohmann::json{{"phase", s.first ? "rl" : "warmup"}, {"step", s.second}};
    };
    nlohmann::json config = nlohmann::json::array(), metrics = nlohmann::json::array(),
                   held_out = nlohmann::json::array(), by_step = nlohmann::json::array();
    for (const std::string& key : d.keys)
      config.push_back({{"key", key}, {"a", config_json(a, key)}, {"b", config_json(b, key)}});
    for (const auto& [name, m] : d.metrics)
      metrics.push_back(
          {{"name", name}, {"first", step_json(m.first)}, {"steps", m.steps}, {"a", m.a}, {"b", m.b}});
    for (const auto& [step, pair] : accuracy) {
      nlohmann::json row = step_json(step);
      row["a"] = pair.first != nullptr ? nlohmann::json(pair.first->accuracy) : nlohmann::json();
      row["b"] = pair.second != nullptr ? nlohmann::json(pair.second->accuracy) : nlohmann::json();
      held_out.push_back(std::move(row));
    }
    for (const auto& [step, values] : a.metrics) {
      const auto other = b.metrics.find(step);
      if (other == b.metrics.end()) continue;
      nlohmann::json row = step_json(step);
      for (const auto& [name, value] : values)
        if (const auto y = other->second.find(name); y != other->second.end())
          row["values"][name] = {value, y->second};
      by_step.push_back(std::move(row));
    }
    const auto side = [](const RunSide& s) {
      const auto reward = last_metric(s, kReward);
      return nlohmann::json{{"run", s.place.id},
                            {"directory", s.place.directory.string()},
                            {"state", s.record.state},
                            {"code_version", s.record.code_version},
                            {"versions", s.versions.size()},
                            {"weights_hash", last_hash(s)},
                            {"reward", reward ? nlohmann::json(*reward) : nlohmann::json()}};
    };
    print_json({{"a", side(a)},
                {"b", side(b)},
                {"config", std::move(config)},
                {"versions_compared", d.hashes_compared},
                {"versions_with_other_hash", d.other_hashes},
                {"first_other_hash", d.first_hash ? step_json(*d.first_hash) : nlohmann::json()},
                {"metrics", std::move(metrics)},
                {"metrics_by_step", std::move(by_step)},
                {"held_out", std::move(held_out)},
                {"same_weights", same}});
    return same ? 0 : 1;
  }
  Table head({"", "a", "b"});
  const auto number = [](const std::optional<double>& x) {
    return x ? fmt::format("{:.4f}", *x) : std::string("-");
  };
  head.row({"run", a.place.directory.string(), b.place.directory.string()});
  head.row({"state", a.record.state, b.record.state});
  head.row({"code", a.record.code_version, b.record.code_version});
  head.row({"versions", std::to_string(a.versions.size()), std::to_string(b.versions.size())});
  head.row({"last weights", last_hash(a), last_hash(b)});
  head.row({"last reward", number(last_metric(a, kReward)), number(last_metric(b, kReward))});
  head.print();
  if (d.keys.empty()) {
    fmt::print("\nconfiguration  the same\n");
  } else {
    fmt::print("\n");
    Table table({"configuration", "a", "b"});
    for (const std::string& key : d.keys)
      table.row({printable_line(key), value_text(a, key), value_text(b, key)});
    table.print();
  }
  fmt::print("\nweights        {}\n",
             d.hashes_compared == 0 ? "no version that both recorded"
             : !d.first_hash ? fmt::format("the same after all {} steps that both made", d.hashes_compared)
                             : fmt::format("another hash from {} on ({} of {} that both made)",
                                           step_name(*d.first_hash), d.other_hashes, d.hashes_compared));
  if (d.metrics.empty()) {
    fmt::print("metrics        the same at all {} steps that both made\n", d.steps_compared);
  } else {
    fmt::print("\n");
    Table table({"metric", "first other at", "a", "b", "steps"}, {2, 3, 4});
    for (const auto& [name, m] : d.metrics)
      table.row({printable_line(name), step_name(m.first), fmt::format("{:.6g}", m.a),
                 fmt::format("{:.6g}", m.b), fmt::format("{} of {}", m.steps, d.steps_compared)});
    table.print();
  }
  if (!accuracy.empty()) {
    fmt::print("\n");
    Table table({"held-out after", "a", "b"}, {1, 2});
    const auto cell = [](const Evaluation* e) {
      return e == nullptr ? std::string("-") : fmt::format("{:.1f} %", 100 * e->accuracy);
    };
    for (const auto& [step, pair] : accuracy)
      table.row({step_name(step), cell(pair.first), cell(pair.second)});
    table.print();
  }
  return same ? 0 : 1;
}

}  // namespace perigee::apps
