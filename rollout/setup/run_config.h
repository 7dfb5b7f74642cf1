// The configuration of a run: every key, its meaning and its default. docs/configuration.md is generated from the
// declaration in run_config.cpp.
#pragma once
#include <nlohmann/json.hpp>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "policy/engine/engine.h"
#include "policy/learn/trainer.h"
#include "policy/model/adapter.h"

namespace perigee::rollout {

enum class RunMode { kSync, kAsync };

// Of which episodes the store keeps the tokens. kTrained: not of dropped ones. kRecent: not of steps that are long over.
enum class TokensKept : uint8_t { kAll, kTrained, kRecent };

struct RunConfig {
  struct Run {
    std::string name = "run";
    std::string dir;  // where the run lives; empty: runs/NAME-TIME
    int64_t seed = 0;
    std::string device = "cpu";      // cpu | cuda
    std::string numerics = "exact";  // exact | fast (cuda only) | portable
  } run;

  struct Model {
    nlohmann::json config;  // an object, or a path as a string; null when path is given
    std::string path;       // a model with weights to start from
    std::string dtype = "float32";
  } model;

  struct Tokenizer {
    std::string path;  // a tiktoken.model; empty: bytes
  } tokenizer;

  nlohmann::json tasks = nlohmann::json::object();   // rollout/tasks/tasks.h
  nlohmann::json environment = nlohmann::json::object();  // rollout/setup/environment.h; empty: none
  nlohmann::json reward = nlohmann::json::array();   // reward/rubric.h

  struct Warmup {
    int64_t steps = 0;  // at most; 0: none
    int64_t batch = 32;
    int64_t eval_every = 25;
    double stop_accuracy = 1.0;
    policy::TrainerConfig trainer;
  } warmup;

  struct Rollout {
    RunMode mode = RunMode::kSync;
    int64_t groups_per_step = 16;
    int64_t group_size = 8;
    int64_t max_new_tokens = 64;
    int64_t segment_tokens = 256;
    int64_t max_policy_lag = 1;
    bool dynamic_sampling = false;
    int64_t max_rounds = 4;
    kernels::SamplingParams sampling;
    double lease_seconds = 30;
  } rollout;

  policy::EngineConfig engine;

  struct Learn {
    int64_t steps = 100;
    kernels::AdvantageKind advantage = kernels::AdvantageKind::kGrpo;  // the loss's own where the key is "auto"
    int64_t ptx_batch = 0;  // worked examples added to each step
    std::optional<policy::LoraConfig> lora;  // adapters are trained beside a frozen model; nullopt: the model itself
    policy::TrainerConfig trainer;
  } learn;

  struct Eval {
    int64_t every = 25;
    int64_t tasks = 200;
    double temperature = 0;  // 0: greedy
  } eval;

  struct Checkpoint {
    int64_t every = 25;
    int64_t keep = 2;  // the latest ones; the one at the start of reinforcement learning stays too
  } checkpoint;

  struct Storage {
    TokensKept keep = TokensKept::kAll;
    int64_t keep_steps = 100;  // kRecent: the latest steps, at least
  } storage;

  struct Workers {
    int64_t policy = 1;
    int64_t reward = 1;
    int64_t threads = 0;  // of a policy worker and of the learner; 0: one per processor
  } workers;

  struct Bus {
    int64_t max_message_mib = 256;
    int64_t window = 64;
    int64_t heartbeat_ms = 500;
  } bus;

  // The whole configuration with defaults filled in, as it is stored: parse(to_json(c)) == c.
  nlohmann::json effective;

  uint64_t seed() const { return static_cast<uint64_t>(run.seed); }
};

// ERRORS (input): one line, naming the file and the key: unknown, mistyped (with the nearest), of another type, out of
// range, or impossible together with another.
// overrides: "key=value" as --set takes them, later ones win. A relative path (model.config, model.path,
// tokenizer.path, tasks.path, tasks.held_out_path) that is not there as it is counts from the file's directory; the
// effective configuration holds absolute ones.
RunConfig parse_run_config(const nlohmann::json& value, const std::string& where,
                           const std::vector<std::string>& overrides = {});
RunConfig load_run_config(const std::string& path, const std::vector<std::string>& overrides = {});
// The Markdown table of all keys.
std::string run_config_markdown();

}  // namespace perigee::rollout
