#include "apps/compare/report.h"

#include <fmt/format.h>

#include <cmath>
#include <fstream>
#include <thread>

#include "apps/output/output.h"
#include "base/file.h"
#include "storage/store.h"

namespace perigee::apps::compare {
namespace {

using nlohmann::json;

json number(double value) {
  return std::isfinite(value) ? json(value) : json();
}
json number(const std::optional<double>& value) {
  return value ? number(*value) : json();
}

json spread_json(const std::optional<Spread>& s) {
  if (!s) return nullptr;
  return {{"runs", s->n}, {"median", s->median}, {"mean", s->mean}, {"min", s->min}, {"max", s->max}};
}

json band_json(const std::vector<BandPoint>& band) {
  json out = json::array();
  for (const BandPoint& p : band)
    out.push_back({{"step", p.x}, {"median", p.median}, {"min", p.min}, {"max", p.max}, {"runs", p.n}});
  return out;
}

json curve_json(const Curve& c) {
  json out = json::array();
  for (size_t i = 0; i < c.x.size(); ++i) out.push_back({c.x[i], c.y[i]});
  return out;
}

json reached_json(const Reached& r) {
  return {{"runs", r.n},
          {"of", r.of},
          {"median", number(r.median)},
          {"first", number(r.first)},
          {"last", number(r.last)}};
}

json context_json(const ReportInput& in) {
  if (in.context == nullptr) return nullptr;
  json variants = json::array();
  for (size_t v = 0; v < in.context->variants.size(); ++v) {
    json points = json::array();
    for (const ContextPoint& p : in.context->variants[v]) {
      json point = {{"tokens", p.tokens}, {"sequence_bytes", p.bytes}};
      if (p.left_out.empty())
        point.update({{"seconds_per_token",
                       {{"median", p.median_s},
                        {"min", p.min_s},
                        {"max", p.max_s},
                        {"processor_median", p.processor_median_s},
                        {"steps", p.seconds.size()}}}});
      else
        point["left_out"] = p.left_out;
      points.push_back(std::move(point));
    }
    const ModelFacts facts = model_facts(in.plan.context_models[v], in.plan.comparison.match.context);
    variants.push_back({{"variant", in.plan.comparison.variants[v].name},
                        {"model", facts.to_json()},
                        {"points", std::move(points)}});
  }
  return {
      {"machine", in.context->machine}, {"threads", in.context->threads}, {"variants", std::move(variants)}};
}

// Lines of a CSV file.
class Lines {
 public:
  void add(std::string_view table, const std::string& variant, const std::string& task,
           const std::string& seed, std::string_view phase, std::string_view key, const std::string& x,
           double value) {
    if (!std::isfinite(value)) return;
    text_ += fmt::format("{},{},{},{},{},{},{},{}\n", table, csv_field(variant), csv_field(task), seed, phase,
                         key, csv_field(x), value);
  }
  const std::string& text() const { return text_; }

