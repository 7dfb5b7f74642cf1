// Prompts that answer questions themselves (Task::answered): what worked examples train on, with a tokenizer that would join
// an answer with what stands around it, and that the steps that learnt from them give the same weights when done again.
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "base/error.h"
#include "kernels/context.h"
#include "policy/tokenizer/tokenizer.h"
#include "rollout/replay/rebuild.h"
#include "rollout/run/run.h"
#include "rollout/setup/batch.h"
#include "rollout/setup/run_model.h"
#include "rollout/setup/run_tasks.h"
#include "rollout/weights/host_model.h"
#include "storage/store.h"
#include "tests/base/temp_directory.h"

namespace perigee::rollout {
namespace {
using nlohmann::json;

json run_json(const char* tasks) {
  const json model = json::parse(R"({"architectures": ["KimiLinearForCausalLM"], "model_type": "kimi_linear",
    "vocab_size": 288, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "q_lora_rank": null,
    "kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 4, "v_head_dim": 16, "mla_use_nope": true,
    "num_experts": 4, "num_experts_per_token": 2, "num_shared_experts": 1, "first_k_dense_replace": 2,
    "moe_layer_freq": 1, "num_expert_group": 1, "topk_group": 1, "moe_renormalize": true,
    "moe_router_activation_func": "sigmoid", "routed_scaling_factor": 1.0, "hidden_act": "silu",
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "rope_scaling": null, "tie_word_embeddings": false,
    "model_max_length": 512, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258,
    "initializer_range": 0.1, "num_nextn_predict_layers": 0, "dtype": "float32",
    "linear_attn_config": {"full_attn_layers": [2], "kda_layers": [1], "head_dim": 16, "num_heads": 2,
                           "short_conv_kernel_size": 4}})");
  return {{"run", {{"name", "small"}, {"seed", 3}}},
          {"model", {{"config", model}}},
          {"tasks", json::parse(tasks)},
          {"reward", {{{"verifier", "token_share"}, {"modulus", 2}}}},
          {"warmup", {{"steps", 3}, {"batch", 6}, {"eval_every", 3}, {"lr", 3e-3}}},
          {"rollout", {{"groups_per_step", 2}, {"group_size", 4}, {"max_new_tokens", 4}}},
          {"learn", {{"steps", 3}, {"lr", 1e-3}, {"ptx_batch", 3}, {"ptx_coef", 0.5}}},
          {"eval", {{"every", 3}, {"tasks", 8}, {"temperature", 1}}},
          {"workers", {{"threads", 1}}},
          {"bus", {{"heartbeat_ms", 100}}}};
}

// Takes two bytes at a time wherever it can: an answer and its neighbour become one token unless the text is cut there.
class PairTokenizer : public policy::Tokenizer {
 public:
  static constexpr int32_t kPairs = 256, kSpecial = 256 + 128 * 128;
  PairTokenizer() : Tokenizer(kSpecial + 16, kSpecial, {{"[BOS]", kSpecial}, {"[EOS]", kSpecial + 1}}) {}
  void append_plain(std::string_view text, std::vector<int32_t>& out) const override {
    size_t i = 0;
    for (; i + 1 < text.size(); i += 2) out.push_back(kPairs + text[i] * 128 + text[i + 1]);
    if (i < text.size()) out.push_back(text[i]);
  }
  std::string token(int32_t id) const override {
    if (id >= kSpecial) return special_name(id);
    if (id < kPairs) return std::string(1, static_cast<char>(id));
    return {static_cast<char>((id - kPairs) / 128), static_cast<char>((id - kPairs) % 128)};
  }
};

// The values that follow a key a second time, or are popped, in order: what a prompt answers.
std::string answers_of(const std::string& prompt, bool stack) {
  std::string out;
  if (stack) {
    for (size_t i = prompt.find_first_not_of(' '); i + 2 < prompt.size(); i += 3)
      if (prompt[i] == '-') out += prompt[i + 2];
    return out;
  }
  for (size_t i = prompt.find('|') + 1; i + 1 < prompt.size(); ++i)
    if (prompt[i] != ' ') out += prompt[++i];
  return out;
}

struct Row {
  const char* tasks;
  bool stack;
};
constexpr Row kRows[] = {{R"({"kind": "mqar", "length": 64, "pairs": 6})", false},
                         {R"({"kind": "stack", "length": 65, "stacks": 6, "pushes": 0.5})", true}};

void check_masks(const policy::Tokenizer& tokenizer, policy::ModelConfig model, bool bytes) {
  for (const Row& row : kRows) {
    const RunConfig config = parse_run_config(run_json(row.tasks), "test");
    const RunTasks tasks(config, model, tokenizer);
    for (int64_t i = 0; i < 20; ++i) {
      const policy::TrainSequence s = tasks.worked_example(i);
      ASSERT_EQ(s.mask.size(), s.tokens.size());
      EXPECT_EQ(s.tokens.front(), model.bos_id);
      EXPECT_EQ(s.tokens.back(), model.eos_id);
      const std::string text = tokenizer.decode(std::span(s.tokens).subspan(1, s.tokens.size() - 2));
      std::string trained;
      for (size_t t = 0; t + 1 < s.tokens.size(); ++t)
        if (s.mask[t] != 0) trained += tokenizer.token(s.tokens[t]);
      // All answers of the prompt, then the one it asks for, and nothing beside them.
      ASSERT_EQ(trained, answers_of(text.substr(0, text.size() - 1), row.stack) + text.back()) << text;
      EXPECT_GT(trained.size(), 3u);
      EXPECT_EQ(s.mask.front(), 0);
      EXPECT_EQ(s.mask.back(), 1);
      EXPECT_TRUE(s.curated);
      if (bytes) {
        EXPECT_EQ(s.tokens.size(), 1 + (row.stack ? 65u : 64u) + 1 + 1);
      }
    }
    // A policy reads prompts in the tokens that it learnt them in: the same cuts, whoever asks.
    const PreparedTask asked = tasks.train(0);
    std::vector<int32_t> whole{model.bos_id};
    tokenizer.append_plain(asked.prompt_text, whole);
    EXPECT_EQ(asked.prompt == whole, bytes);
    EXPECT_EQ(tokenizer.decode(std::span(asked.prompt).subspan(1)), asked.prompt_text);
  }
}

TEST(Answered, WorkedExamplesTrainOnEveryAnswer) {
  policy::ModelConfig model;
  model.bos_id = 256;
  model.eos_id = 257;
  check_masks(policy::ByteTokenizer(), model, true);
  model.bos_id = PairTokenizer::kSpecial;
  model.eos_id = PairTokenizer::kSpecial + 1;
  check_masks(PairTokenizer(), model, false);
}

// Not in the middle of a run, when the first task of that level is drawn.
TEST(Answered, ALevelThatTheModelIsTooShortForIsRefusedAtTheStart) {
  const auto refusal = [](const char* tasks) -> std::string {
    const RunConfig config = parse_run_config(run_json(tasks), "test");
    policy::ModelConfig model;
    model.bos_id = 256;
    model.eos_id = 257;
    const policy::ByteTokenizer tokenizer;
    try {
      RunTasks(config, model, tokenizer).check(config, 512);
    } catch (const Error& e) {
      return e.what();
    }
    return "accepted";
  };
  EXPECT_EQ(refusal(R"({"kind": "stack", "lengths": [64, 128], "held_out_lengths": [507]})"), "accepted");
  for (const char* tasks : {R"({"kind": "stack", "lengths": [64, 128], "held_out_lengths": [508]})",
                            R"({"kind": "stack", "lengths": [64, 508]})"})
    EXPECT_NE(refusal(tasks).find("4 after a prompt of 509 tokens exceed the model's 512"), std::string::npos)
        << refusal(tasks);
}

// Warm-up and ptx: every version of the run made again from its first weights.
TEST(Answered, EveryVersionIsMadeAgainToTheBit) {
  for (const Row& row : kRows) {
    const TempDirectory dir;
    TrainOptions options;
    options.in_process = true;
    options.quiet = true;
    options.handle_signals = false;
    const auto outcome = train(
        parse_run_config(run_json(row.tasks), "test", {"run.dir=" + std::string(dir / "run")}), options);
    ASSERT_EQ(outcome.state, "finished") << outcome.failure;
    const RunConfig config = run_config_of(outcome.run_dir);
    kernels::Context ctx(1);
    const HostModel model(config);
    const auto tokenizer = make_tokenizer(config, model.model.layout->config());
    const RunTasks tasks(config, model.model.layout->config(), *tokenizer);
    StoreReader store(outcome.run_dir + "/store.sqlite");
    Rebuilder rebuilder(ctx, config, model, tasks, store, "small", outcome.run_dir);
    std::vector<std::string> hashes;
    const Rebuilt rebuilt =
        rebuilder.run(0, outcome.version, [&](uint32_t, const std::byte* arena) { hashes.push_back(model.hash(arena)); });
    EXPECT_EQ(rebuilt.other_hash, 0);
    ASSERT_EQ(hashes.size(), 7u);  // the first weights, three steps of warm-up, three of reinforcement learning
    EXPECT_EQ(hashes.back(), outcome.weights_hash);
    // What evaluations say of each level, here the one there is.
    const auto evaluations = store.evaluations("small");
    ASSERT_EQ(evaluations.size(), 2u);
    for (const Evaluation& e : evaluations) {
      const json detail = json::parse(e.detail);
      EXPECT_GT(detail.at("mean_reward").get<double>(), 0);
      const json& level = detail.at("levels").at(config.tasks.at("kind").get<std::string>());
      EXPECT_EQ(level.at("n"), 8);
      EXPECT_EQ(level.at("correct"), e.correct);
      EXPECT_EQ(level.at("mean_reward"), detail.at("mean_reward"));
    }
    // Reinforcement learning trains on what was sampled, and on nothing that the prompt answers itself.
    for (const int64_t step : store.train_steps("small"))
      for (const policy::TrainSequence& q : episode_sequences(store, *store.train_batch("small", step))) {
        const size_t prompt = 1 + (row.stack ? 65u : 64u);
        ASSERT_GT(q.tokens.size(), prompt);
        for (size_t t = 0; t < q.tokens.size(); ++t) ASSERT_EQ(q.mask[t], t >= prompt) << t;
      }
    // It would be noticed: with another learning rate they are other weights.
    json other = run_json(row.tasks);
    other["warmup"]["lr"] = 2e-3;
    const RunConfig wrong = parse_run_config(other, "test");
    const RunTasks other_tasks(wrong, model.model.layout->config(), *tokenizer);
    Rebuilder elsewhere(ctx, wrong, model, other_tasks, store, "small", outcome.run_dir + "/nowhere");
    EXPECT_GT(elsewhere.run(0, 3, [](uint32_t, const std::byte*) {}).other_hash, 0);
  }
}

}  // namespace
}  // namespace perigee::rollout
