#include "rollout/setup/run_config.h"

#include <filesystem>

#include "base/config.h"
#include "base/error.h"
#include "base/file.h"
#include "base/json.h"
#include "base/random.h"
#include "base/text.h"
#include "rollout/setup/environment.h"
#include "rollout/wire/protocol.h"

namespace perigee::rollout {
namespace {

constexpr double kMany = 1e12;
constexpr uint64_t kAdapterSeed = 0x6C6F7261u;

// What stands in the file and is worked into RunConfig after reading.
struct Raw {
  std::string advantage = "auto";
  nlohmann::json lora;
  double kv_mib = 1024;
  nlohmann::json logit_bias = nlohmann::json::object();
};

void describe_start(Schema& s, RunConfig& c) {
  s.section("run", "The run as a whole.");
  s.field("run.name", &c.run.name, "what to call it in listings");
  s.field("run.dir", &c.run.dir, "where it lives; empty: runs/NAME-TIME");
  s.field("run.seed", &c.run.seed, "of everything random in it; the final weights are a pure function of the configuration",
          Range{0, 9e15});
  s.field("run.device", &c.run.device,
          "where policy workers and the learner compute: `cpu`, or `cuda` for the GPU. float32 gives the same bits on both",
          Names{"cpu", "cuda"});
  s.field("run.numerics", &c.run.numerics,
          "`exact`: a log-probability is a function of the weights and the prefix only (docs/architecture.md); `fast`: prompts on a GPU in fewer operations, near it; `portable`: exact with the CPU's bits for `bfloat16` weights too, activations in float32, on any GPU from compute capability 8.0 on",
          Names{"exact", "fast", "portable"});

  s.section("model", "The policy: either `config` (random weights) or `path` (weights to start from).");
  s.field("model.config", &c.model.config, "a Hugging Face config.json, as a path or as an object");
  s.field("model.path", &c.model.path, "directory with config.json and safetensors");
  s.field("model.dtype", &c.model.dtype, "of the weights while running", Names{"float32", "bfloat16"});

  s.section("tokenizer", "Text to tokens.");
  s.field("tokenizer.path", &c.tokenizer.path, "a tiktoken.model, or its directory; empty: bytes with the special tokens");

  s.field("tasks", &c.tasks, "where tasks come from (docs/tasks.md)");
  s.field("environment", &c.environment,
          "tools and limits of an agent: with it an episode is a conversation of several turns (docs/environments.md); empty: none");
  s.field("reward", &c.reward, "the list of verifiers with weights (docs/rewards.md)");
}

void describe_trainer(Schema& s, const std::string& prefix, policy::TrainerConfig& t) {
  s.field(prefix + ".lr", &t.schedule.lr, "learning rate at the peak", Range{0, 10});
  s.field(prefix + ".schedule", &t.schedule.kind, "of the learning rate", Names{"constant", "cosine"});
  s.field(prefix + ".min_lr", &t.schedule.min_lr, "where cosine ends", Range{0, 10});
  s.field(prefix + ".lr_warmup_steps", &t.schedule.warmup_steps, "linear rise at the beginning", Range{0, kMany});
  s.field(prefix + ".beta1", &t.beta1, "AdamW", Range{0, 0.9999999});
  s.field(prefix + ".beta2", &t.beta2, "AdamW", Range{0, 0.9999999});
  s.field(prefix + ".eps", &t.eps, "AdamW", Range{1e-16, 1});
  s.field(prefix + ".weight_decay", &t.weight_decay, "AdamW, decoupled", Range{0, 10});
  s.field(prefix + ".optimizer_state", &t.moments,
          "AdamW's two moments: `float32`, 8 bytes a parameter, or `8bit`, 2.03 bytes (docs/losses.md)", Names{"float32", "8bit"});
  s.field(prefix + ".grad_clip", &t.grad_clip, "largest global norm of the gradient; 0: off", Range{0, kMany});
  s.field(prefix + ".micro_batch_tokens", &t.micro_batch_tokens, "sequences are packed up to this many tokens", Range{1, kMany});
  s.field(prefix + ".recompute", &t.recompute, "recompute activations in the backward pass instead of keeping them");
  s.field(prefix + ".router_bias_rate", &t.router_bias_rate, "aux-loss-free balancing of experts; 0: off", Range{0, 1});
}

void describe_generation(Schema& s, RunConfig& c, Raw& raw) {
  s.section("rollout", "Sampling of training episodes.");
  s.field("rollout.mode", &c.rollout.mode,
          "`sync`: each batch is sampled by exactly the weights it trains; `async`: generation never waits for the learner",
          Names{"sync", "async"});
  s.field("rollout.groups_per_step", &c.rollout.groups_per_step, "prompts in a batch", Range{1, 1e6});
  s.field("rollout.group_size", &c.rollout.group_size, "episodes of a prompt", Range{2, 4096});
  s.field("rollout.max_new_tokens", &c.rollout.max_new_tokens, "generated tokens of an episode at most", Range{1, 1e8});
  s.field("rollout.segment_tokens", &c.rollout.segment_tokens, "tokens that are sent and committed together", Range{1, 1e6});
  s.field("rollout.max_policy_lag", &c.rollout.max_policy_lag,
          "async: versions between a token and the weights it trains, at most; older groups are dropped", Range{0, 1000});
  s.field("rollout.dynamic_sampling", &c.rollout.dynamic_sampling, "replace groups whose rewards are all equal");
  s.field("rollout.max_rounds", &c.rollout.max_rounds, "of replacing, the first sampling included", Range{1, 1000});
  auto& p = c.rollout.sampling;
  s.field("rollout.temperature", &p.temperature, "of sampling", Range{1e-3, 100});
  s.field("rollout.top_k", &p.top_k, "0: off", Range{0, 1e9});
  s.field("rollout.top_p", &p.top_p, "1: off", Range{1e-6, 1});
  s.field("rollout.min_p", &p.min_p, "0: off", Range{0, 1});
  s.field("rollout.repetition_penalty", &p.repetition_penalty,
          "divides positive and multiplies negative logits of tokens seen; 1: off", Range{1e-3, 1e3});
  s.field("rollout.presence_penalty", &p.presence_penalty, "taken from the logit of a token generated so far; 0: off",
          Range{-1e3, 1e3});
  s.field("rollout.frequency_penalty", &p.frequency_penalty, "the same for each time it was generated; 0: off",
          Range{-1e3, 1e3});
  s.field("rollout.logit_bias", &raw.logit_bias,
          "what is added to the logits of tokens, by id: `{\"257\": -5, \"12\": \"-inf\"}`; `-inf`: never this token",
          [](const nlohmann::json& v) {
            return logit_bias_from_json(v) ? std::string() : "expected an object from token ids to numbers or \"-inf\"";
          });
  s.field("rollout.lease_seconds", &c.rollout.lease_seconds, "a worker silent for so long loses its work to another",
          Range{0.1, 86400});

  s.section("engine", "A policy worker's engine.");
  s.field("engine.max_running", &c.engine.max_running, "sequences in a batch at most", Range{1, 1e6});
  s.field("engine.prefill_chunk", &c.engine.prefill_chunk, "prompt tokens taken into one step at most", Range{1, 1e9});
  s.field("engine.memory_mib", &raw.kv_mib, "for states, windows and latents; what does not fit waits", Range{1, 1e9});
}

void describe_learning(Schema& s, RunConfig& c, Raw& raw) {
  s.section("warmup", "Supervised learning on worked examples before reinforcement learning.");
  s.field("warmup.steps", &c.warmup.steps, "at most; 0: none", Range{0, 1e9});
  s.field("warmup.batch", &c.warmup.batch, "worked examples in a step", Range{1, 1e6});
  s.field("warmup.eval_every", &c.warmup.eval_every, "steps between evaluations", Range{1, 1e9});
  s.field("warmup.stop_accuracy", &c.warmup.stop_accuracy, "held-out accuracy at which the warm-up ends early", Range{0, 1});
  describe_trainer(s, "warmup", c.warmup.trainer);

  s.section("learn", "Reinforcement learning.");
  s.field("learn.steps", &c.learn.steps, "optimiser steps, one a batch; 0: none", Range{0, 1e9});
  auto& l = c.learn.trainer.loss;
  s.field("learn.lora", &raw.lora,
          "train low-rank adapters beside the frozen model, in the warm-up too: `{\"rank\": 16, \"alpha\": 32, \"targets\": [\"q_proj\", ...]}` "
          "(docs/lora.md); null: train the model itself");
  s.field("learn.loss", &l.kind, "docs/losses.md", Names{"grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "k15"});
  s.field("learn.advantage", &raw.advantage, "`auto`: the one that the loss was published with",
          Names{"auto", "grpo", "mean", "rloo"});
  s.field("learn.clip_low", &l.clip_low, "default: as published for the loss", Range{0, 1e6});
  s.field("learn.clip_high", &l.clip_high, "default: as published for the loss", Range{0, 1e6});
  s.field("learn.max_length", &l.max_length, "dr_grpo: the constant divisor; 0: rollout.max_new_tokens", Range{0, 1e9});
  s.field("learn.tau", &l.tau, "k15", Range{0, 1e6});
  s.field("learn.correction", &l.correction, "for a sampler that is not the learner",
          Names{"none", "tis", "icepop", "seq_tis", "seq_mis"});
  s.field("learn.cap", &l.cap, "tis, seq_tis, seq_mis", Range{0, 1e6});
  s.field("learn.icepop_low", &l.icepop_low, "icepop", Range{0, 1e6});
  s.field("learn.icepop_high", &l.icepop_high, "icepop", Range{0, 1e6});
  s.field("learn.veto", &l.veto, "drop a sequence with any ratio below this; 0: never", Range{0, 1});
  s.field("learn.kl", &l.kl, "estimator", Names{"k1", "k2", "k3"});
  s.field("learn.kl_coef", &l.kl_coef, "of the KL to the weights that reinforcement learning started from; 0: none",
          Range{0, 1e6});
  s.field("learn.entropy_coef", &l.entropy_coef, "bonus for entropy", Range{0, 1e6});
  s.field("learn.minibatches", &c.learn.trainer.minibatches, "optimiser updates a batch is cut into", Range{1, 1e6});
  s.field("learn.ptx_coef", &c.learn.trainer.ptx_coef, "weight of worked examples beside the episodes", Range{0, 1e6});
  s.field("learn.ptx_batch", &c.learn.ptx_batch, "worked examples in a step", Range{0, 1e6});
  describe_trainer(s, "learn", c.learn.trainer);
}

void describe_rest(Schema& s, RunConfig& c) {
  s.section("eval", "Held-out tasks.");
  s.field("eval.every", &c.eval.every, "steps between evaluations", Range{1, 1e9});
  s.field("eval.tasks", &c.eval.tasks, "how many", Range{1, 1e6});
  s.field("eval.temperature", &c.eval.temperature, "0: greedy", Range{0, 100});

  s.section("checkpoint", "Weights and optimiser state on disk; between two of them a crashed learner runs its steps again.");
  s.field("checkpoint.every", &c.checkpoint.every, "steps", Range{1, 1e9});
  s.field("checkpoint.keep", &c.checkpoint.keep, "the latest ones; the start of reinforcement learning stays too", Range{1, 1e6});

  s.section("storage", "What the store keeps of episodes (docs/store.md). Rewards, counts and tasks stay always.");
  s.field("storage.keep", &c.storage.keep,
          "tokens and tool calls of `all` episodes; of those `trained` on; or of `recent` steps only, so that older versions and episodes can no longer be made again",
          Names{"all", "trained", "recent"});
  s.field("storage.keep_steps", &c.storage.keep_steps,
          "recent: the latest steps whose tokens stay; those behind the oldest kept checkpoint stay in any case", Range{0, 1e12});

  s.section("workers", "Processes, or with --in-process threads.");
  s.field("workers.policy", &c.workers.policy, "that generate", Range{1, 256});
  s.field("workers.reward", &c.workers.reward, "that score", Range{1, 256});
  s.field("workers.threads", &c.workers.threads, "of each policy worker and of the learner; 0: one per processor", Range{0, 4096});

  s.section("bus", "Messages between them (docs/formats/bus.md).");
  s.field("bus.max_message_mib", &c.bus.max_message_mib, "a larger part of a message closes its connection", Range{1, 1 << 20});
  s.field("bus.window", &c.bus.window, "messages a worker takes before it gives new credits", Range{2, 1 << 16});
  s.field("bus.heartbeat_ms", &c.bus.heartbeat_ms, "between a worker's signs of life", Range{10, 60000});
}

void describe(Schema& s, RunConfig& c, Raw& raw) {
  describe_start(s, c);
  describe_generation(s, c, raw);
  describe_learning(s, c, raw);
  describe_rest(s, c);
}

RunConfig defaults() {
  RunConfig c;
  c.warmup.trainer.schedule.lr = 1e-3;
  c.learn.trainer.schedule.lr = 1e-4;
  return c;
}

void check(const Schema& schema, RunConfig& c, Raw& raw, const std::string& where) {
  const auto fail = [&](const std::string& what) { throw_input("{}: {}", where, what); };
  const bool has_config = !c.model.config.is_null() && !(c.model.config.is_string() && c.model.config.get<std::string>().empty());
  if (has_config && !c.model.path.empty()) fail("model.config and model.path are both given: random weights or those at the path?");
  if (!has_config && c.model.path.empty()) fail("no model: give model.config (a config.json) or model.path (a model with weights)");
  if (has_config && !c.model.config.is_string() && !c.model.config.is_object())
    fail("model.config is neither a path nor an object");
  if (!c.tasks.is_object() || c.tasks.empty()) fail("no tasks: give the section tasks (docs/tasks.md)");
  if (!c.reward.is_array() || c.reward.empty()) fail("no reward: give the list reward (docs/rewards.md)");

  try {
    environment_config(c);
  } catch (const Error& e) {
    fail(e.what());
  }

  auto& loss = c.learn.trainer.loss;
  const kernels::LossConfig usual = kernels::loss_defaults(loss.kind);
  if (!schema.given("learn.clip_low")) loss.clip_low = usual.clip_low;
  if (!schema.given("learn.clip_high")) loss.clip_high = usual.clip_high;
  if (!schema.given("learn.tau")) loss.tau = usual.tau;
  if (loss.kind == kernels::LossKind::kDrGrpo && loss.max_length == 0)
    loss.max_length = static_cast<double>(c.rollout.max_new_tokens);
  try {
    kernels::check_config(loss);
  } catch (const Error& e) {
    fail(e.what());
  }
  if (raw.advantage == "auto")
    c.learn.advantage = kernels::usual_advantage(loss.kind);
  else
    kernels::parse(raw.advantage, c.learn.advantage);
  if ((c.learn.trainer.ptx_coef > 0) != (c.learn.ptx_batch > 0))
    fail("learn.ptx_coef and learn.ptx_batch go together: one of them is 0");
  if (c.learn.steps == 0 && c.warmup.steps == 0) fail("learn.steps and warmup.steps are 0: there is nothing to train");
  const auto& r = c.rollout;
  if (loss.correction == kernels::Correction::kNone && r.mode == RunMode::kAsync && r.max_policy_lag > 4)
    fail("rollout.max_policy_lag above 4 without learn.correction does not learn: set learn.correction (tis, icepop, ...)");
  for (auto* t : {&c.warmup.trainer, &c.learn.trainer}) {
    const bool warm = t == &c.warmup.trainer;
    if (t->schedule.min_lr > t->schedule.lr) fail(warm ? "warmup.min_lr is above warmup.lr" : "learn.min_lr is above learn.lr");
    t->schedule.total_steps = warm ? c.warmup.steps : c.learn.steps * c.learn.trainer.minibatches;
  }
  if (!raw.lora.is_null()) {
    auto lora = policy::parse_lora_config(raw.lora, where, "learn.lora");
    if (!raw.lora.contains("seed")) lora.seed = derive_seed(c.seed(), kAdapterSeed) >> 12;  // exact as a JSON number anywhere
    raw.lora = policy::to_json(lora);
    for (const auto* t : {&c.warmup.trainer, &c.learn.trainer})
      if (t->router_bias_rate != 0) fail("learn.lora keeps the model frozen, and router_bias_rate changes it: set it to 0");
    c.learn.lora = std::move(lora);
  }
  c.rollout.sampling.logit_bias = logit_bias_from_json(raw.logit_bias).value();  // its form was checked when it was set
  c.engine.memory_bytes = static_cast<int64_t>(raw.kv_mib * 1048576.0);
  c.engine.numerics = c.run.numerics == "fast" ? policy::Numerics::kFast : policy::Numerics::kExact;
  if (c.run.numerics == "fast" && c.run.device == "cpu")
    fail("run.numerics is fast: run.device cpu is exact, and nothing else");
  c.effective = schema.dump();
  // A learner has a trainer for version 0 even where no warm-up is to be: it must not take memory of its own.
  if (c.warmup.steps == 0) {
    c.warmup.trainer.micro_batch_tokens = c.learn.trainer.micro_batch_tokens;
    c.warmup.trainer.recompute = c.learn.trainer.recompute;
    c.warmup.trainer.moments = c.learn.trainer.moments;
  }
}

void make_absolute(std::string& path, const std::filesystem::path& base) {
  namespace fs = std::filesystem;
  if (path.empty() || fs::path(path).is_absolute()) return;
  std::error_code ec;
  if (fs::exists(path, ec))
    path = fs::absolute(path, ec).lexically_normal().string();
  else
    path = fs::absolute(base / path, ec).lexically_normal().string();
}

void make_absolute(nlohmann::json& path, const std::filesystem::path& base) {
  if (!path.is_string()) return;
  std::string text = path.get<std::string>();
  make_absolute(text, base);
  path = text;
}

// The object in the file at the path: one of its keys is to be changed.
void open_model_config(nlohmann::json& config, const std::filesystem::path& base) {
  make_absolute(config, base);
  std::filesystem::path path = config.get<std::string>();
  if (path.empty()) return;
  if (std::filesystem::is_directory(path)) path /= "config.json";
  config = parse_json(read_file(path.string()), path.string());
}

// --set model.config=FILE: a path needs no quotes.
std::string with_quotes(const std::string& assignment) {
  constexpr std::string_view kKey = "model.config=";
  const std::string value = assignment.starts_with(kKey) ? assignment.substr(kKey.size()) : std::string();
  if (value.empty() || value[0] == '{' || nlohmann::json::accept(value) || !is_utf8(value)) return assignment;
  return std::string(kKey) + nlohmann::json(value).dump();
}

RunConfig parse(const nlohmann::json* value, const std::string& file, const std::string& where,
                const std::vector<std::string>& overrides) {
  RunConfig c = defaults();
  Raw raw;
  Schema schema;
  describe(schema, c, raw);
  if (value != nullptr)
    schema.load(*value, where);
  else
    schema.load_file(file);
  const std::filesystem::path base = file.empty() ? "." : std::filesystem::path(file).parent_path();
  for (const auto& o : overrides) {
    if (o.starts_with("model.config.") && c.model.config.is_string()) open_model_config(c.model.config, base);
    schema.set(with_quotes(o));
  }
  // Another file is not the one whose hash the configuration holds.
  for (const auto& [key, hash] : {std::pair("tasks.path=", "hash"), std::pair("tasks.held_out_path=", "held_out_hash")}) {
    const auto sets = [&](const std::string& what) {
      return std::any_of(overrides.begin(), overrides.end(), [&](const std::string& o) { return o.starts_with(what); });
    };
    if (c.tasks.is_object() && sets(key) && !sets(fmt::format("tasks.{}=", hash))) c.tasks.erase(hash);
  }
  make_absolute(c.model.path, base);
  make_absolute(c.tokenizer.path, base);
  make_absolute(c.model.config, base);
  if (c.tasks.is_object())
    for (const char* key : {"path", "held_out_path"})
      if (const auto it = c.tasks.find(key); it != c.tasks.end()) make_absolute(*it, base);
  check(schema, c, raw, where);
  return c;
}

}  // namespace

RunConfig parse_run_config(const nlohmann::json& value, const std::string& where, const std::vector<std::string>& overrides) {
  return parse(&value, {}, where, overrides);
}

RunConfig load_run_config(const std::string& path, const std::vector<std::string>& overrides) {
  return parse(nullptr, path, path, overrides);
}

std::string run_config_markdown() {
  RunConfig c = defaults();
  Raw raw;
  Schema schema;
  describe(schema, c, raw);
  return schema.markdown();
}

}  // namespace perigee::rollout