 private:
  std::string text_ = "table,variant,task,seed,phase,key,x,value\n";
};

}  // namespace

std::string machine_text() {
  std::ifstream in("/proc/cpuinfo");
  std::string name = "unknown processor";
  for (std::string line; std::getline(in, line);) {
    const size_t colon = line.find(':');
    if (!line.starts_with("model name") || colon == std::string::npos) continue;
    name = printable_line(line.substr(std::min(line.size(), colon + 2)), 80);
    break;
  }
  return fmt::format("{}, {} cores", name, std::thread::hardware_concurrency());
}

json report_json(const ReportInput& in) {
  const Comparison& c = in.plan.comparison;
  json out = {{"name", c.name},         {"about", c.about}, {"program", in.program},
              {"machine", in.machine},  {"reach", c.reach}, {"complete", in.results.complete()},
              {"seeds", c.seeds},       {"jobs", in.jobs},  {"threads", in.threads},
              {"failures", in.failures}};
  json& variants = out["variants"] = json::array();
  for (size_t v = 0; v < c.variants.size(); ++v) {
    json one = {{"name", c.variants[v].name}};
    one.update(in.plan.facts[v].to_json());
    variants.push_back(std::move(one));
  }
  json& tasks = out["tasks"] = json::array();
  for (const TaskAxis& t : c.tasks) {
    json points = json::array();
    for (const EvaluationPoint& p : t.evaluate)
      points.push_back({{"name", p.name}, {"x", p.x}, {"tasks", p.tasks}});
    tasks.push_back({{"name", t.setting.name}, {"evaluate", std::move(points)}});
  }
  json& differences = out["differences"] = json::array();
  for (const Difference& d : in.plan.differences)
    differences.push_back({{"key", d.key}, {"values", d.values}});
  json& runs = out["runs"] = json::array();
  for (size_t i = 0; i < in.plan.runs.size(); ++i) {
    const PlannedRun& p = in.plan.runs[i];
    const RunResult& r = in.results.runs[i];
    json evaluated = json::array();
    for (const auto& value : r.evaluated) evaluated.push_back(number(value));
    runs.push_back({{"id", p.id},
                    {"variant", c.variants[p.variant].name},
                    {"task", c.tasks[p.task].setting.name},
                    {"seed", p.seed},
                    {"state", r.state},
                    {"steps", r.steps},
                    {"weights_hash", r.weights_hash},
                    {"final_accuracy", number(r.final_accuracy)},
                    {"final_mean_reward", number(r.final_score)},
                    {"levels", r.levels},
                    {"warmup_accuracy", curve_json(r.warmup_accuracy)},
                    {"rl_accuracy", curve_json(r.rl_accuracy)},
                    {"warmup_mean_reward", curve_json(r.warmup_score)},
                    {"rl_mean_reward", curve_json(r.rl_score)},
                    {"reward", curve_json(r.reward)},
                    {"warmup_tokens_per_s", number(r.warmup_rate)},
                    {"rl_learn_tokens_per_s", number(r.rl_rate)},
                    {"rl_step_tokens_per_s", number(r.sample_rate)},
                    {"evaluated", std::move(evaluated)}});
  }
  json& groups = out["results"] = json::array();
  for (const GroupResult& g : in.results.groups) {
    json evaluated = json::array();
    for (const auto& s : g.evaluated) evaluated.push_back(spread_json(s));
    json levels = json::object();
    for (const auto& [name, s] : g.levels) levels[name] = spread_json(s);
    groups.push_back({{"variant", c.variants[g.variant].name},
                      {"task", c.tasks[g.task].setting.name},
                      {"final_accuracy", spread_json(g.final_accuracy)},
                      {"final_mean_reward", spread_json(g.final_score)},
                      {"levels", std::move(levels)},
                      {"warmup_steps_to_reach", reached_json(g.warmup_reached)},
                      {"rl_steps_to_reach", reached_json(g.rl_reached)},
                      {"warmup_tokens_per_s", spread_json(g.warmup_rate)},
                      {"rl_learn_tokens_per_s", spread_json(g.rl_rate)},
                      {"rl_step_tokens_per_s", spread_json(g.sample_rate)},
                      {"evaluated", std::move(evaluated)},
                      {"warmup_accuracy", band_json(g.warmup_accuracy)},
                      {"rl_accuracy", band_json(g.rl_accuracy)},
                      {"warmup_mean_reward", band_json(g.warmup_score)},
                      {"rl_mean_reward", band_json(g.rl_score)},
                      {"reward", band_json(g.reward)},
                      {"warmup_loss", band_json(g.loss)}});
  }
  out["context"] = context_json(in);
  return out;
}

std::string report_csv(const ReportInput& in) {
  const Comparison& c = in.plan.comparison;
  Lines out;
  for (size_t v = 0; v < c.variants.size(); ++v) {
    const ModelFacts& f = in.plan.facts[v];
    const std::string& name = c.variants[v].name;
    out.add("model", name, "", "", "", "parameters", "", static_cast<double>(f.parameters));
    out.add("model", name, "", "", "", "operations_per_token", std::to_string(f.context), f.operations());
    out.add("model", name, "", "", "", "cache_bytes_per_token", "", f.cache_bytes_per_token);
    out.add("model", name, "", "", "", "state_bytes", "", static_cast<double>(f.state_bytes));
  }
  for (size_t i = 0; i < in.plan.runs.size(); ++i) {
    const PlannedRun& p = in.plan.runs[i];
    const RunResult& r = in.results.runs[i];
    const std::string &variant = c.variants[p.variant].name, &task = c.tasks[p.task].setting.name,
                      seed = std::to_string(p.seed);
    const auto curve = [&](const char* phase, const char* key, const Curve& points) {
      for (size_t k = 0; k < points.x.size(); ++k)
        out.add("curve", variant, task, seed, phase, key, fmt::format("{}", points.x[k]), points.y[k]);
    };
    curve("warmup", "accuracy", r.warmup_accuracy);
    curve("rl", "accuracy", r.rl_accuracy);
    curve("warmup", "mean_reward", r.warmup_score);
    curve("rl", "mean_reward", r.rl_score);
    curve("rl", "reward", r.reward);
    curve("warmup", "loss", r.loss);
    const auto single = [&](const char* phase, const char* key, const std::optional<double>& value) {
      if (value) out.add("run", variant, task, seed, phase, key, "", *value);
    };
    single("", "final_accuracy", r.final_accuracy);
    single("", "final_mean_reward", r.final_score);
    for (const auto& [name, accuracy] : r.levels)
      out.add("level", variant, task, seed, "", "accuracy", name, accuracy);
    single("warmup", "learn_tokens_per_s", r.warmup_rate);
    single("rl", "learn_tokens_per_s", r.rl_rate);
    single("rl", "step_tokens_per_s", r.sample_rate);
    single("warmup", "steps_to_reach", reached(r.warmup_accuracy, c.reach));
    single("rl", "steps_to_reach", reached(r.rl_accuracy, c.reach));
    for (size_t k = 0; k < r.evaluated.size(); ++k)
      if (r.evaluated[k])
        out.add("evaluate", variant, task, seed, "", "accuracy", c.tasks[p.task].evaluate[k].name,
                *r.evaluated[k]);
  }
  if (in.context != nullptr)
    for (size_t v = 0; v < in.context->variants.size(); ++v)
      for (const ContextPoint& p : in.context->variants[v]) {
        const std::string& name = c.variants[v].name;
        out.add("context", name, "", "", "", "sequence_bytes", std::to_string(p.tokens),
                static_cast<double>(p.bytes));
        if (p.left_out.empty()) {
          out.add("context", name, "", "", "", "seconds_per_token", std::to_string(p.tokens), p.median_s);
          out.add("context", name, "", "", "", "processor_seconds_per_token", std::to_string(p.tokens),
                  p.processor_median_s);
        }
      }
  return out.text();
}

void write_report(const std::filesystem::path& out, const ReportInput& input) {
  const json report = report_json(input);
  write_file_atomic((out / "report.json").string(),
                    report.dump(1, ' ', false, json::error_handler_t::replace) + "\n");
  write_file_atomic((out / "report.csv").string(), report_csv(input));
  write_file_atomic((out / "report.html").string(), report_html(input));
}

}  // namespace perigee::apps::compare
