// The reward worker: finished groups in, rewards out.
#include <algorithm>

#include "reward/rubric.h"
#include "rollout/roles/roles.h"
#include "rollout/setup/run_model.h"
#include "rollout/setup/run_tasks.h"
#include "rollout/wire/protocol.h"

namespace perigee::rollout {
namespace {

std::string text_field(const Json& task, const char* key) {
  const auto value = field<std::string>(task, key);
  return value ? *value : std::string();
}

// What a response says: without the token that ended it.
std::string response_text(const policy::Tokenizer& tokenizer, const std::vector<int32_t>& stops, const ScoreMember& member) {
  std::vector<int32_t> tokens = member.tokens;
  if (!tokens.empty() && std::find(stops.begin(), stops.end(), tokens.back()) != stops.end()) tokens.pop_back();
  // Ids that the tokenizer does not know (a vocabulary rounded up) say nothing.
  std::erase_if(tokens, [&](int32_t id) { return !tokenizer.in_range(id); });
  return tokenizer.decode(tokens);
}

// What an agent's last turn says: nothing that a tool printed, no call.
std::string answer_text(const policy::Tokenizer& tokenizer, const ScoreMember& member) {
  return policy::parse_assistant(tokenizer, last_turn(member.tokens, member.mask)).content;
}

}  // namespace

RoleResult run_reward_worker(const RoleContext& role) {
  const auto layout = make_layout(role.config);
  const auto tokenizer = make_tokenizer(role.config, layout->config());
  const auto stops = stop_tokens(layout->config(), *tokenizer);
  auto rubric = reward::Rubric::parse(role.config.reward, "reward");
  const auto environment = environment_config(role.config);
  if (environment) rubric.set_outcomes(environment->rewards);
  HubClient client(role.zmq, role.endpoint, "reward", role.name, role.run_id, {}, client_options(role.config));
  while (!role.stop.stop_requested()) {
    const auto message = client.receive(100);
    if (!message) continue;
    if (message->type() == "stop") break;
    if (message->type() != "score") continue;
    const auto request = decode_score(*message);
    if (!request) continue;
    std::vector<reward::RewardInput> inputs;
    for (const auto& member : request->members) {
      reward::RewardInput input;
      input.prompt = text_field(request->task, "prompt");
      input.answer = text_field(request->task, "answer");
      input.verifier = text_field(request->task, "verifier");
      input.response = environment ? answer_text(*tokenizer, member) : response_text(*tokenizer, stops, member);
      input.tokens = member.tokens;
      input.finish = member.finish;
      input.response_tokens = sampled_tokens(member.tokens, member.mask);
      input.max_tokens = request->max_new_tokens;
      inputs.push_back(std::move(input));
    }
    ScoredGroup scored;
    scored.group_id = request->group_id;
    scored.rewards = rubric.score_group(inputs);
    for (size_t i = 0; i < scored.rewards.size(); ++i) {
      scored.rewards[i].episode_id = request->members[i].episode_id;
      scored.correct.push_back(rubric.correct(scored.rewards[i]));
    }
    client.send_durable(encode(scored));
  }
  return {};
}

}  // namespace perigee::rollout
