#include "apps/runs/run_metrics.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <nlohmann/json.hpp>

namespace perigee::apps {
namespace {

struct Known {
  std::string_view key, title, phase;
};
constexpr Known kCurves[] = {
    {"reward_mean", "reward", "rl"},
    {"accuracy", "held-out accuracy", "rl"},
    {"kl", "KL to the reference", "rl"},
    {"mismatch_max", "mismatch", "rl"},
    {"entropy", "entropy", "rl"},
    {"length_mean", "length", "rl"},
    {"tokens_per_s", "tokens/s", "rl"},
    {"lag_mean", "lag", "rl"},
    {"loss", "loss", "rl"},
    {"grad_norm", "gradient norm", "rl"},
    {"clip_fraction", "clipped", "rl"},
    {"groups_equal", "groups all equal", "rl"},
    {"loss", "warm-up loss", "warmup"},
    {"accuracy", "warm-up accuracy", "warmup"},
};

void add_accuracy(std::vector<Series>& out, const Known& known, const std::vector<Evaluation>& evaluations) {
  std::vector<std::string> names;
  for (const Evaluation& e : evaluations)
    if (std::find(names.begin(), names.end(), e.name) == names.end()) names.push_back(e.name);
  for (const std::string& name : names) {
    std::map<int64_t, double> points;
    for (const Evaluation& e : evaluations)
      if (e.name == name && e.phase == known.phase) points[e.step] = e.accuracy;
    if (points.empty()) continue;
    if (known.phase == "rl")
      for (const Evaluation& e : evaluations)
        if (e.name == name && e.phase == "warmup") points[0] = e.accuracy;
    Series s{std::string(known.key), std::string(known.title), std::string(known.phase), {}, {}};
    if (names.size() > 1) {
      s.key += ":" + name;
      s.title += ": " + name;
    }
    for (const auto& [step, value] : points) s.steps.push_back(step), s.values.push_back(value);
    out.push_back(std::move(s));
  }
}

}  // namespace

bool has_reference(const std::string& text) {
  const nlohmann::json config = nlohmann::json::parse(text, nullptr, false);
  if (!config.is_object()) return true;
  const auto learn = config.find("learn");
  if (learn == config.end() || !learn->is_object()) return true;
  const auto coef = learn->find("kl_coef");
  return coef == learn->end() || !coef->is_number() || coef->get<double>() != 0;
}

std::vector<Series> run_series(StoreQueries& store, const std::string& run_id) {
  const std::vector<StepMetrics> metrics = store.metrics(run_id);
  const std::vector<Evaluation> evaluations = store.evaluations(run_id);
  const bool reference = has_reference(store.run(run_id).config);
  std::vector<Series> out;
  for (const Known& known : kCurves) {
    if (known.key == "kl" && !reference) continue;
    if (known.key == "accuracy") {
      add_accuracy(out, known, evaluations);
      continue;
    }
    Series s{std::string(known.key), std::string(known.title), std::string(known.phase), {}, {}};
    for (const StepMetrics& m : metrics) {
      if (m.phase != known.phase) continue;
      for (const auto& [name, value] : m.values)
        if (name == known.key) s.steps.push_back(m.step), s.values.push_back(value);
    }
    if (!s.steps.empty()) out.push_back(std::move(s));
  }
  return out;
}

std::string metric_text(std::string_view key, double value) {
  if (!std::isfinite(value)) return std::isnan(value) ? "not a number" : value > 0 ? "infinite" : "-infinite";
  if (key.starts_with("accuracy") || key == "correct" || key == "clip_fraction") return fmt::format("{:.1f} %", 100 * value);
  const double size = std::fabs(value);
  if (size != 0 && (size < 1e-3 || size >= 1e6)) return fmt::format("{:.2e}", value);
  if (size >= 1000) return fmt::format("{:.0f}", value);
  return fmt::format("{:.{}f}", value, size >= 100 ? 1 : size >= 10 ? 2 : 3);
}

RunProgress run_progress(StoreQueries& store, const std::string& run_id) {
  RunProgress p;
  p.run = store.run(run_id);
  p.phase = "starting";
  p.started_us = p.last_us = p.run.created_us;
  const std::vector<PolicyVersion> versions = store.versions(run_id);
  if (!versions.empty()) {
    const PolicyVersion& last = versions.back();
    p.version = last.version;
    p.last_us = last.created_us;
    if (last.step > 0 || last.phase == "rl") {
      p.phase = last.phase;
      p.step = last.step;
    }
  }
  const nlohmann::json config = nlohmann::json::parse(p.run.config, nullptr, false);
  const char* section = p.phase == "rl" ? "learn" : "warmup";
  if (config.is_object() && config.contains(section) && config[section].is_object()) {
    const auto steps = config[section].find("steps");
    if (steps != config[section].end() && steps->is_number_integer()) p.steps = steps->get<int64_t>();
  }
  return p;
}

}  // namespace perigee::apps
