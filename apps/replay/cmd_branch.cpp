// perigee branch RUN EPISODE --at TOKEN: the episode goes on from there in other ways; the new episodes are kept beside it.
#include <fmt/format.h>

#include <charconv>

#include "apps/command_line/commands.h"
#include "apps/output/output.h"
#include "apps/replay/past_run.h"
#include "apps/runs/episode_json.h"
#include "base/error.h"
#include "base/text.h"
#include "rollout/replay/branch.h"

namespace perigee::apps {
namespace {

struct Options {
  AgainOptions again;
  std::string episode;
  std::optional<int64_t> at, max_new_tokens, version, top_k;
  std::optional<double> temperature, top_p;
  std::optional<std::string> seed;
  int64_t count = 8;
};

// What followed token `at` of the first prompt.
struct Line {
  int64_t episode = 0;
  uint64_t seed = 0;
  double temperature = 1;
  std::vector<int32_t> tokens;
  FinishReason finish = FinishReason::kNone;
  std::optional<Reward> reward;
  size_t shared = 0;  // tokens from the beginning that are the parent's, too
};

rollout::BranchRequest request_of(const Options& o) {
  rollout::BranchRequest r;
  r.episode = parse_episode(o.episode);
  r.at = *o.at;
  r.count = o.count;
  r.temperature = o.temperature;
  r.top_p = o.top_p;
  r.top_k = o.top_k;
  r.max_new_tokens = o.max_new_tokens;
  if (o.version) {
    if (*o.version < 0 || *o.version > INT32_MAX)
      throw_input("--version {}: 0 or more is expected", *o.version);
    r.version = static_cast<uint32_t>(*o.version);
  }
  if (o.seed && *o.seed == "parent") {
    r.parent_seed = true;
  } else if (o.seed) {
    uint64_t seed = 0;
    const auto [end, error] = std::from_chars(o.seed->data(), o.seed->data() + o.seed->size(), seed);
    if (error != std::errc{} || end != o.seed->data() + o.seed->size())
      throw_input("--seed {}: a number from 0 to {}, or parent, is expected", quote(*o.seed), UINT64_MAX);
    r.seed = seed;
  }
  return r;
}

std::vector<Line> lines_of(const rollout::BranchPlan& plan, const rollout::BranchResult& result) {
  std::vector<Line> lines;
  const auto at = static_cast<ptrdiff_t>(plan.members[0].parent_tokens);
  const EpisodeRecord& parent = plan.parent.record;
  lines.push_back({parent.spec.episode_id,
                   parent.spec.seed,
                   parent.spec.temperature,
                   {plan.parent.tokens.begin() + at, plan.parent.tokens.end()},
                   parent.finish,
                   parent.reward,
                   0});
  lines[0].shared = lines[0].tokens.size();
  for (size_t i = 0; i < plan.members.size(); ++i) {
    const EpisodeSpec& spec = plan.members[i];
    Line line{spec.episode_id,          spec.seed, spec.temperature, {}, result.members[i].finish,
              result.members[i].reward, 0};
    for (const Segment& s : result.members[i].segments)
      line.tokens.insert(line.tokens.end(), s.tokens.begin(), s.tokens.end());
    const auto parted =
        std::mismatch(line.tokens.begin(), line.tokens.end(), lines[0].tokens.begin(), lines[0].tokens.end());
    line.shared = static_cast<size_t>(parted.first - line.tokens.begin());
    lines.push_back(std::move(line));
  }
  return lines;
}

nlohmann::json to_json(const Line& line, const policy::Tokenizer& tokenizer) {
  nlohmann::json out = {{"episode", line.episode},
                        {"seed", line.seed},
                        {"temperature", line.temperature},
                        {"tokens", line.tokens.size()},
                        {"shared_tokens", line.shared},
                        {"finish", finish_name(line.finish)},
                        {"text", text_of(tokenizer, line.tokens)},
                        {"reward", nullptr},
                        {"components", nlohmann::json::array()}};
  if (!line.reward) return out;
  out["reward"] = line.reward->total;
  out["reward_failed"] = line.reward->failed;
  for (const RewardComponent& c : line.reward->components)
    out["components"].push_back(
        {{"name", c.name}, {"value", c.value}, {"weight", c.weight}, {"status", c.status}});
  return out;
}

void print(const std::vector<Line>& lines, const policy::Tokenizer& tokenizer) {
  Table table({"episode", "seed", "temperature", "tokens", "as parent", "finish", "reward", "text"},
              {0, 1, 2, 3, 4, 6});
  for (size_t i = 0; i < lines.size(); ++i) {
    const Line& line = lines[i];
    table.row({i == 0 ? fmt::format("{} (parent)", line.episode) : std::to_string(line.episode),
               std::to_string(line.seed), fmt::format("{:g}", line.temperature),
               std::to_string(line.tokens.size()), std::to_string(line.shared),
               std::string(finish_name(line.finish)),
               !line.reward          ? "-"
               : line.reward->failed ? "failed"
                                     : fmt::format("{:.4f}", line.reward->total),
               printable_line(text_of(tokenizer, line.tokens), 60)});
  }
  table.print();
}

int branch(Options o) {
  if (o.again.run.latest && o.episode.empty()) std::swap(o.again.run.run, o.episode);
  if (o.episode.empty()) throw_input("branch: which episode? perigee rollouts lists them");
  if (!o.at)
    throw_input(
        "branch: --at TOKEN is missing: how many of the episode's tokens to take over (perigee show "
        "--tokens)");
  const rollout::BranchRequest request = request_of(o);
  PastRun run(o.again, PastRun::Open::kWrite);
  rollout::BranchPlan plan = rollout::plan_branch(run.store(), run.config, run.place.id, request);
  const std::vector<PolicyVersion> versions = run.store().versions(run.place.id);
  if (versions.empty() || plan.version > versions.back().version)
    throw_input("--version {}: the run made versions 0 to {}", plan.version,
                versions.empty() ? 0 : versions.back().version);
  rollout::BranchResult result;
  const rollout::Rebuilt rebuilt =
      run.rebuild(plan.version, plan.version, [&](uint32_t, const std::byte* weights) {
        result = rollout::generate_branch(run.ctx, run.model, run.config, run.tasks, *run.tokenizer, plan,
                                          weights);
      });
  if (rebuilt.other_hash > 0)
    throw_environment(
        "version {} came out with another hash than recorded: an altered store, or built by other code? "
        "Nothing was kept",
        rebuilt.first_other);
  rollout::record_branch(run.writer(), run.place.id, plan, result);
  const std::vector<Line> lines = lines_of(plan, result);
  if (o.again.json) {
    nlohmann::json episodes = nlohmann::json::array();
    for (size_t i = 1; i < lines.size(); ++i) episodes.push_back(to_json(lines[i], *run.tokenizer));
    print_json({{"run", run.place.id},
                {"parent", to_json(lines[0], *run.tokenizer)},
                {"at", *o.at},
                {"version", plan.version},
                {"group", plan.group.group_id},
                {"parent_spans_versions", plan.mixed},
                {"other_tool_answers", result.other_answers},
                {"episodes", std::move(episodes)}});
    return 0;
  }
  fmt::print("episode {} of {} goes on from its token {} under version {}, {} times (group {})\n",
             request.episode, run.place.id, *o.at, plan.version, lines.size() - 1, plan.group.group_id);
  if (plan.mixed)
    fmt::print(
        "the parent's weights changed before that token; the branches compute all of it under version {}, so "
        "that even with "
        "the parent's seed they may go another way\n",
        plan.version);
  if (result.other_answers > 0)
    fmt::print("{} tool calls before it answered something else now than the policy heard then\n",
               result.other_answers);
  print(lines, *run.tokenizer);
  return 0;
}

}  // namespace

void add_branch(Program& program) {
  auto o = std::make_shared<Options>();
  Command command =
      program.command("branch", "Let an episode go on from any token, in other ways", kGroupLook);
  declare_run(command, o->again.run);
  command.positional("EPISODE", o->episode, "its number, as perigee rollouts lists it", false)
      .option("--at", o->at, "TOKEN", "how many of its tokens to take over; 0: none, the prompt alone")
      .option("-n,--count", o->count, "N", "how many ways")
      .option("--seed", o->seed, "S",
              "of the first, the others' follow from it; parent: as it was. Random when not given")
      .option("--temperature", o->temperature, "X", "0: greedy; default: the parent's")
      .option("--top-p", o->top_p, "X", "default: the parent's")
      .option("--top-k", o->top_k, "N", "0: off; default: the parent's")
      .option("--max-new-tokens", o->max_new_tokens, "M",
              "at most, after TOKEN; default: what the parent had left")
      .option("--version", o->version, "V", "of the policy; default: the one that made the token there");
  declare_again(command, o->again);
  command.example("branch runs/quickstart 17 --at 12")
      .example("branch --latest 17 --at 0 -n 4 --temperature 1.3 --seed 7")
      .example("branch runs/quickstart 17 --at 12 -n 1 --seed parent");
  command.action([o] { return branch(*o); });
}

}  // namespace perigee::apps
