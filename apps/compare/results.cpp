#include "apps/compare/results.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>

#include "apps/compare/runs.h"
#include "base/error.h"
#include "base/file.h"
#include "storage/store.h"

namespace perigee::apps::compare {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr const char* kContextFile = "context.json";

double value_of(const StepMetrics& m, std::string_view key) {
  for (const auto& [name, value] : m.values)
    if (name == key) return value;
  return NAN;
}

Curve curve_of(const std::map<int64_t, double>& points) {
  Curve c;
  for (const auto& [step, value] : points) {
    if (!std::isfinite(value)) continue;
    c.x.push_back(static_cast<double>(step));
    c.y.push_back(value);
  }
  return c;
}

std::map<std::string, double> levels_of(const json& detail) {
  std::map<std::string, double> out;
  const auto levels = detail.find("levels");
  if (levels == detail.end() || !levels->is_object() || levels->size() < 2) return out;
  for (const auto& [name, level] : levels->items())
    if (const double n = level.value("n", 0.0); n > 0) out[name] = level.value("correct", 0.0) / n;
  return out;
}

RunResult read_run(const Plan& plan, const fs::path& out, const PlannedRun& planned) {
  RunResult r;
  const auto& points = plan.comparison.tasks[planned.task].evaluate;
  r.evaluated.resize(points.size());
  const fs::path file = run_directory(out, planned) / "store.sqlite";
  if (!file_exists(file.string())) return r;
  std::optional<StoreReader> opened;
  try {
    opened.emplace(file);
  } catch (const Error& e) {
    if (e.kind() != Error::Kind::kInput) throw;
    r.state = e.what();  // killed while it was being made
    return r;
  }
  StoreReader& store = *opened;
  if (!store.has_run(planned.id)) return r;
  r.state = store.run(planned.id).state;
  const auto versions = store.versions(planned.id);
  if (!versions.empty()) {
    r.weights_hash = versions.back().weights_hash;
    r.steps = static_cast<int64_t>(versions.back().version);
  }
  std::map<int64_t, double> warmup, rl, warmup_score, rl_score, reward, loss;
  for (const Evaluation& e : store.evaluations(planned.id)) {
    const bool warm = e.phase == "warmup";
    (warm ? warmup : rl)[e.step] = e.accuracy;
    r.final_accuracy = e.accuracy;
    const json detail = json::parse(e.detail, nullptr, false);
    if (!detail.is_object()) continue;
    if (const auto it = detail.find("mean_reward"); it != detail.end() && it->is_number())
      r.final_score = (warm ? warmup_score : rl_score)[e.step] = it->get<double>();
    r.levels = levels_of(detail);
  }
  // Without reinforcement learning there is nothing that its point 0 would begin.
  if (!rl.empty() && !warmup.empty()) rl[0] = warmup.rbegin()->second;
  if (!rl_score.empty() && !warmup_score.empty()) rl_score[0] = warmup_score.rbegin()->second;
  std::map<std::string, std::pair<double, double>> learnt;  // tokens, seconds, by phase
  std::vector<double> sampled;
  for (const StepMetrics& m : store.metrics(planned.id)) {
    const double tokens = value_of(m, "tokens"), seconds = value_of(m, "learn_seconds");
    if (std::isfinite(tokens) && std::isfinite(seconds)) {
      learnt[m.phase].first += tokens;
      learnt[m.phase].second += seconds;
    }
    if (m.phase == "warmup") loss[m.step] = value_of(m, "loss");
    if (m.phase == "rl") {
      reward[m.step] = value_of(m, "reward_mean");
      if (const double rate = value_of(m, "tokens_per_s"); std::isfinite(rate)) sampled.push_back(rate);
    }
  }
  const auto rate = [&](const char* phase) -> std::optional<double> {
    const auto it = learnt.find(phase);
    if (it == learnt.end() || it->second.second <= 0) return std::nullopt;
    return it->second.first / it->second.second;
  };
  r.warmup_rate = rate("warmup");
  r.rl_rate = rate("rl");
  if (!sampled.empty()) r.sample_rate = median(sampled);
  r.warmup_accuracy = curve_of(warmup);
  r.rl_accuracy = curve_of(rl);
  r.warmup_score = curve_of(warmup_score);
  r.rl_score = curve_of(rl_score);
  r.reward = curve_of(reward);
  r.loss = curve_of(loss);
  const bool over = r.state == "finished";
  for (Curve* c : {&r.warmup_accuracy, &r.rl_accuracy, &r.warmup_score, &r.rl_score}) c->complete = over;
  // A loss does not stay what it was at the end of a warm-up that ended early.
  r.loss.complete = r.reward.complete = false;
  for (size_t p = 0; p < points.size(); ++p)
    if (const auto said = evaluation_said(plan, out, planned, p))
      r.evaluated[p] = said->value("accuracy", NAN);
  return r;
}

// What a measurement is of: another model or other lengths are another measurement.
json measured_of(const Plan& plan) {
  json out = {{"lengths", plan.comparison.context.lengths},
              {"steps", plan.comparison.context.steps},
              {"memory_gib", plan.comparison.context.memory_gib},
              {"models", json::array()}};
  for (const auto& m : plan.context_models) out["models"].push_back(policy::to_json(m));
  return out;
}

}  // namespace

