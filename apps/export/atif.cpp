#include "apps/export/atif.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "apps/output/output.h"
#include "apps/runs/episode_json.h"
#include "apps/runs/episode_turns.h"
#include "policy/tokenizer/chat.h"
#include "storage/store.h"

namespace perigee::apps {
namespace {

// ISO 8601: "2026-11-21T23:15:02.123456Z".
std::string timestamp(int64_t us) {
  std::string text = utc(us);
  text[10] = 'T';
  return text + fmt::format(".{:06}Z", us % 1000000);
}

// What a turn says; its calls are among tool_calls.
std::string message_of(const policy::Tokenizer& tokenizer, std::span<const int32_t> ids) {
  std::vector<int32_t> known(ids.begin(), ids.end());
  std::erase_if(known, [&](int32_t id) { return !tokenizer.in_range(id); });
  return policy::parse_assistant(tokenizer, known).content;
}

void add_tools(nlohmann::json& step, const Turn& turn, size_t number) {
  nlohmann::json calls = nlohmann::json::array(), results = nlohmann::json::array();
  for (size_t i = 0; i < turn.tools.size(); ++i) {
    const ToolEvent& t = turn.tools[i];
    const std::string id = fmt::format("call_{}_{}", number, i + 1);
    nlohmann::json arguments = nlohmann::json::parse(t.input, nullptr, false);
    nlohmann::json call = {{"tool_call_id", id}, {"function_name", t.name}};
    if (arguments.is_object()) {
      call["arguments"] = std::move(arguments);
    } else {
      call["arguments"] = {{"input", t.input}};
      call["extra"] = {{"input_is_no_object", true}};
    }
    calls.push_back(std::move(call));
    results.push_back({{"source_call_id", id},
                       {"content", t.output},
                       {"extra", {{"status", t.status}, {"duration_us", t.duration_us}, {"digest", t.digest}}}});
  }
  step["tool_calls"] = std::move(calls);
  step["observation"] = {{"results", std::move(results)}};
}

nlohmann::json metrics_of(const EpisodeTokens& tokens, const Turn& turn, const std::vector<int32_t>& context) {
  nlohmann::json ids = nlohmann::json::array(), logprobs = nlohmann::json::array(), versions = nlohmann::json::array();
  bool finite = true;
  for (size_t i = turn.begin; i < turn.end; ++i) {
    ids.push_back(tokens.ids[i]);
    logprobs.push_back(tokens.logprobs[i]);
    versions.push_back(tokens.versions[i]);
    finite = finite && std::isfinite(tokens.logprobs[i]);
  }
  nlohmann::json metrics = {{"prompt_tokens", context.size()},
                            {"completion_tokens", ids.size()},
                            {"prompt_token_ids", context},
                            {"completion_token_ids", std::move(ids)},
                            {"extra", {{"policy_versions", std::move(versions)}}}};
  if (finite)
    metrics["logprobs"] = std::move(logprobs);
  else
    metrics["extra"]["logprobs_left_out"] = "some are not finite";
  return metrics;
}

}  // namespace

nlohmann::json atif_trajectory(const EpisodeRow& row, const EpisodeRecord& e, const policy::Tokenizer& tokenizer,
                               const std::string& agent_version) {
  const EpisodeTokens tokens(e);
  nlohmann::json steps = nlohmann::json::array();
  steps.push_back({{"step_id", 1}, {"source", "user"}, {"message", e.spec.prompt_text}});
  if (row.created_us > 0) steps[0]["timestamp"] = timestamp(row.created_us);
  std::vector<int32_t> context = e.spec.prompt;
  int64_t prompt_tokens = 0, completion_tokens = 0;
  const std::vector<Turn> turns = turns_of(e, tokens);
  for (size_t n = 0; n < turns.size(); ++n) {
    const Turn& turn = turns[n];
    if (turn.fed_end == turn.begin && turn.tools.empty()) continue;  // nothing was generated
    const auto ids = std::span(tokens.ids).subspan(turn.begin, turn.end - turn.begin);
    nlohmann::json step = {{"step_id", steps.size() + 1},
                           {"source", "agent"},
                           {"message", message_of(tokenizer, ids)},
                           {"metrics", metrics_of(tokens, turn, context)},
                           {"llm_call_count", 1}};
    if (!turn.tools.empty()) {
      add_tools(step, turn, n + 1);
      if (turn.tools[0].started_us > 0) step["timestamp"] = timestamp(turn.tools[0].started_us);
    } else if (row.finished_us > 0 && n + 1 == turns.size()) {
      step["timestamp"] = timestamp(row.finished_us);
    }
    prompt_tokens += static_cast<int64_t>(context.size());
    completion_tokens += static_cast<int64_t>(ids.size());
    context.insert(context.end(), tokens.ids.begin() + static_cast<int64_t>(turn.begin),
                   tokens.ids.begin() + static_cast<int64_t>(turn.fed_end));
    steps.push_back(std::move(step));
  }
  nlohmann::json result = {{"state", state_name(e.state)}, {"finish", finish_name(e.finish)}, {"reward", nullptr}};
  if (e.reward) {
    result["reward"] = e.reward->total;
    result["reward_failed"] = e.reward->failed;
    for (const RewardComponent& c : e.reward->components)
      result["components"].push_back({{"name", c.name}, {"value", c.value}, {"weight", c.weight}, {"status", c.status}});
  }
  const auto count = steps.size();
  nlohmann::json extra = {{"episode", row.episode_id},
                          {"group", row.group_id},
                          {"member", row.member},
                          {"step", row.step},
                          {"seed", row.seed},
                          {"temperature", e.spec.temperature},
                          {"sampling", nlohmann::json::parse(e.spec.sampling, nullptr, false)},
                          {"task", nlohmann::json::parse(row.task, nullptr, false)}};
  for (const char* key : {"sampling", "task"})
    if (extra[key].is_discarded()) extra[key] = nullptr;
  if (e.spec.parent_episode_id != 0)
    extra["branch_of"] = {{"episode", e.spec.parent_episode_id}, {"tokens", e.spec.parent_tokens}};
  if (!e.pruned.empty()) extra["not_kept"] = e.pruned;
  return {{"schema_version", kAtifVersion},
          {"session_id", row.run},
          {"trajectory_id", fmt::format("{}/{}", row.run, row.episode_id)},
          {"agent", {{"name", "perigee"}, {"version", agent_version.empty() ? "unknown" : agent_version}, {"model_name", row.run}}},
          {"steps", std::move(steps)},
          {"final_metrics",
           {{"total_prompt_tokens", prompt_tokens},
            {"total_completion_tokens", completion_tokens},
            {"total_steps", count},
            {"extra", std::move(result)}}},
          {"extra", std::move(extra)}};
}

}  // namespace perigee::apps
