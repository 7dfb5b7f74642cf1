#include "apps/compare/plan.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <set>

#include "base/error.h"
#include "base/json.h"
#include "base/text.h"
#include "reward/rubric.h"
#include "rollout/setup/run_model.h"
#include "rollout/setup/run_tasks.h"

namespace perigee::apps::compare {
namespace {

using nlohmann::json;

// Keys that must not differ between variants: data, reward, budget, and where it is computed. (Of a section: all in it.)
constexpr std::string_view kEqual[] = {"run.device",
                                       "run.numerics",
                                       "tokenizer",
                                       "tasks",
                                       "environment",
                                       "reward",
                                       "warmup.steps",
                                       "warmup.batch",
                                       "warmup.eval_every",
                                       "warmup.stop_accuracy",
                                       "rollout",
                                       "learn.steps",
                                       "learn.ptx_batch",
                                       "learn.minibatches",
                                       "eval",
                                       "model.dtype"};

bool must_be_equal(const std::string& key) {
  return std::any_of(std::begin(kEqual), std::end(kEqual), [&](std::string_view e) {
    return key.starts_with(e) && (key.size() == e.size() || key[e.size()] == '.');
  });
}

// Leaves by dotted key; lists are leaves.
void flatten(const json& value, const std::string& prefix, std::map<std::string, json>& out) {
  if (!value.is_object() || value.empty()) {
    out[prefix] = value;
    return;
  }
  for (const auto& [key, inner] : value.items())
    flatten(inner, prefix.empty() ? key : prefix + "." + key, out);
}

std::map<std::string, json> flat(const json& value) {
  std::map<std::string, json> out;
  flatten(value, "", out);
  return out;
}

constexpr size_t kBriefBytes = 60, kWholeBytes = 1000;

std::string text_of(const std::map<std::string, json>& values, const std::string& key, size_t limit) {
  const auto it = values.find(key);
  return it == values.end() ? "absent" : json_brief(it->second, limit);
}

bool same(const std::map<std::string, json>& a, const std::map<std::string, json>& b,
          const std::string& key) {
  const auto x = a.find(key), y = b.find(key);
  return x == a.end() || y == b.end() ? (x == a.end()) == (y == b.end()) : x->second == y->second;
}

// Of values that are not the same: short, unless they are alike in what a short text shows.
std::pair<std::string, std::string> texts_of(const std::map<std::string, json>& a,
                                             const std::map<std::string, json>& b, const std::string& key) {
  for (const size_t limit : {kBriefBytes, kWholeBytes})
    if (auto x = text_of(a, key, limit), y = text_of(b, key, limit); x != y || limit == kWholeBytes)
      return {std::move(x), std::move(y)};
  return {};
}

std::set<std::string> keys_of(const std::vector<std::map<std::string, json>>& all) {
  std::set<std::string> keys;
  for (const auto& one : all)
    for (const auto& [key, value] : one) keys.insert(key);
  return keys;
}

// A name as a part of a directory's name.
std::string slug(const std::string& name) {
  std::string out;
  for (const char c : name) {
    const bool plain = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_';
    if (plain)
      out += c;
    else if (!out.empty() && out.back() != '-')
      out += '-';
    if (out.size() == 40) break;
  }
  while (!out.empty() && out.back() == '-') out.pop_back();
  return out;
}

std::vector<std::string> slugs(const std::vector<std::string>& names) {
  std::vector<std::string> out;
  for (size_t i = 0; i < names.size(); ++i) {
    std::string one = slug(names[i]);
    if (one.empty() && !names[i].empty()) one = std::to_string(i + 1);
    const std::string name = one;
    for (size_t n = i + 1; std::find(out.begin(), out.end(), one) != out.end(); ++n)
      one = fmt::format("{}-{}", name, n);
    out.push_back(one);
  }
  return out;
}

std::string place_of(const Comparison& c, const Setting& variant, const Setting& task) {
  std::string out = fmt::format("{}: variant {}", c.where, quote(variant.name));
  if (!task.name.empty()) out += fmt::format(", task {}", quote(task.name));
  return out;
}

policy::ModelConfig model_of(const json& config, const std::string& where) {
  const json model =
      config.contains("model") && config["model"].is_object() ? config["model"] : json::object();
  const auto text = [&](const char* key) {
    return model.contains(key) && model[key].is_string() ? model[key].get<std::string>() : std::string();
  };
  if (!text("path").empty()) return policy::load_model_config(text("path"));
  if (!text("config").empty()) return policy::load_model_config(text("config"));
  if (!model.contains("config")) throw_input("{}: model.config is missing", where);
  return policy::parse_model_config(model["config"], where + ": model.config");
}

// Everything that a run would refuse later, before the first one starts.
void check_run(const rollout::RunConfig& config, const policy::ModelConfig& model, const std::string& where) {
  try {
    const auto tokenizer = rollout::make_tokenizer(config, model);
    const rollout::RunTasks tasks(config, model, *tokenizer);
    reward::Rubric::parse(config.reward, "reward");
    tasks.check(config, model.max_length);
    config.rollout.sampling.validate(model.vocab_size);
  } catch (const Error& e) {
    if (e.kind() == Error::Kind::kInput) throw_input("{}: {}", where, e.what());
    throw;
  }
}

void check_match(const Comparison& c, const std::vector<ModelFacts>& facts) {
  const auto check = [&](const char* key, const std::optional<double>& tolerance, auto value,
                         const char* what) {
    if (!tolerance) return;
    size_t least = 0, most = 0;
    for (size_t i = 0; i < facts.size(); ++i) {
      if (value(facts[i]) < value(facts[least])) least = i;
      if (value(facts[i]) > value(facts[most])) most = i;
    }
    const double apart = value(facts[most]) / value(facts[least]) - 1;
    if (apart > *tolerance)
      throw_input("{}: match.{}: variant {} has {:.0f} {} and {} {:.0f}, {:.1f} % apart; {:g} % are allowed",
                  c.where, key, quote(c.variants[most].name), value(facts[most]), what,
                  quote(c.variants[least].name), value(facts[least]), 100 * apart, 100 * *tolerance);
  };
  check(
      "parameters", c.match.parameters, [](const ModelFacts& f) { return static_cast<double>(f.parameters); },
      "parameters");
  check(
      "operations", c.match.operations, [](const ModelFacts& f) { return f.operations(); },
      "operations a token");
}

// Of one task: the variants' configurations side by side.
void check_equal(const Comparison& c, size_t task, const std::vector<json>& effective) {
  std::vector<std::map<std::string, json>> all;
  for (const json& e : effective) all.push_back(flat(e));
  for (const std::string& key : keys_of(all)) {
    if (!must_be_equal(key)) continue;
    for (size_t i = 1; i < all.size(); ++i) {
      if (same(all[0], all[i], key)) continue;
      const auto [a, b] = texts_of(all[0], all[i], key);
      throw_input(
          "{}: {} is {} in variant {} and {} in {}{}: variants are compared over the same data, reward and "
          "budget",
          c.where, key, a, quote(c.variants[0].name), b, quote(c.variants[i].name),
          c.tasks[task].setting.name.empty() ? ""
                                             : fmt::format(" (task {})", quote(c.tasks[task].setting.name)));
    }
  }
}

std::vector<Difference> differences_of(const std::vector<json>& effective) {
  std::vector<std::map<std::string, json>> all;
  for (const json& e : effective) all.push_back(flat(e));
  std::vector<Difference> out;
  for (const std::string& key : keys_of(all)) {
    if (key == "run.name" || key == "run.dir") continue;
    const auto other =
        std::find_if(all.begin(), all.end(), [&](const auto& one) { return !same(all[0], one, key); });
    if (other == all.end()) continue;
    Difference d{key, {}};
    const bool brief = text_of(all[0], key, kBriefBytes) != text_of(*other, key, kBriefBytes);
    for (const auto& one : all) d.values.push_back(text_of(one, key, brief ? kBriefBytes : kWholeBytes));
    out.push_back(std::move(d));
  }
  return out;
}

}  // namespace

const PlannedRun& Plan::first_of(size_t variant) const {
  const auto it =
      std::find_if(runs.begin(), runs.end(), [&](const PlannedRun& r) { return r.variant == variant; });
  PERIGEE_CHECK(it != runs.end(), "variant {} has no runs", variant);
  return *it;
}

std::string first_difference(const json& a, const json& b) {
  const std::vector<std::map<std::string, json>> all = {flat(a), flat(b)};
  for (const std::string& key : keys_of(all)) {
    if (key == "run.dir") continue;
    if (same(all[0], all[1], key)) continue;
    const auto [x, y] = texts_of(all[0], all[1], key);
    return fmt::format("{} is {} there and {} here", key, x, y);
  }
  return "";
}

Plan make_plan(Comparison comparison, const PlanOptions& options) {
  Plan plan;
  if (!options.seeds.empty()) comparison.seeds = options.seeds;
  comparison.train = comparison.train && options.train;
  plan.comparison = std::move(comparison);
  const Comparison& c = plan.comparison;
  std::vector<std::string> names;
  for (const Setting& v : c.variants) names.push_back(v.name);
  const std::vector<std::string> variant_slugs = slugs(names);
  names.clear();
  for (const TaskAxis& t : c.tasks) names.push_back(t.setting.name);
  const std::vector<std::string> task_slugs = slugs(names);

  std::vector<json> shown;  // of each variant, with the first task, as written
  for (const Setting& v : c.variants) {
    const std::string where = place_of(c, v, {});
    shown.push_back(configuration(c, v, c.tasks[0].setting, options.set));
    plan.models.push_back(model_of(shown.back(), where));
    plan.facts.push_back(model_facts(plan.models.back(), c.match.context));
    json larger = shown.back();
    apply(larger, c.context.set, c.directory, c.where + ": measure.set");
    plan.context_models.push_back(c.context.set.empty() ? plan.models.back()
                                                        : model_of(larger, where + ", measure.set"));
  }
  check_match(c, plan.facts);
  if (!c.train) {
    plan.differences = differences_of(shown);
    return plan;
  }
  const auto parsed = [&](size_t t, size_t v, int64_t seed, const std::string& name) {
    const std::string where = place_of(c, c.variants[v], c.tasks[t].setting);
    json config = configuration(c, c.variants[v], c.tasks[t].setting, options.set);
    for (const auto& [key, value] : std::initializer_list<std::pair<const char*, json>>{
             {"run.seed", seed}, {"run.dir", ""}, {"run.name", name}, {"workers.threads", options.threads}})
      assign(config, key, value, where);
    rollout::RunConfig run = rollout::parse_run_config(config, where);
    if (run.model.path.empty())
      run.effective["model"]["config"] = policy::to_json(model_of(run.effective, where));
    return run;
  };
  for (size_t t = 0; t < c.tasks.size(); ++t) {
    std::vector<json> effective;  // of each variant
    for (size_t v = 0; v < c.variants.size(); ++v) {
      const std::string where = place_of(c, c.variants[v], c.tasks[t].setting);
      const rollout::RunConfig run = parsed(t, v, c.seeds[0], "compared");
      const policy::ModelConfig model = model_of(run.effective, where);
      if (model != plan.models[v])
        throw_input(
            "{}: changes the model: settings of a task are about its data, those of a variant about the "
            "model",
            where);
      check_run(run, model, where);
      for (const EvaluationPoint& p : c.tasks[t].evaluate) {
        const std::string at = fmt::format("{}, evaluate {}", where, quote(p.name));
        json other = run.effective;
        apply(other, p.set, c.directory, at);
        rollout::RunConfig there = rollout::parse_run_config(other, at);
        there.eval.tasks = p.tasks;
        check_run(there, model, at);
      }
      effective.push_back(run.effective);
    }
    check_equal(c, t, effective);
    // A task may set what variants set differently: then others show it.
    for (Difference& d : differences_of(effective))
      if (std::none_of(plan.differences.begin(), plan.differences.end(),
                       [&](const Difference& known) { return known.key == d.key; }))
        plan.differences.push_back(std::move(d));
  }
  for (const int64_t seed : c.seeds)
    for (size_t t = 0; t < c.tasks.size(); ++t)
      for (size_t v = 0; v < c.variants.size(); ++v) {
        PlannedRun run;
        run.variant = v;
        run.task = t;
        run.seed = seed;
        run.id =
            variant_slugs[v] + (task_slugs[t].empty() ? "" : "." + task_slugs[t]) + fmt::format(".s{}", seed);
        run.effective = parsed(t, v, seed, run.id).effective;
        run.steps =
            run.effective["warmup"]["steps"].get<int64_t>() + run.effective["learn"]["steps"].get<int64_t>();
        plan.runs.push_back(std::move(run));
      }
  return plan;
}

}  // namespace perigee::apps::compare
