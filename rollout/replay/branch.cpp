#include "rollout/replay/branch.h"

#include <algorithm>
#include <random>

#include "base/error.h"
#include "base/json.h"
#include "base/random.h"
#include "policy/engine/engine.h"
#include "rollout/replay/attempts.h"
#include "rollout/replay/score.h"
#include "rollout/replay/tools_again.h"
#include "rollout/roles/agent_episodes.h"
#include "rollout/wire/protocol.h"

namespace perigee::rollout {
namespace {

constexpr int64_t kMostBranches = 4096;

uint64_t random_seed() {
  std::random_device device;
  return static_cast<uint64_t>(device()) << 32 | device();
}

kernels::SamplingParams sampling_of(const EpisodeSpec& spec, const BranchRequest& r) {
  auto sampling = sampling_from_json(parse_json(spec.sampling, "sampling"), spec.temperature);
  if (!sampling)
    throw_input("episode {}: sampling parameters {} are not known to this program", spec.episode_id,
                spec.sampling);
  if (r.temperature) sampling->temperature = static_cast<float>(*r.temperature);
  if (r.top_p) sampling->top_p = static_cast<float>(*r.top_p);
  if (r.top_k) {
    if (*r.top_k < 0 || *r.top_k > INT32_MAX)
      throw_input("--top-k {}: 0 (off) or more is expected", *r.top_k);
    sampling->top_k = static_cast<int32_t>(*r.top_k);
  }
  return *sampling;
}

// Whether the parent's attempt that sampled token `at` had computed what stands before it under another version.
bool is_mixed(const WholeEpisode& parent, size_t at, uint32_t version) {
  const EpisodeSpec& spec = parent.record.spec;
  for (const Attempt& a : attempts_of(parent.record)) {
    // Indices into the episode's whole sequence, as at + spec.prompt (without what a branch took over) is.
    const size_t position = at + spec.prompt.size() - parent.own;
    if (position < a.first || position >= a.tokens.size()) continue;
    for (size_t i = a.first; i < position; ++i)
      if (a.versions[i - a.first] != version) return true;
  }
  return false;
}

// What of an episode stands in the engine while it runs.
struct Running {
  Segment segment;
  bool fed = false;
};

}  // namespace

BranchPlan plan_branch(StoreQueries& store, const RunConfig& config, const std::string& run_id,
                       const BranchRequest& r) {
  if (r.count < 1 || r.count > kMostBranches)
    throw_input("-n {}: 1 to {} is expected", r.count, kMostBranches);
  if (store.run_of_episode(r.episode) != run_id)
    throw_input("{}: episode {} is of another run", store.file().string(), r.episode);
  BranchPlan plan;
  plan.parent = whole_episode(store, r.episode);
  const WholeEpisode& parent = plan.parent;
  const EpisodeSpec& from = parent.record.spec;
  const int64_t own = static_cast<int64_t>(parent.tokens.size() - parent.own);
  if (r.at < 0 || r.at > own || parent.tokens.empty())
    throw_input("--at {}: episode {} has {} tokens, so 0 to {} is expected", r.at, r.episode, own, own);
  const size_t at = parent.own + static_cast<size_t>(r.at);
  if (at < parent.tokens.size() && parent.sampled[at] == 0) {
    size_t begin = at, end = at;
    while (begin > 0 && parent.sampled[begin - 1] == 0) --begin;
    while (end < parent.tokens.size() && parent.sampled[end] == 0) ++end;
    throw_input(
        "--at {}: tokens {} to {} of episode {} are a tool's answer, which was fed; the policy goes on at {}",
        r.at, begin - parent.own, end - 1 - parent.own, r.episode, end - parent.own);
  }
  if (at == parent.tokens.size() && parent.record.finish != FinishReason::kLength)
    throw_input(
        "--at {}: episode {} ended there with {}; only one that ran out of tokens can go on at its end", r.at,
        r.episode, finish_name(parent.record.finish));
  plan.version = r.version ? *r.version : parent.versions[std::min(at, parent.versions.size() - 1)];
  plan.mixed = !r.version && is_mixed(parent, at, plan.version);

  const auto layout = make_layout(config);
  const kernels::SamplingParams sampling = sampling_of(from, r);
  sampling.validate(layout->config().vocab_size);
  EpisodeSpec spec;
  spec.prompt = parent.prompt;
  spec.prompt.insert(spec.prompt.end(), parent.tokens.begin(),
                     parent.tokens.begin() + static_cast<ptrdiff_t>(at));
  spec.prompt_text = from.prompt_text;
  spec.temperature = sampling.temperature;
  spec.sampling = sampling_to_json(sampling).dump();
  spec.parent_episode_id = r.episode;
  spec.parent_tokens = static_cast<int32_t>(at);
  const auto taken = static_cast<int64_t>(at);
  if (r.max_new_tokens && (*r.max_new_tokens < 1 || *r.max_new_tokens > INT32_MAX - taken))
    throw_input("--max-new-tokens {}: 1 or more is expected", *r.max_new_tokens);
  const int64_t most = r.max_new_tokens ? taken + *r.max_new_tokens : from.max_new_tokens;
  if (most <= taken)
    throw_input("--at {}: episode {} may have {} tokens, and they are all taken over; give --max-new-tokens",
                r.at, r.episode, most);
  spec.max_new_tokens = static_cast<int32_t>(most);
  const int64_t length = layout->config().max_length;
  if (static_cast<int64_t>(parent.prompt.size()) + most > length)
    throw_input("--max-new-tokens: {} tokens after a prompt of {} exceed the model's {}", most,
                parent.prompt.size(), length);
  const uint64_t first = r.parent_seed ? from.seed : r.seed.value_or(random_seed());
  for (int64_t i = 0; i < r.count; ++i) {
    spec.seed = i == 0 ? first : derive_seed(first, static_cast<uint64_t>(i), 0x6272616E6368u);
    plan.members.push_back(spec);
  }
  const GroupRecord of_parent = store.group(from.group_id).group;
  plan.group.step = of_parent.step;
  plan.group.round = of_parent.round;
  plan.group.task_index = of_parent.task_index;
  plan.group.task = of_parent.task;
  return plan;
}

BranchResult generate_branch(kernels::Context& ctx, const HostModel& model, const RunConfig& config,
                             const RunTasks& tasks, const policy::Tokenizer& tokenizer,
                             const BranchPlan& plan, const std::byte* weights) {
  const WholeEpisode& parent = plan.parent;
  const auto taken = static_cast<size_t>(plan.members[0].parent_tokens);
  const std::vector<int32_t> committed(parent.tokens.begin(),
                                       parent.tokens.begin() + static_cast<ptrdiff_t>(taken));
  const std::vector<uint8_t> mask(parent.sampled.begin(),
                                  parent.sampled.begin() + static_cast<ptrdiff_t>(taken));
  policy::Engine engine(model.engine_backend(ctx, config.engine), *model.model.layout,
                        config.engine);
  engine.set_weights(weights, plan.version);
  const Environment* environment = tasks.environment();
  BranchResult result;
  result.members.resize(plan.members.size());

  // The folder of each as it was there: the tools of the turns before run again.
  std::optional<TemporaryFolder> work;
  std::optional<AgentEpisodes> agents;
  if (environment != nullptr) {
    work.emplace("branch");
    agents.emplace(engine, tokenizer, *environment, work->path());
    size_t turns = 0;
    for (const WholeTurn& t : turns_of(parent)) turns += t.fed_end > t.end && t.fed_end <= taken;
    const auto files =
        environment->has_folder() ? tasks.files(plan.group.task_index, false) : std::vector<TaskFile>();
    for (size_t i = 0; i < plan.members.size(); ++i) {
      const std::string folder = std::to_string(i);
      if (environment->has_folder() && turns > 0) {
        const auto events =
            run_turns(*environment, tokenizer, parent, turns, work->path() / folder, files, {});
        for (size_t k = 0; k < std::min(events.size(), parent.tools.size()); ++k)
          result.other_answers += events[k].digest != parent.tools[k].digest;
      }
      agents->begin({.id = i,
                     .folder = folder,
                     .committed = committed,
                     .mask = mask,
                     .max_new_tokens = plan.members[i].max_new_tokens,
                     .files = files,
                     .prepared = environment->has_folder() && turns > 0});
    }
  }

  policy::GenerationGroup group;
  group.prompt = parent.prompt;
  group.stop_tokens = tasks.stop_tokens();
  for (size_t i = 0; i < plan.members.size(); ++i) {
    const EpisodeSpec& spec = plan.members[i];
    policy::GenerationRequest request;
    request.id = i;
    request.seed = spec.seed;
    request.committed = committed;
    request.max_new_tokens = spec.max_new_tokens;
    request.sampling = *sampling_from_json(parse_json(spec.sampling, "sampling"), spec.temperature);
    if (agents) {
      request.hold = true;
      request.reserve_tokens = spec.max_new_tokens;
    }
    group.members.push_back(std::move(request));
  }
  engine.submit(std::move(group));

  std::vector<Running> running(plan.members.size());
  const auto close = [&](size_t i) {
    Running& r = running[i];
    r.segment.index = static_cast<int32_t>(result.members[i].segments.size());
    result.members[i].finish = r.segment.finish;
    result.members[i].segments.push_back(std::exchange(r.segment, Segment()));
    r.fed = false;
  };
  std::vector<policy::GeneratedToken> tokens;
  while (!engine.idle() || (agents && agents->waiting())) {
    if (agents) {
      if (engine.idle()) agents->wait(100);
      for (auto& a : agents->advance()) {
        Segment& s = running[a.id].segment;
        for (ToolEvent& event : a.events) s.tools.push_back(std::move(event));
        s.finish = a.finish;
        if (a.finish != FinishReason::kNone) close(a.id);
      }
    }
    tokens.clear();
    engine.step(tokens);
    for (const policy::GeneratedToken& t : tokens) {
      Running& r = running[t.id];
      // A turn and the answers to its calls are one segment, as in a run.
      if (r.fed && !t.fed) close(t.id);
      Segment& s = r.segment;
      if (t.fed) s.mask.resize(s.tokens.size(), 1);
      s.tokens.push_back(t.token);
      s.logprobs.push_back(t.logprob);
      s.versions.push_back(t.version);
      if (t.fed) s.mask.push_back(0);
      r.fed = t.fed;
      s.finish = agents ? agents->take(t) : t.finish;
      if (s.finish != FinishReason::kNone) close(t.id);
    }
  }

  const reward::Rubric rubric = run_rubric(config, tasks);
  std::vector<reward::RewardInput> inputs;
  for (size_t i = 0; i < result.members.size(); ++i) {
    std::vector<int32_t> said = committed;
    std::vector<uint8_t> own = mask;
    for (const Segment& s : result.members[i].segments) {
      said.insert(said.end(), s.tokens.begin(), s.tokens.end());
      if (s.mask.empty()) own.resize(said.size(), 1);
      own.insert(own.end(), s.mask.begin(), s.mask.end());
    }
    inputs.push_back(reward_input(tasks, tokenizer, plan.group.task, said, own, result.members[i].finish,
                                  plan.members[i].max_new_tokens));
  }
  const std::vector<Reward> rewards = rubric.score_group(inputs);
  for (size_t i = 0; i < rewards.size(); ++i) result.members[i].reward = rewards[i];
  return result;
}

void record_branch(Store& store, const std::string& run_id, BranchPlan& plan, const BranchResult& result) {
  auto transaction = store.begin();
  store.open_branch(run_id, plan.group, plan.members);
  for (size_t i = 0; i < plan.members.size(); ++i) {
    const int64_t id = plan.members[i].episode_id;
    const std::optional<int32_t> attempt = store.begin_attempt(id);
    PERIGEE_CHECK(attempt, "episode {}", id);
    for (Segment segment : result.members[i].segments) {
      segment.episode_id = id;
      segment.attempt = *attempt;
      const Append said = store.append_segment(segment);
      PERIGEE_CHECK(said == Append::kAppended, "episode {}, segment {}: {}", id, segment.index,
                    append_name(said));
    }
    Reward reward = result.members[i].reward;
    reward.episode_id = id;
    const Append said = store.record_reward(reward);
    PERIGEE_CHECK(said == Append::kAppended, "reward of episode {}: {}", id, append_name(said));
  }
  transaction.commit();
}

}  // namespace perigee::rollout
