#include "rollout/setup/environment.h"

#include <algorithm>

#include "agents/mcp/mcp_tools.h"
#include "base/error.h"
#include "base/json.h"
#include "base/text.h"

namespace perigee::rollout {
namespace {

// Ends that the configuration may give a reward of their own.
constexpr FinishReason kOutcomes[] = {FinishReason::kTurns, FinishReason::kTime, FinishReason::kLength};

std::map<FinishReason, double> read_rewards(JsonReader& environment) {
  std::map<FinishReason, double> rewards{{FinishReason::kTurns, 0.0}, {FinishReason::kTime, 0.0}};
  const nlohmann::json* value = environment.find("rewards");
  if (value == nullptr) return rewards;
  JsonReader reader(*value, environment.where(), environment.path("rewards"));
  for (const FinishReason outcome : kOutcomes) {
    const std::string name(finish_name(outcome));
    if (reader.has(name)) rewards[outcome] = reader.number(name, -1e6, 1e6);
    reader.ignore(name);
  }
  reader.finish();
  return rewards;
}

// In this process, on what it is given: needs no folder.
bool works_on_a_folder(const nlohmann::json& tool) {
  const nlohmann::json& kind = tool.is_object() && tool.contains("tool") ? tool["tool"] : tool;
  return kind != "calculator";
}

}  // namespace

std::optional<EnvironmentConfig> environment_config(const RunConfig& config) {
  if (config.environment.is_null() || (config.environment.is_object() && config.environment.empty()))
    return std::nullopt;
  JsonReader reader(config.environment, "environment");
  EnvironmentConfig e;
  if (const nlohmann::json* tools = reader.find("tools")) {
    if (!tools->is_array()) reader.fail("tools", "a list of tools is expected (docs/environments.md)");
    e.tools = *tools;
  }
  e.limits.max_turns = reader.integer("max_turns", 1, 10000, e.limits.max_turns);
  e.limits.wall_s = reader.number("wall_s", 0, 1e6, e.limits.wall_s);
  e.limits.tool_wall_s = reader.number("tool_wall_s", 0.001, 1e5, e.limits.tool_wall_s);
  e.limits.tool_output_bytes =
      reader.integer("tool_output_bytes", 64, int64_t{1} << 30, e.limits.tool_output_bytes);
  e.limits.calls_per_turn = reader.integer("calls_per_turn", 1, 10000, e.limits.calls_per_turn);
  e.limits.max_tokens = config.rollout.max_new_tokens;
  e.tool_threads = reader.integer("tool_threads", 1, 256, e.tool_threads);
  e.declare = reader.boolean("declare", e.declare);
  e.system = reader.string("system", e.system);
  e.rewards = read_rewards(reader);
  reader.finish();
  return e;
}

std::unique_ptr<Environment> Environment::make(const RunConfig& config) {
  auto read = environment_config(config);
  if (!read) return nullptr;
  auto environment = std::make_unique<Environment>();
  environment->config_ = std::move(*read);
  const nlohmann::json& tools = environment->config_.tools;
  environment->tools_ = agents::make_toolbox(tools, "environment: tools", {{"mcp", agents::add_mcp_tools}});
  environment->has_folder_ = std::any_of(tools.begin(), tools.end(), works_on_a_folder);
  return environment;
}

std::span<const int32_t> last_turn(std::span<const int32_t> tokens, std::span<const uint8_t> mask) {
  PERIGEE_CHECK(mask.empty() || mask.size() == tokens.size(), "tokens {} mask {}", tokens.size(),
                mask.size());
  size_t begin = mask.size();
  while (begin > 0 && mask[begin - 1] != 0) --begin;
  return tokens.subspan(mask.empty() ? 0 : begin);
}

int64_t sampled_tokens(std::span<const int32_t> tokens, std::span<const uint8_t> mask) {
  if (mask.empty()) return static_cast<int64_t>(tokens.size());
  return std::count_if(mask.begin(), mask.end(), [](uint8_t m) { return m != 0; });
}

}  // namespace perigee::rollout