bool Results::complete() const {
  return std::all_of(runs.begin(), runs.end(), [](const RunResult& r) { return r.state == "finished"; });
}

Results read_results(const Plan& plan, const fs::path& out) {
  Results results;
  for (const PlannedRun& run : plan.runs) results.runs.push_back(read_run(plan, out, run));
  if (plan.runs.empty()) return results;
  for (size_t t = 0; t < plan.comparison.tasks.size(); ++t) {
    for (size_t v = 0; v < plan.comparison.variants.size(); ++v) {
      GroupResult g;
      g.variant = v;
      g.task = t;
      std::vector<Curve> warmup, rl, warmup_score, rl_score, reward, loss;
      std::map<std::string, std::vector<double>> levels;
      std::vector<double> final_accuracy, final_score, warmup_rate, rl_rate, sample_rate;
      std::vector<std::vector<double>> evaluated(plan.comparison.tasks[t].evaluate.size());
      const auto add = [](std::vector<double>& to, const std::optional<double>& value) {
        if (value && std::isfinite(*value)) to.push_back(*value);
      };
      for (size_t i = 0; i < plan.runs.size(); ++i) {
        if (plan.runs[i].variant != v || plan.runs[i].task != t) continue;
        const RunResult& r = results.runs[i];
        g.runs.push_back(i);
        if (!r.warmup_accuracy.x.empty()) warmup.push_back(r.warmup_accuracy);
        if (!r.rl_accuracy.x.empty()) rl.push_back(r.rl_accuracy);
        if (!r.warmup_score.x.empty()) warmup_score.push_back(r.warmup_score);
        if (!r.rl_score.x.empty()) rl_score.push_back(r.rl_score);
        if (!r.reward.x.empty()) reward.push_back(r.reward);
        if (!r.loss.x.empty()) loss.push_back(r.loss);
        if (r.state == "finished") {
          add(final_accuracy, r.final_accuracy);
          add(final_score, r.final_score);
          for (const auto& [name, accuracy] : r.levels) levels[name].push_back(accuracy);
        }
        add(warmup_rate, r.warmup_rate);
        add(rl_rate, r.rl_rate);
        add(sample_rate, r.sample_rate);
        for (size_t p = 0; p < evaluated.size(); ++p) add(evaluated[p], r.evaluated[p]);
      }
      g.warmup_accuracy = band_of(warmup);
      g.rl_accuracy = band_of(rl);
      g.warmup_score = band_of(warmup_score);
      g.rl_score = band_of(rl_score);
      g.reward = band_of(reward);
      g.loss = band_of(loss);
      g.final_accuracy = spread_of(final_accuracy);
      g.final_score = spread_of(final_score);
      for (const auto& [name, values] : levels) g.levels[name] = *spread_of(values);
      g.warmup_reached = reached(warmup, plan.comparison.reach);
      g.rl_reached = reached(rl, plan.comparison.reach);
      g.warmup_rate = spread_of(warmup_rate);
      g.rl_rate = spread_of(rl_rate);
      g.sample_rate = spread_of(sample_rate);
      for (const auto& values : evaluated) g.evaluated.push_back(spread_of(values));
      results.groups.push_back(std::move(g));
    }
  }
  return results;
}

void write_context(const fs::path& out, const Plan& plan, const ContextResults& results) {
  json file = {{"of", measured_of(plan)},
               {"threads", results.threads},
               {"machine", results.machine},
               {"variants", json::array()}};
  for (const auto& points : results.variants) {
    json list = json::array();
    for (const ContextPoint& p : points)
      list.push_back({{"tokens", p.tokens},
                      {"bytes", p.bytes},
                      {"left_out", p.left_out},
                      {"seconds", p.seconds},
                      {"processor_s", p.processor_s}});
    file["variants"].push_back(std::move(list));
  }
  write_file_atomic((out / kContextFile).string(), file.dump(1) + "\n");
}

std::optional<ContextResults> read_context(const fs::path& out, const Plan& plan) {
  const fs::path path = out / kContextFile;
  if (!file_exists(path.string())) return std::nullopt;
  const json file = json::parse(read_file(path.string()), nullptr, false);
  if (!file.is_object() || !file.contains("of") || file["of"] != measured_of(plan)) return std::nullopt;
  ContextResults results;
  try {
    results.threads = file.at("threads");
    results.machine = file.at("machine");
    for (const json& list : file.at("variants")) {
      auto& points = results.variants.emplace_back();
      for (const json& entry : list) {
        ContextPoint p;
        p.tokens = entry.at("tokens");
        p.bytes = entry.at("bytes");
        p.left_out = entry.at("left_out");
        p.seconds = entry.at("seconds").get<std::vector<double>>();
        p.processor_s = entry.at("processor_s").get<std::vector<double>>();
        p.summarize();
        points.push_back(std::move(p));
      }
    }
  } catch (const json::exception&) {
    return std::nullopt;
  }
  if (results.variants.size() != plan.context_models.size()) return std::nullopt;
  return results;
}

}  // namespace perigee::apps::compare
