// What an agent acts in: the section "environment" of a run's configuration. docs/environments.md
//
//   "environment": {"tools": ["calculator", {"tool": "python", "wall_s": 5}], "max_turns": 8, "tool_wall_s": 10,
//                   "wall_s": 0, "tool_output_bytes": 16384, "calls_per_turn": 16, "tool_threads": 2, "declare": true,
//                   "system": "", "rewards": {"turns": 0, "time": 0}}
//
// With it an episode is a conversation in the chat template: turns that ask for tools are answered and go on, and the
// last one is the answer that verifiers judge.
#pragma once
#include <nlohmann/json.hpp>

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

#include "agents/loop/loop.h"
#include "agents/tools/toolbox.h"
#include "base/episode.h"
#include "rollout/setup/run_config.h"

namespace perigee::rollout {

struct EnvironmentConfig {
  nlohmann::json tools = nlohmann::json::array();  // agents/tools/toolbox.h
  agents::LoopLimits limits;                       // max_tokens is rollout.max_new_tokens
  int64_t tool_threads = 2;                        // of a policy worker
  bool declare = true;                             // the prompt begins with the declarations of the tools
  std::string system;                              // and then with this system message; empty: none
  // What an episode that ended so is worth, in the place of what verifiers say. kTurns and kTime are always there.
  std::map<FinishReason, double> rewards;
};
// nullopt where the run has none. ERRORS (input): an unknown key, a value out of range; tools are not made.
std::optional<EnvironmentConfig> environment_config(const RunConfig& config);

// Thread safety: const calls from several threads at once.
class Environment {
 public:
  // Null where the run has none. ERRORS: of make_toolbox (the sandbox may be refused on this machine).
  static std::unique_ptr<Environment> make(const RunConfig& config);

  const EnvironmentConfig& config() const { return config_; }
  const agents::ToolBox& tools() const { return *tools_; }
  // Its tools work on a folder: each episode gets one of its own.
  bool has_folder() const { return has_folder_; }

 private:
  EnvironmentConfig config_;
  std::unique_ptr<agents::ToolBox> tools_;
  bool has_folder_ = false;
};

// Of an episode's tokens, those of its last turn: what follows the last one that was fed. mask: empty: all sampled.
std::span<const int32_t> last_turn(std::span<const int32_t> tokens, std::span<const uint8_t> mask);
// Tokens that the policy sampled.
int64_t sampled_tokens(std::span<const int32_t> tokens, std::span<const uint8_t> mask);

}  // namespace perigee::rollout
