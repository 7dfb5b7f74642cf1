// What a comparison file comes to, and what is refused before anything runs.
#include "apps/compare/plan.h"

#include <array>

#include "base/error.h"
#include "tests/apps/compare/comparison.h"

namespace perigee::apps::compare {
namespace {

Plan plan_of(const nlohmann::json& comparison, const PlanOptions& options = {}) {
  TempDirectory place;
  return make_plan(load_comparison({written(place, comparison)}), options);
}

std::string refusal(const nlohmann::json& comparison, const PlanOptions& options = {}) {
  try {
    plan_of(comparison, options);
  } catch (const Error& e) {
    EXPECT_EQ(e.kind(), Error::Kind::kInput);
    EXPECT_EQ(std::string(e.what()).find('\n'), std::string::npos);
    return e.what();
  }
  return "";
}

void expect_refusal(const nlohmann::json& comparison, const std::vector<std::string>& needles) {
  const std::string said = refusal(comparison);
  for (const std::string& n : needles)
    EXPECT_NE(said.find(n), std::string::npos) << "wanted " << n << "\nsaid " << said;
}

TEST(ComparePlan, IsVariantsTimesTasksTimesSeeds) {
  const Plan plan = plan_of(small_comparison());
  ASSERT_EQ(plan.runs.size(), 8u);
  std::set<std::string> ids;
  for (const PlannedRun& r : plan.runs) {
    ids.insert(r.id);
    EXPECT_EQ(r.effective["run"]["seed"], r.seed);
    EXPECT_EQ(r.effective["run"]["name"], r.id);
    EXPECT_EQ(r.effective["tasks"]["max_digits"], r.task == 0 ? 1 : 2);
    EXPECT_EQ(r.effective["workers"]["threads"], 1);
    EXPECT_EQ(r.steps, 3);
    const auto model = policy::parse_model_config(r.effective["model"]["config"], "");
    EXPECT_EQ(model.layers[1], r.variant == 0 ? policy::LayerKind::kMla : policy::LayerKind::kKda);
  }
  EXPECT_EQ(ids.size(), 8u);
  EXPECT_TRUE(ids.contains("all-kda.two.s2")) << *ids.begin();
  EXPECT_EQ(plan.runs[0].seed, plan.runs[3].seed) << "one seed of everything comes first";
}

TEST(ComparePlan, SeedsAndKeysFromTheCommandLine) {
  PlanOptions options;
  options.seeds = {7};
  options.set = {"warmup.steps=5", "model.config.hidden_size=64"};
  const Plan plan = plan_of(small_comparison(), options);
  ASSERT_EQ(plan.runs.size(), 4u);
  EXPECT_EQ(plan.runs[0].effective["warmup"]["steps"], 5);
  EXPECT_EQ(plan.runs[0].effective["run"]["seed"], 7);
  EXPECT_EQ(plan.models[0].hidden_size, 64);
}

TEST(ComparePlan, SaysWhereVariantsDiffer) {
  nlohmann::json c = small_comparison();
  c["variants"][1]["set"]["warmup.lr"] = 0.002;
  const Plan plan = plan_of(c);
  std::vector<std::string> keys;
  for (const Difference& d : plan.differences) {
    keys.push_back(d.key);
    ASSERT_EQ(d.values.size(), 2u);
    EXPECT_NE(d.values[0], d.values[1]);
  }
  EXPECT_NE(std::find(keys.begin(), keys.end(), "warmup.lr"), keys.end());
  EXPECT_NE(std::find(keys.begin(), keys.end(), "model.config.token_mixers"), keys.end());
  EXPECT_EQ(std::find(keys.begin(), keys.end(), "learn.lr"), keys.end());
  // In the second task alone.
  c["tasks"][0]["set"]["warmup.lr"] = 0.003;
  const Plan later = plan_of(c);
  EXPECT_TRUE(std::any_of(later.differences.begin(), later.differences.end(),
                          [](const Difference& d) { return d.key == "warmup.lr"; }));
}

TEST(ComparePlan, RefusesBudgetsThatDiffer) {
  const auto with = [](const std::string& key, const nlohmann::json& value) {
    nlohmann::json c = small_comparison();
    c["variants"][1]["set"][key] = value;
    return c;
  };
  expect_refusal(with("warmup.steps", 3),
                 {"warmup.steps is 2 in variant \"hybrid\" and 3 in \"all kda\"", "budget"});
  expect_refusal(with("warmup.batch", 8), {"warmup.batch is 4", "and 8"});
  expect_refusal(with("learn.steps", 9), {"learn.steps"});
  expect_refusal(with("rollout.max_new_tokens", 9), {"rollout.max_new_tokens is 8", "and 9"});
  expect_refusal(with("tasks.min_operands", 2), {"tasks.min_operands is absent", "and 2"});
  expect_refusal(with("reward.0.weight", 2), {"reward is", "variant"});
  expect_refusal(with("eval.tasks", 5), {"eval.tasks"});
  expect_refusal(with("model.dtype", "bfloat16"), {"model.dtype"});
}

// What messages show of a value is cut off: behind that, values differ too.
TEST(ComparePlan, ValuesThatBeginAlikeAreNotTheSame) {
  nlohmann::json c = small_comparison();
  const std::string pattern(80, 'a');
  c["base"]["reward"][1]["pattern"] = pattern + "b";
  EXPECT_EQ(refusal(c), "");
  c["variants"][1]["set"]["reward.1.pattern"] = pattern + "c";
  expect_refusal(c, {"reward is", "aab", "aac", "variant"});
  c = small_comparison();
  std::vector<std::string> mixers(24, "kda");
  c["base"]["model"]["config"]["num_hidden_layers"] = 24;
  c["variants"][0]["set"]["model.config.token_mixers"] = mixers;
  mixers.back() = "mla";
  c["variants"][1]["set"]["model.config.token_mixers"] = mixers;
  const Plan plan = plan_of(c);
  const auto it = std::find_if(plan.differences.begin(), plan.differences.end(),
                               [](const Difference& d) { return d.key == "model.config.token_mixers"; });
  ASSERT_NE(it, plan.differences.end()) << "the report says that all else is the same";
  EXPECT_NE(it->values[0], it->values[1]);
}

TEST(ComparePlan, RefusesKeysThatItSetsItself) {
  for (const auto& [key, value, instead] : {std::array{"run.seed", "5", "--seeds"},
                                            {"run.dir", "elsewhere", "--out"},
                                            {"workers.threads", "2", "--threads"}}) {
    PlanOptions options;
    options.set = {std::string(key) + "=" + value};
    const std::string said = refusal(small_comparison(), options);
    EXPECT_NE(said.find(key), std::string::npos) << said;
    EXPECT_NE(said.find(instead), std::string::npos) << said;
  }
}

TEST(ComparePlan, PathsOfEvaluationsAndMeasurementsCountFromTheFile) {
  TempDirectory place;
  nlohmann::json c = small_comparison();
  spill(place / "model.json", c["base"]["model"]["config"].dump());
  c["base"]["model"]["config"] = "model.json";
  c["measure"] = {{"context", {512}}, {"set", {{"model.config.hidden_size", 64}}}};
  spill(place / "held.jsonl", "{\"prompt\": \"1+1=\", \"answer\": 2}\n");
  spill(place / "train.jsonl", "{\"prompt\": \"1+2=\", \"answer\": 3}\n");
  const nlohmann::json tasks = {{"kind", "jsonl"}, {"path", "train.jsonl"}, {"held_out_path", "held.jsonl"}};
  c["evaluate"] = {{{"name", "file"}, {"set", {{"tasks", tasks}, {"warmup.steps", 0}}}, {"tasks", 1}}};
  const Plan plan = make_plan(load_comparison({written(place, c)}), {});
  EXPECT_EQ(plan.models[0].hidden_size, 32);
  EXPECT_EQ(plan.context_models[0].hidden_size, 64);
}

TEST(ComparePlan, RefusesModelsThatAreTooFarApart) {
  nlohmann::json c = small_comparison();
  c["variants"][1]["set"]["model.config.intermediate_size"] = 256;
  EXPECT_EQ(refusal(c), "");
  c["match"] = {{"parameters", 0.1}};
  expect_refusal(c, {"match.parameters", "\"all kda\"", "\"hybrid\"", "10 % are allowed"});
  c["match"] = {{"operations", 0.1}};
  expect_refusal(c, {"match.operations", "operations a token"});
  c["match"] = {{"parameters", 5}, {"operations", 5}};
  EXPECT_EQ(refusal(c), "");
}

TEST(ComparePlan, RefusesWhatARunWouldRefuse) {
  const auto with = [](const std::string& key, const nlohmann::json& value) {
    nlohmann::json c = small_comparison();
    c["variants"][1]["set"][key] = value;
    return c;
  };
  expect_refusal(with("model.config.token_mixers", {"kdaa"}),
                 {"variant \"all kda\"", "kdaa", "did you mean kda"});
  expect_refusal(with("warmup.stepps", 3), {"warmup.stepps", "did you mean warmup.steps", "all kda"});
  expect_refusal(with("reward.7.weight", 3), {"reward.7.weight", "has none"});
  expect_refusal(with("run.name.x", 3), {"run.name.x"});
  nlohmann::json c = small_comparison();
  c["tasks"][1]["set"] = {{"tasks.kind", "arithmetik"}};
  expect_refusal(c, {"task \"two\"", "arithmetik"});
  c = small_comparison();
  c["tasks"][1]["set"] = {{"model.config.hidden_size", 64}};
  expect_refusal(c, {"task \"two\"", "changes the model"});
  c = small_comparison();
  c["base"]["rollout"]["max_new_tokens"] = 100;
  c["base"]["model"]["config"]["model_max_length"] = 50;
  expect_refusal(c, {"50"});
  c = small_comparison();
  c["tasks"][0]["evaluate"] = {{{"name", "far"}, {"set", {{"tasks.max_digitz", 3}}}}};
  expect_refusal(c, {"evaluate \"far\"", "max_digitz"});
}

TEST(ComparePlan, RefusesAFileThatIsWrong) {
  const auto with = [](const std::string& key, const nlohmann::json& value) {
    nlohmann::json c = small_comparison();
    if (value.is_null())
      c.erase(key);
    else
      c[key] = value;
    return c;
  };
  expect_refusal(with("base", nullptr), {"base", "missing"});
  expect_refusal(with("variants", nlohmann::json::array()), {"variants", "at least one"});
  expect_refusal(with("variant", 1), {"variant", "did you mean variants"});
  expect_refusal(with("seeds", {1, 1}), {"seeds", "twice"});
  expect_refusal(with("seeds", {-1}), {"seeds"});
  expect_refusal(with("reach", 2), {"reach"});
  expect_refusal(with("match", {{"parameter", 1}}), {"match.parameter", "did you mean parameters"});
  expect_refusal(with("measure", {{"context", {"4q"}}}), {"measure.context", "4q"});
  nlohmann::json c = small_comparison();
  c["variants"][1]["name"] = "hybrid";
  expect_refusal(c, {"variants.1.name", "twice"});
  c["variants"][1]["name"] = "";
  expect_refusal(c, {"variants.1.name"});
}

TEST(ComparePlan, NamesBecomeDirectoriesOfTheirOwn) {
  nlohmann::json c = small_comparison();
  c["variants"][0]["name"] = "../../etc <b>";
  c["variants"][1]["name"] = "..--..etc b";
  c["tasks"][0]["name"] = "\xe6\x97\xa5";
  const Plan plan = plan_of(c);
  std::set<std::string> ids;
  for (const PlannedRun& r : plan.runs) {
    ids.insert(r.id);
    EXPECT_EQ(r.id.find('/'), std::string::npos) << r.id;
    EXPECT_EQ(r.id.find(".."), std::string::npos) << r.id;
  }
  EXPECT_EQ(ids.size(), 8u);
}

TEST(ComparePlan, ANameThatIsAnothersWithANumberHasItsOwnDirectory) {
  nlohmann::json c = small_comparison();
  c["variants"][0]["name"] = "a-3";
  c["variants"][1]["name"] = "a";
  c["variants"].push_back({{"name", "a!"}});
  const Plan plan = plan_of(c);
  std::set<std::string> ids;
  for (const PlannedRun& r : plan.runs) ids.insert(r.id);
  EXPECT_EQ(ids.size(), plan.runs.size());
}

TEST(ComparePlan, FindsTheFirstDifferenceOfTwoConfigurations) {
  const Plan plan = plan_of(small_comparison());
  nlohmann::json other = plan.runs[0].effective;
  EXPECT_EQ(first_difference(other, plan.runs[0].effective), "");
  other["run"]["dir"] = "/elsewhere";
  EXPECT_EQ(first_difference(other, plan.runs[0].effective), "");
  other["warmup"]["steps"] = 77;
  EXPECT_EQ(first_difference(other, plan.runs[0].effective), "warmup.steps is 77 there and 2 here");
}

TEST(CompareFacts, CountsByHand) {
  nlohmann::json json = small_model({"mla"});
  const auto mla = policy::parse_model_config(json, "");
  const ModelFacts f = model_facts(mla, 1000);
  // A layer: q 2 heads x 24 x 32, kv_a (16 + 8) x 32, kv_b 2 x (16 + 16) x 16, o 32 x 32, SwiGLU 3 x 32 x 64; head 288 x 32.
  const double layer = 48 * 32 + 24 * 32 + 64 * 16 + 32 * 32 + 3 * 32 * 64;
  EXPECT_EQ(f.matrix_operations, 2 * (2 * layer + 288 * 32));
  EXPECT_EQ(f.mixer_operations, 2 * 2.0 * 2 * (24 + 16) * 1000);
  EXPECT_EQ(f.cache_bytes_per_token, 2 * 24 * 4) << "a row of 16 + 8 floats in each layer";
  EXPECT_EQ(f.mixers, "2 mla");
  const ModelFacts k = model_facts(policy::parse_model_config(small_model({"kda"}), ""), 1000);
  EXPECT_EQ(k.cache_bytes_per_token, 0);
  EXPECT_EQ(k.mixer_operations, 2 * 7.0 * 2 * 16 * 16);
  EXPECT_GE(k.state_bytes, 2 * 2 * 16 * 16 * 4);
  EXPECT_EQ(model_facts(policy::parse_model_config(small_model({"kda", "mla"}), ""), 1).mixers,
            "1 kda, 1 mla");
}

}  // namespace
}  // namespace perigee::apps::compare
