// Whole runs that train adapters beside a frozen model (learn.lora): as threads, as processes, killed and resumed.
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstring>

#include <fstream>
#include <mutex>
#include <thread>

#include "base/error.h"
#include "base/process.h"
#include "base/random.h"
#include "base/shm.h"
#include "rollout/roles/roles.h"
#include "rollout/run/run.h"
#include "rollout/setup/run_model.h"
#include "rollout/weights/base_weights.h"
#include "rollout/weights/checkpoints.h"
#include "rollout/weights/host_model.h"
#include "rollout/weights/weights_channel.h"
#include "storage/store.h"
#include "tests/rollout/temp_dir.h"

namespace perigee::rollout {
namespace {

namespace fs = std::filesystem;

nlohmann::json lora_config() {
  const auto model = nlohmann::json::parse(R"({"architectures": ["KimiLinearForCausalLM"], "model_type": "kimi_linear",
    "vocab_size": 288, "hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16, "num_hidden_layers": 4,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "q_lora_rank": null,
    "kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 4, "v_head_dim": 16, "mla_use_nope": true,
    "num_experts": 4, "num_experts_per_token": 2, "num_shared_experts": 1, "first_k_dense_replace": 1,
    "moe_layer_freq": 1, "num_expert_group": 1, "topk_group": 1, "moe_renormalize": true,
    "moe_router_activation_func": "sigmoid", "routed_scaling_factor": 1.0, "hidden_act": "silu",
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "rope_scaling": null, "tie_word_embeddings": false,
    "model_max_length": 512, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258,
    "initializer_range": 0.1, "num_nextn_predict_layers": 0, "dtype": "float32",
    "linear_attn_config": {"full_attn_layers": [4], "kda_layers": [1, 2, 3], "head_dim": 16, "num_heads": 2,
                           "short_conv_kernel_size": 4}})");
  return {{"run", {{"name", "tiny"}, {"seed", 3}}},
          {"model", {{"config", model}}},
          {"tasks", {{"kind", "arithmetic"}, {"min_digits", 1}, {"max_digits", 1}, {"operators", "+"}}},
          {"reward", {{{"verifier", "token_share"}, {"modulus", 2}}}},
          {"warmup", {{"steps", 4}, {"batch", 8}, {"eval_every", 4}, {"lr", 3e-3}}},
          {"rollout",
           {{"groups_per_step", 2}, {"group_size", 4}, {"max_new_tokens", 20}, {"segment_tokens", 6}, {"lease_seconds", 10}}},
          {"learn", {{"steps", 12}, {"lr", 1e-3}, {"kl_coef", 0.01}, {"lora", {{"rank", 4}}}}},
          {"eval", {{"every", 6}, {"tasks", 4}}},
          {"checkpoint", {{"every", 3}}},
          {"workers", {{"threads", 1}}},
          {"bus", {{"heartbeat_ms", 100}}}};
}

TrainOptions quiet(bool in_process) {
  TrainOptions options;
  options.in_process = in_process;
  options.program = PERIGEE_PROGRAM;
  options.quiet = true;
  options.handle_signals = false;
  return options;
}

RunOutcome run(const nlohmann::json& config, const TempDir& dir, const TrainOptions& options, const char* name = "run") {
  return train(parse_run_config(config, "test", {"run.dir=" + (dir.path / name).string()}), options);
}

const std::string& expected_hash() {
  static const std::string hash = [] {
    TempDir dir;
    const auto outcome = run(lora_config(), dir, quiet(true));
    EXPECT_EQ(outcome.state, "finished") << outcome.failure;
    return outcome.weights_hash;
  }();
  return hash;
}

void expect_sound(const RunOutcome& outcome) {
  EXPECT_EQ(outcome.state, "finished") << outcome.failure;
  EXPECT_TRUE(StoreReader(outcome.run_dir + "/store.sqlite").check().empty());
  EXPECT_TRUE(SharedMemory::list(shm_prefix(outcome.run_dir)).empty()) << "shared memory was left behind";
  EXPECT_FALSE(fs::exists(outcome.run_dir + "/sockets")) << "sockets were left behind";
}

TEST(LoraRun, ThreadsAndProcessesGiveTheSameAdaptersAndTokensAgreeToTheBit) {
  TempDir dir;
  auto config = lora_config();
  config["workers"] = {{"threads", 2}, {"policy", 2}};
  const auto outcome = run(config, dir, quiet(false));
  expect_sound(outcome);
  EXPECT_EQ(outcome.restarts, 0);
  EXPECT_EQ(outcome.weights_hash, expected_hash());
  StoreReader reader(outcome.run_dir + "/store.sqlite");
  const auto steps = reader.metrics("tiny", "rl");
  ASSERT_EQ(steps.size(), 12u);
  for (const auto& step : steps)
    for (const auto& [name, value] : step.values)
      if (name == "mismatch_share" || name == "mismatch_max") {
        EXPECT_EQ(value, 0.0) << name << " of step " << step.step;
      }
  // A full run of the same configuration is another one; and so are other adapters.
  config["learn"]["lora"] = nullptr;
  EXPECT_NE(run(config, dir, quiet(true), "full").weights_hash, expected_hash());
  config["learn"]["lora"] = {{"rank", 4}, {"seed", 1}};
  EXPECT_NE(run(config, dir, quiet(true), "other").weights_hash, expected_hash());
}

TEST(LoraRun, ACheckpointHoldsTheAdaptersAndSaysWhoseTheyAre) {
  TempDir dir;
  const auto outcome = run(lora_config(), dir, quiet(true));
  expect_sound(outcome);
  const RunConfig config = run_config_of(outcome.run_dir);
  StoreReader reader(outcome.run_dir + "/store.sqlite");
  const auto checkpoint = reader.checkpoints("tiny").back();
  const std::string directory = outcome.run_dir + "/" + checkpoint.path;
  EXPECT_FALSE(fs::exists(directory + "/model.safetensors"));
  const HostModel model(config);
  const auto head = policy::read_adapter_head(directory);
  EXPECT_EQ(head.lora, *config.learn.lora);
  EXPECT_EQ(head.base.fingerprint, model.base_fingerprint);
  EXPECT_EQ(head.base.model.at("seed"), 3);
  std::vector<std::byte> arena(static_cast<size_t>(model.model.trained().weight_bytes()));
  load_checkpoint_weights(directory, model.model, model.base_fingerprint, arena.data());
  EXPECT_EQ(model.hash(arena.data()), checkpoint.weights_hash);
  EXPECT_EQ(checkpoint.weights_hash, outcome.weights_hash);
  try {
    load_checkpoint_weights(directory, model.model, std::string(32, '0'), arena.data());
    FAIL() << "adapters of another model were taken";
  } catch (const Error& e) {
    EXPECT_NE(std::string(e.what()).find("belong to a model with fingerprint"), std::string::npos) << e.what();
  }
}

TEST(LoraRun, RolesKilledAtRandomMomentsEndWithTheSameAdapters) {
  TempDir dir;
  auto config = lora_config();
  config["learn"]["steps"] = 40;
  const std::string expected = run(config, dir, quiet(true), "expected").weights_hash;
  std::mutex mutex;
  std::map<std::string, int> pids;
  Random random(static_cast<uint64_t>(std::chrono::steady_clock::now().time_since_epoch().count()));
  auto options = quiet(false);
  options.max_restarts = 100;
  int bases = 0;
  options.on_start = [&](const std::string& name, int pid) {
    const std::lock_guard lock(mutex);
    pids[name] = pid;
    // The one that makes the model is killed at once, the first time.
    if (name == "base" && ++bases == 1) ::kill(pid, SIGKILL);
    if (name == "base") pids.erase(name);
  };
  int kills = 0;
  std::jthread killer([&](std::stop_token stop) {
    while (kills < 10 && !stop.stop_requested()) {
      std::this_thread::sleep_for(std::chrono::milliseconds(random.next_int(20, 200)));
      const std::lock_guard lock(mutex);
      if (pids.empty()) continue;
      const auto it = std::next(pids.begin(), random.next_int(0, static_cast<int64_t>(pids.size()) - 1));
      ::kill(it->second, SIGKILL);
      pids.erase(it);
      ++kills;
    }
  });
  const auto outcome = run(config, dir, options);
  killer.request_stop();
  killer.join();
  expect_sound(outcome);
  EXPECT_EQ(bases, 2);
  EXPECT_GT(outcome.restarts, 1);
  EXPECT_EQ(outcome.weights_hash, expected) << "after " << kills << " kills";
}

TEST(LoraRun, StoppedAndResumedItEndsWithTheSameAdapters) {
  TempDir dir;
  std::stop_source source;
  auto options = quiet(true);
  options.stop = source.get_token();
  options.on_event = [&](const nlohmann::json& e) {
    if (e.value("event", "") == "step" && e.value("phase", "") == "rl" && e.value("step", 0) == 5) source.request_stop();
  };
  const auto stopped = run(lora_config(), dir, options);
  EXPECT_EQ(stopped.state, "stopped");
  const auto outcome = resume(stopped.run_dir, quiet(false));
  expect_sound(outcome);
  EXPECT_EQ(outcome.weights_hash, expected_hash());
}

// Adapters of single experts, with AdamW's moments in bytes: stopped between two steps and resumed, sampler and learner agree.
TEST(LoraRun, AdaptersOfSingleExpertsResumeWithTheSameBits) {
  TempDir dir;
  auto config = lora_config();
  config["learn"]["lora"] = {{"rank", 4}, {"targets", {"q_proj", "w1", "w3", "w2"}}};
  config["learn"]["optimizer_state"] = "8bit";
  const auto whole = run(config, dir, quiet(true), "whole");
  expect_sound(whole);
  EXPECT_NE(whole.weights_hash, expected_hash());
  StoreReader reader(whole.run_dir + "/store.sqlite");
  for (const auto& step : reader.metrics("tiny", "rl"))
    for (const auto& [name, value] : step.values)
      if (name == "mismatch_share") {
        EXPECT_EQ(value, 0.0) << "step " << step.step;
      }
  std::stop_source source;
  auto options = quiet(true);
  options.stop = source.get_token();
  options.on_event = [&](const nlohmann::json& e) {
    if (e.value("event", "") == "step" && e.value("phase", "") == "rl" && e.value("step", 0) == 5) source.request_stop();
  };
  const auto stopped = run(config, dir, options, "stopped");
  EXPECT_EQ(stopped.state, "stopped");
  const auto resumed = resume(stopped.run_dir, quiet(true));
  expect_sound(resumed);
  EXPECT_EQ(resumed.weights_hash, whole.weights_hash);
}

TEST(LoraRun, RefusesWhatDoesNotExistInOneLine) {
  const auto refusal = [](const nlohmann::json& change) {
    auto config = lora_config();
    config.merge_patch(change);
    try {
      make_run_model(parse_run_config(config, "test"));
    } catch (const Error& e) {
      EXPECT_EQ(e.exit_code(), 2);
      EXPECT_EQ(std::string(e.what()).find('\n'), std::string::npos);
      return std::string(e.what());
    }
    return std::string("accepted");
  };
  EXPECT_NE(refusal({{"learn", {{"router_bias_rate", 0.001}}}}).find("router_bias_rate"), std::string::npos);
  EXPECT_NE(refusal({{"learn", {{"lora", {{"rank", 0}}}}}}).find("rank"), std::string::npos);
  EXPECT_NE(refusal({{"learn", {{"lora", {{"ranks", 8}}}}}}).find("rank"), std::string::npos);
  EXPECT_NE(refusal({{"learn", {{"lora", {{"targets", {"q_projj"}}}}}}}).find("q_proj"), std::string::npos);
  EXPECT_NE(refusal({{"learn", {{"lora", {{"targets", {"lm_head"}}}}}}}), "accepted");
}

TEST(BaseKeeper, GivesTheFirstOneToAllThatAskAndNothingBefore) {
  TempDir dir;
  const std::string run_dir = dir.path.string();
  EXPECT_THROW(ask_for_base(run_dir, nullptr, 64), Error);  // nobody there
  const RunConfig config = parse_run_config(lora_config(), "test", {"run.dir=" + run_dir});
  const auto bytes = make_layout(config)->weight_bytes();
  BaseKeeper keeper(run_dir);
  EXPECT_FALSE(ask_for_base(run_dir, nullptr, bytes));
  zmq::context_t zmq(1);
  const RoleContext role{config, run_dir, "tiny", "", "base", zmq, {}};
  run_base(role);
  const auto first = ask_for_base(run_dir, nullptr, bytes), second = ask_for_base(run_dir, nullptr, bytes);
  ASSERT_TRUE(first && second);
  EXPECT_NE(first->weights.data(), second->weights.data());
  EXPECT_EQ(first->fingerprint, second->fingerprint);
  EXPECT_EQ(policy::weights_fingerprint(second->weights.data(), bytes), second->fingerprint);
  EXPECT_EQ(HostModel(config).base_fingerprint, first->fingerprint);
  run_base(role);  // again: there is one
  EXPECT_EQ(ask_for_base(run_dir, nullptr, bytes)->fingerprint, first->fingerprint);
  EXPECT_THROW(ask_for_base(run_dir, nullptr, bytes + 64), Error);
}

// Packets that nobody of a run sends: it goes on, and gives nobody what is not there.
TEST(BaseKeeper, LivesThroughWhatItDoesNotUnderstand) {
  TempDir dir;
  const std::string run_dir = dir.path.string(), path = net::ipc_endpoint(run_dir + "/sockets", "base").substr(6);
  BaseKeeper keeper(run_dir);
  Random random(7, 1);
  for (int i = 0; i < 200; ++i) {
    const int fd = ::socket(AF_UNIX, SOCK_SEQPACKET, 0);
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::memcpy(address.sun_path, path.c_str(), path.size() + 1);
    ASSERT_EQ(::connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof address), 0);
    std::string packet(static_cast<size_t>(random.next_int(0, 9000)), ' ');
    for (char& c : packet) c = static_cast<char>(random.next_int(0, 255));
    if (i % 4 == 0) packet = R"({"bytes": 64, "fingerprint": "0"})";  // without a descriptor
    if (i % 4 == 1) packet = "[]";
    if (i % 3 != 0) ::send(fd, packet.data(), packet.size(), MSG_NOSIGNAL);
    ::close(fd);
  }
  EXPECT_FALSE(ask_for_base(run_dir, nullptr, 64));
}

}  // namespace
}  // namespace perigee::rollout
