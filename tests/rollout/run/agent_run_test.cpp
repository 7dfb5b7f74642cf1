// Whole runs in an environment, tiny: turns that call tools, answers that are masked, limits as outcomes; twice, as
// processes, with roles killed. The policy is random: a bias on the tokens of structure makes it ask for tools (badly), so
// that every episode has turns, and the tools answer what is wrong.
#include <gtest/gtest.h>
#include <signal.h>

#include <mutex>
#include <thread>

#include "agents/loop/loop.h"
#include "base/random.h"
#include "rollout/run/run.h"
#include "rollout/setup/run_model.h"
#include "rollout/setup/run_tasks.h"
#include "storage/store.h"
#include "tests/rollout/temp_dir.h"

namespace perigee::rollout {
namespace {

nlohmann::json agent_config() {
  return nlohmann::json::parse(R"({
    "run": {"name": "agents", "seed": 3},
    "model": {"config": {"architectures": ["KimiLinearForCausalLM"], "model_type": "kimi_linear", "vocab_size": 288,
      "hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16, "num_hidden_layers": 4,
      "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "q_lora_rank": null,
      "kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 4, "v_head_dim": 16, "mla_use_nope": true,
      "num_experts": 4, "num_experts_per_token": 2, "num_shared_experts": 1, "first_k_dense_replace": 1,
      "moe_layer_freq": 1, "num_expert_group": 1, "topk_group": 1, "moe_renormalize": true,
      "moe_router_activation_func": "sigmoid", "routed_scaling_factor": 1.0, "hidden_act": "silu",
      "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "rope_scaling": null, "tie_word_embeddings": false,
      "model_max_length": 1024, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258,
      "initializer_range": 0.1, "num_nextn_predict_layers": 0, "dtype": "float32",
      "linear_attn_config": {"full_attn_layers": [4], "kda_layers": [1, 2, 3], "head_dim": 16, "num_heads": 2,
                             "short_conv_kernel_size": 4}}},
    "environment": {"tools": ["calculator"], "max_turns": 3, "declare": false, "tool_output_bytes": 64,
                    "rewards": {"turns": -0.25}},
    "tasks": {"kind": "calculate", "min_digits": 1, "max_digits": 1, "operators": "+"},
    "reward": [{"verifier": "numeric"}, {"verifier": "repetition", "unit": "byte", "n": 2, "weight": 0.5}],
    "warmup": {"steps": 4, "batch": 8, "eval_every": 4, "lr": 1e-4},
    "rollout": {"groups_per_step": 2, "group_size": 4, "max_new_tokens": 300, "segment_tokens": 7, "lease_seconds": 10,
                "logit_bias": {"261": 4, "268": 4}},
    "learn": {"steps": 4, "lr": 1e-3},
    "eval": {"every": 2, "tasks": 4},
    "checkpoint": {"every": 3},
    "workers": {"threads": 1},
    "bus": {"heartbeat_ms": 100}})");
}

TrainOptions quiet(bool in_process) {
  TrainOptions options;
  options.in_process = in_process;
  options.program = PERIGEE_PROGRAM;
  options.quiet = true;
  options.handle_signals = false;
  return options;
}

RunOutcome run(const nlohmann::json& config, const TempDir& dir, const TrainOptions& options) {
  return train(parse_run_config(config, "test", {"run.dir=" + (dir.path / "run").string()}), options);
}

const std::string& expected_hash() {
  static const std::string hash = [] {
    TempDir dir;
    const auto outcome = run(agent_config(), dir, quiet(true));
    EXPECT_EQ(outcome.state, "finished") << outcome.failure;
    return outcome.weights_hash;
  }();
  return hash;
}

std::vector<EpisodeRecord> episodes_of(const std::string& run_dir) {
  StoreReader reader(run_dir + "/store.sqlite");
  EXPECT_TRUE(reader.check().empty());
  EpisodeFilter all;
  all.limit = -1;
  std::vector<EpisodeRecord> out;
  for (const auto& row : reader.episodes(all)) out.push_back(reader.episode(row.episode_id));
  return out;
}

// What the policy saw, made again from what is stored: every turn, every answer, token by token.
void expect_exact_turns(const EpisodeRecord& e, const policy::Tokenizer& tokenizer) {
  std::vector<int32_t> tokens;
  std::vector<uint8_t> mask;
  std::vector<ToolEvent> events;
  for (const Segment& s : e.segments) {
    tokens.insert(tokens.end(), s.tokens.begin(), s.tokens.end());
    mask.insert(mask.end(), s.mask.begin(), s.mask.end());
    if (s.mask.empty()) mask.resize(tokens.size(), 1);
    events.insert(events.end(), s.tools.begin(), s.tools.end());
  }
  ASSERT_EQ(tokens.size(), mask.size());
  std::vector<int32_t> again;
  size_t next = 0;
  for (size_t begin = 0; begin < tokens.size();) {
    size_t end = begin;
    while (end < tokens.size() && mask[end] != 0) ++end;
    const std::vector<int32_t> turn(tokens.begin() + static_cast<int64_t>(begin), tokens.begin() + static_cast<int64_t>(end));
    again.insert(again.end(), turn.begin(), turn.end());
    if (end == tokens.size()) break;
    const auto decided = agents::end_turn(tokenizer, turn, FinishReason::kStop, 0, {.max_turns = 100});
    ASSERT_EQ(decided.finish, FinishReason::kNone);
    const size_t n = decided.message.calls.size();
    ASSERT_LE(next + n, events.size());
    const auto answer = agents::answer_tokens(tokenizer, decided.message, std::span(events).subspan(next, n));
    again.insert(again.end(), answer.begin(), answer.end());
    next += n;
    begin = end;
    while (begin < tokens.size() && mask[begin] == 0) ++begin;
  }
  EXPECT_EQ(again, tokens) << "episode " << e.spec.episode_id;
  for (size_t i = 0; i < tokens.size(); ++i)
    if (mask[i] == 0) ASSERT_LT(i + 1, tokens.size()) << "tokens were fed and nothing was sampled after them";
}

TEST(AgentRun, TurnsAreStoredExactlyMaskedAndScored) {
  TempDir dir;
  const auto outcome = run(agent_config(), dir, quiet(true));
  ASSERT_EQ(outcome.state, "finished") << outcome.failure;
  EXPECT_EQ(outcome.weights_hash, expected_hash());
  const auto config = run_config_of(outcome.run_dir);
  const auto layout = make_layout(config);
  const auto tokenizer = make_tokenizer(config, layout->config());
  int64_t with_tools = 0, turns = 0, fed = 0;
  for (const EpisodeRecord& e : episodes_of(outcome.run_dir)) {
    expect_exact_turns(e, *tokenizer);
    ASSERT_TRUE(e.reward) << e.spec.episode_id;
    bool tools = false;
    for (const Segment& s : e.segments) {
      tools |= !s.tools.empty();
      for (size_t i = 0; i < s.mask.size(); ++i)
        if (s.mask[i] == 0) {
          ++fed;
          EXPECT_EQ(s.logprobs[i], 0.0f);
        }
    }
    with_tools += tools;
    if (e.finish == FinishReason::kTurns) {
      ++turns;
      EXPECT_FALSE(e.reward->failed);
      EXPECT_EQ(e.reward->total, -0.25);
      ASSERT_EQ(e.reward->components.size(), 1u);
      EXPECT_EQ(e.reward->components[0].name, "outcome");
    } else {
      EXPECT_EQ(e.reward->components.size(), 2u);
    }
  }
  EXPECT_GT(with_tools, 5);
  EXPECT_GT(turns, 0);
  EXPECT_GT(fed, 100);
  StoreReader reader(outcome.run_dir + "/store.sqlite");
  for (const auto& step : reader.metrics("agents", "rl"))
    for (const auto& [name, value] : step.values)
      if (name == "mismatch_share" || name == "mismatch_max") EXPECT_EQ(value, 0.0) << name << " of step " << step.step;
}

TEST(AgentRun, ProcessesAndMoreWorkersGiveTheSameWeights) {
  TempDir dir;
  auto config = agent_config();
  config["workers"] = {{"threads", 2}, {"policy", 2}, {"reward", 2}};
  config["environment"]["tool_threads"] = 5;
  const auto outcome = run(config, dir, quiet(false));
  EXPECT_EQ(outcome.state, "finished") << outcome.failure;
  EXPECT_EQ(outcome.weights_hash, expected_hash());
}

TEST(AgentRun, RolesKilledAtRandomMomentsEndWithTheSameWeights) {
  TempDir dir;
  auto config = agent_config();
  std::mutex mutex;
  std::map<std::string, int> pids;
  Random random(static_cast<uint64_t>(std::chrono::steady_clock::now().time_since_epoch().count()));
  auto options = quiet(false);
  options.max_restarts = 100;
  options.on_start = [&](const std::string& name, int pid) {
    const std::lock_guard lock(mutex);
    pids[name] = pid;
  };
  int kills = 0;
  std::jthread killer([&](std::stop_token stop) {
    while (kills < 12 && !stop.stop_requested()) {
      std::this_thread::sleep_for(std::chrono::milliseconds(random.next_int(10, 120)));
      const std::lock_guard lock(mutex);
      const auto victim = pids.find("policy-0");
      if (victim == pids.end()) continue;
      ::kill(victim->second, SIGKILL);
      pids.erase(victim);
      ++kills;
    }
  });
  const auto outcome = run(config, dir, options);
  killer.request_stop();
  killer.join();
  EXPECT_EQ(outcome.state, "finished") << outcome.failure;
  EXPECT_GT(outcome.restarts, 0);
  EXPECT_EQ(outcome.weights_hash, expected_hash()) << "after " << kills << " kills";
  const auto read = run_config_of(outcome.run_dir);
  const auto layout = make_layout(read);
  const auto tokenizer = make_tokenizer(read, layout->config());
  for (const EpisodeRecord& e : episodes_of(outcome.run_dir)) expect_exact_turns(e, *tokenizer);
}

// A limit of time that is over at once: an outcome like any other, and the run goes on.
TEST(AgentRun, TimeIsAnOutcome) {
  TempDir dir;
  auto config = agent_config();
  config["environment"]["wall_s"] = 1e-6;
  config["environment"]["rewards"]["time"] = 0.5;
  config["learn"]["steps"] = 1;
  const auto outcome = run(config, dir, quiet(true));
  ASSERT_EQ(outcome.state, "finished") << outcome.failure;
  for (const EpisodeRecord& e : episodes_of(outcome.run_dir)) {
    EXPECT_EQ(e.finish, FinishReason::kTime);
    EXPECT_EQ(e.reward->total, 0.5);
  }
}

TEST(AgentRun, WorkedExamplesTrainOnTheTurnsAndNotOnTheAnswers) {
  const auto config = parse_run_config(agent_config(), "test");
  const auto layout = make_layout(config);
  const auto tokenizer = make_tokenizer(config, layout->config());
  const RunTasks tasks(config, layout->config(), *tokenizer);
  const auto s = tasks.worked_example(0);
  std::vector<int32_t> trained, fed;
  for (size_t i = tasks.train(0).prompt.size(); i < s.tokens.size(); ++i) (s.mask[i] ? trained : fed).push_back(s.tokens[i]);
  const std::string said = tokenizer->decode(trained), heard = tokenizer->decode(fed);
  EXPECT_EQ(said.find("<|tool_calls_section_begin|><|tool_call_begin|>functions.calculator:0<|tool_call_argument_begin|>"
                      "{\"expression\":\""), 0u) << said;
  EXPECT_TRUE(said.ends_with("<|im_end|>"));
  EXPECT_EQ(heard.find("<|im_system|>tool<|im_middle|>## Return of functions.calculator:0\n"), 0u) << heard;
  EXPECT_TRUE(heard.ends_with("<|im_end|><|im_assistant|>assistant<|im_middle|>")) << heard;
}

TEST(AgentRun, AnEnvironmentIsCheckedByName) {
  const auto line = [](const nlohmann::json& environment) {
    auto config = agent_config();
    config["environment"] = environment;
    try {
      parse_run_config(config, "test");
    } catch (const Error& e) {
      return std::string(e.what());
    }
    return std::string();
  };
  EXPECT_NE(line({{"max_turn", 3}}).find("did you mean"), std::string::npos) << line({{"max_turn", 3}});
  EXPECT_NE(line({{"max_turns", 0}}).find("max_turns"), std::string::npos);
  EXPECT_NE(line({{"tools", "calculator"}}).find("tools"), std::string::npos);
  EXPECT_NE(line({{"rewards", {{"stop", 1}}}}).find("stop"), std::string::npos);
  EXPECT_EQ(line({{"rewards", {{"length", -1}}}}), "");
}

}  // namespace
}  // namespace perigee::rollout
