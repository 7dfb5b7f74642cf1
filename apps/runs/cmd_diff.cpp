// perigee diff: two episodes side by side, or two runs: what is not the same, and where it begins.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <set>

#include "apps/command_line/commands.h"
#include "apps/command_line/run_argument.h"
#include "apps/output/output.h"
#include "apps/runs/episode_json.h"
#include "base/error.h"
#include "base/text.h"
#include "rollout/replay/whole.h"
#include "rollout/run/run.h"
#include "rollout/setup/run_model.h"

namespace perigee::apps {
namespace {

struct Options {
  std::vector<std::string> names;
  bool json = false;
};

// ---- two episodes

struct Side {
  RunPlace place;
  std::unique_ptr<policy::Tokenizer> tokenizer;
  rollout::WholeEpisode whole;
  std::string name;
};

Side open_side(const std::string& run, const std::string& episode) {
  Side side;
  side.place = find_run({run, false});
  const int64_t id = parse_episode(episode);
  StoreReader store(side.place.store());
  side.whole = rollout::whole_episode(store, id);
  const rollout::RunConfig config = rollout::run_config_of(side.place.directory.string());
  side.tokenizer = rollout::make_tokenizer(config, rollout::make_layout(config)->config());
  side.name = fmt::format("{} {}", side.place.id, id);
  return side;
}

std::string text_from(const Side& side, size_t begin, size_t end) {
  const auto& t = side.whole.tokens;
  begin = std::min(begin, t.size());
  end = std::min(std::max(begin, end), t.size());
  return text_of(*side.tokenizer,
                 {t.begin() + static_cast<ptrdiff_t>(begin), t.begin() + static_cast<ptrdiff_t>(end)});
}

struct EpisodeDiff {
  bool same_prompt = false;
  size_t shared = 0;  // tokens after the prompt, from the first on, that are the same
  int64_t first_logprob =
      -1;  // of the shared ones, the first whose log-probabilities are not the same bits; -1: none
  int64_t other_logprobs = 0;
  double largest = 0;
  bool identical = false;  // tokens, log-probabilities, prompt and finish
};

EpisodeDiff compare(const rollout::WholeEpisode& a, const rollout::WholeEpisode& b) {
  EpisodeDiff d;
  d.same_prompt = a.prompt == b.prompt;
  const auto [x, y] = std::mismatch(a.tokens.begin(), a.tokens.end(), b.tokens.begin(), b.tokens.end());
  d.shared = static_cast<size_t>(x - a.tokens.begin());
  for (size_t i = 0; i < d.shared; ++i) {
    if (std::memcmp(&a.logprobs[i], &b.logprobs[i], sizeof(float)) == 0) continue;
    if (d.first_logprob < 0) d.first_logprob = static_cast<int64_t>(i);
    ++d.other_logprobs;
    d.largest = std::max(d.largest, std::fabs(static_cast<double>(a.logprobs[i]) - b.logprobs[i]));
  }
  d.identical = d.same_prompt && d.shared == a.tokens.size() && d.shared == b.tokens.size() &&
                d.other_logprobs == 0 && a.record.finish == b.record.finish;
  return d;
}

nlohmann::json token_json(const Side& s, size_t i) {
  if (i >= s.whole.tokens.size()) return nullptr;
  return {{"id", s.whole.tokens[i]},
          {"text", token_text(*s.tokenizer, s.whole.tokens[i])},
          {"logprob", s.whole.logprobs[i]},
          {"version", s.whole.versions[i]},
          {"sampled", s.whole.sampled[i] != 0}};
}

// Component by component, in the order of the first episode's, then those that only the second has.
struct ComponentPair {
  std::string name;
  const RewardComponent* a = nullptr;
  const RewardComponent* b = nullptr;
};
std::vector<ComponentPair> components(const EpisodeRecord& a, const EpisodeRecord& b) {
  std::vector<ComponentPair> pairs;
  if (a.reward)
    for (const RewardComponent& c : a.reward->components) pairs.push_back({c.name, &c, nullptr});
  if (b.reward)
    for (const RewardComponent& c : b.reward->components) {
      const auto it =
          std::find_if(pairs.begin(), pairs.end(), [&](const ComponentPair& p) { return p.name == c.name; });
      if (it != pairs.end())
        it->b = &c;
      else
        pairs.push_back({c.name, nullptr, &c});
    }
  return pairs;
}

std::string versions_text(const rollout::WholeEpisode& e) {
  if (e.versions.empty()) return "-";
  const auto [low, high] = std::minmax_element(e.versions.begin(), e.versions.end());
  return *low == *high ? std::to_string(*low) : fmt::format("{} to {}", *low, *high);
}

std::string reward_text(const EpisodeRecord& e) {
  return !e.reward ? "-" : e.reward->failed ? "failed" : fmt::format("{:.4f}", e.reward->total);
}

// Lines of both texts beside each other, as wide as a terminal of 120 columns.
void print_beside(const Side& a, const Side& b, size_t from) {
  constexpr size_t kWide = 56, kLines = 60;
  const auto wrap = [&](const std::string& text) {
    // By code points of text that is safe for a terminal.
    std::vector<std::string> lines(1);
    size_t columns = 0;
    for (const char c : printable(text)) {
      const bool begins = (static_cast<unsigned char>(c) & 0xC0) != 0x80;
      if (c == '\n' || (begins && columns == kWide)) {
        lines.emplace_back();
        columns = 0;
        if (c == '\n') continue;
      }
      lines.back() += c == '\t' ? ' ' : c;
      columns += begins;
    }
    return lines;
  };
  const std::vector<std::string> x = wrap(text_from(a, from, a.whole.tokens.size())),
                                 y = wrap(text_from(b, from, b.whole.tokens.size()));
  Table table({a.name, b.name});
  const size_t rows = std::max(x.size(), y.size());
  for (size_t i = 0; i < std::min(rows, kLines); ++i)
    table.row({i < x.size() ? x[i] : "", i < y.size() ? y[i] : ""});
  table.print();
  if (rows > kLines) fmt::print("and {} lines more\n", rows - kLines);
}

int diff_episodes(const Side& a, const Side& b, bool json) {
  const EpisodeDiff d = compare(a.whole, b.whole);
  const auto pairs = components(a.whole.record, b.whole.record);
  if (json) {
    const auto side = [](const Side& s) {
      return nlohmann::json{
          {"run", s.place.id},
          {"episode", s.whole.record.spec.episode_id},
          {"seed", s.whole.record.spec.seed},
          {"temperature", s.whole.record.spec.temperature},
          {"tokens", s.whole.tokens.size()},
          {"finish", finish_name(s.whole.record.finish)},
          {"reward", s.whole.record.reward ? nlohmann::json(s.whole.record.reward->total) : nlohmann::json()},
          {"text", text_from(s, 0, s.whole.tokens.size())}};
    };
    nlohmann::json rewards = nlohmann::json::array();
    for (const ComponentPair& p : pairs)
      rewards.push_back({{"name", p.name},
                         {"a", p.a != nullptr ? nlohmann::json(p.a->value) : nlohmann::json()},
                         {"b", p.b != nullptr ? nlohmann::json(p.b->value) : nlohmann::json()}});
    const bool parted = d.shared < a.whole.tokens.size() || d.shared < b.whole.tokens.size();
    print_json({{"a", side(a)},
                {"b", side(b)},
                {"same_prompt", d.same_prompt},
                {"shared_tokens", d.shared},
                {"first_token", parted ? nlohmann::json{{"token", d.shared},
                                                        {"a", token_json(a, d.shared)},
                                                        {"b", token_json(b, d.shared)}}
                                       : nlohmann::json()},
                {"logprobs_differ", d.other_logprobs},
                {"first_logprob", d.first_logprob < 0 ? nlohmann::json() : nlohmann::json(d.first_logprob)},
                {"largest_logprob_difference", d.largest},
                {"components", std::move(rewards)},
                {"identical", d.identical}});
    return d.identical ? 0 : 1;
  }
  Table head({"", a.name, b.name});
  const auto row = [&](const char* name, const std::string& x, const std::string& y) {
    head.row({name, x, y});
  };
  row("seed", std::to_string(a.whole.record.spec.seed), std::to_string(b.whole.record.spec.seed));
  row("temperature", fmt::format("{:g}", a.whole.record.spec.temperature),
      fmt::format("{:g}", b.whole.record.spec.temperature));
  row("versions", versions_text(a.whole), versions_text(b.whole));
  row("tokens", std::to_string(a.whole.tokens.size()), std::to_string(b.whole.tokens.size()));
  row("finish", std::string(finish_name(a.whole.record.finish)),
      std::string(finish_name(b.whole.record.finish)));
  row("reward", reward_text(a.whole.record), reward_text(b.whole.record));
  for (const ComponentPair& p : pairs)
    row(("  " + printable_line(p.name)).c_str(), p.a != nullptr ? fmt::format("{:.4f}", p.a->value) : "-",
        p.b != nullptr ? fmt::format("{:.4f}", p.b->value) : "-");
  head.print();
  fmt::print("\nprompt         {}\n", d.same_prompt ? "the same" : "another one");
  if (d.shared == a.whole.tokens.size() && d.shared == b.whole.tokens.size()) {
    fmt::print("tokens         all {} the same\n", d.shared);
  } else {
    fmt::print("tokens         the first {} are the same\n", d.shared);
    const auto first = [&](const Side& s) {
      if (d.shared >= s.whole.tokens.size()) return fmt::format("{} ends there", s.name);
      return fmt::format("{} has {} ({}), log-probability {:.5f}", s.name, s.whole.tokens[d.shared],
                         quote(token_text(*s.tokenizer, s.whole.tokens[d.shared])),
                         s.whole.logprobs[d.shared]);
    };
    fmt::print("token {:<8} {}\n               {}\n", d.shared, printable_line(first(a)),
               printable_line(first(b)));
  }
  if (d.other_logprobs > 0)
    fmt::print(
        "probabilities  {} of the shared tokens have other log-probabilities, from token {} on, by at most "
        "{:.3g}\n",
        d.other_logprobs, d.first_logprob, d.largest);
  else if (d.shared > 0)
    fmt::print("probabilities  of the shared tokens the same bits\n");
  if (d.shared > 0) fmt::print("\nshared\n{}\n", printable(text_from(a, 0, d.shared)));
  if (d.shared < a.whole.tokens.size() || d.shared < b.whole.tokens.size()) {
    fmt::print("\nfrom there on\n");
    print_beside(a, b, d.shared);
  }
  return d.identical ? 0 : 1;
}

// ---- two runs

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

int diff_runs(const RunSide& a, const RunSide& b, bool json) {
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

int diff(const Options& o) {
  const auto& n = o.names;
  if (n.size() == 2) return diff_runs(open_run(n[0]), open_run(n[1]), o.json);
  if (n.size() == 3) return diff_episodes(open_side(n[0], n[1]), open_side(n[0], n[2]), o.json);
  if (n.size() == 4) return diff_episodes(open_side(n[0], n[1]), open_side(n[2], n[3]), o.json);
  throw_input(
      "diff: two runs (RUN RUN), two episodes of one run (RUN EPISODE EPISODE), or of two (RUN EPISODE RUN "
      "EPISODE)");
}

}  // namespace

void add_diff(Program& program) {
  auto o = std::make_shared<Options>();
  Command command = program.command("diff", "Two episodes or two runs: where they part", kGroupLook);
  command.positionals("WHAT", o->names, "RUN RUN, RUN EPISODE EPISODE, or RUN EPISODE RUN EPISODE")
      .flag("--json", o->json, "print one JSON object")
      .example("diff runs/quickstart runs/quickstart-lr2")
      .example("diff runs/quickstart 17 18")
      .example("diff runs/a 17 runs/b 17");
  command.action([o] { return diff(*o); });
}

}  // namespace perigee::apps
