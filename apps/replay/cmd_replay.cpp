// perigee replay RUN EPISODE...: episodes generated again and compared with what is stored; the tools they called are run
// again, too.
#include <fmt/format.h>

#include <set>

#include "apps/command_line/commands.h"
#include "apps/output/output.h"
#include "apps/output/terminal.h"
#include "apps/replay/past_run.h"
#include "apps/runs/episode_json.h"
#include "base/error.h"
#include "base/text.h"
#include "rollout/replay/replay.h"
#include "rollout/replay/tools_again.h"

namespace perigee::apps {
namespace {

using rollout::Difference;
using rollout::ToolDifference;

struct Options {
  AgainOptions again;
  std::vector<std::string> episodes;
  std::string tools = "again";
  bool all = false;
};

constexpr const char* kDifferences[] = {"token", "logprob", "end"};
constexpr const char* kToolDifferences[] = {"output", "stored", "tokens", "call", "failed"};

// Decoded as far as they are tokens of the tokenizer, on one line.
std::string line_of(const policy::Tokenizer& tokenizer, const std::vector<int32_t>& ids) {
  return printable_line(text_of(tokenizer, ids));
}

void print(const Difference& d, const policy::Tokenizer& tokenizer) {
  const auto token = [&](int32_t id) {
    return id < 0 ? std::string("nothing") : fmt::format("{} ({})", id, quote(token_text(tokenizer, id)));
  };
  std::string what;
  switch (d.what) {
    case Difference::What::kToken:
      what = fmt::format("token {} is stored, {} came out", token(d.token_then), token(d.token_again));
      break;
    case Difference::What::kLogprob:
      what = fmt::format("token {}: log-probability {:.9g} is stored, {:.9g} came out", token(d.token_then),
                         d.logprob_then, d.logprob_again);
      break;
    case Difference::What::kEnd:
      what = d.token_then < 0 ? fmt::format("the record ends there with {}; now {} follows",
                                            finish_name(d.finish_then), token(d.token_again))
                              : fmt::format("the record goes on there with {}; now it ends with {}",
                                            token(d.token_then), finish_name(d.finish_again));
  }
  fmt::print("  {}\n", printable_line(fmt::format("episode {}, position {}, version {}: {}", d.episode,
                                                  d.position, d.version, what)));
  if (!d.before.empty()) fmt::print("    before  {}\n", line_of(tokenizer, d.before));
  if (!d.then.empty()) fmt::print("    stored  {}\n", line_of(tokenizer, d.then));
  if (!d.again.empty()) fmt::print("    again   {}\n", line_of(tokenizer, d.again));
}

void print(const ToolDifference& d) {
  const std::string where = fmt::format("episode {}, turn {}, tool {}: ", d.episode, d.turn + 1, d.tool);
  const std::string run =
      d.digest_again.empty() ? "" : fmt::format("; the tool answers with {} now", d.digest_again);
  switch (d.what) {
    case ToolDifference::What::kOutput:
      fmt::print("  {}\n", printable_line(where + (d.digest_then == d.digest_again
                                                       ? fmt::format("status {} is stored, {} came out",
                                                                     d.status_then, d.status_again)
                                                       : fmt::format("digest {} is stored, {} came out",
                                                                     d.digest_then, d.digest_again))));
      break;
    case ToolDifference::What::kStored:
      fmt::print("  {}\n", printable_line(where + d.detail + run));
      break;
    default:
      fmt::print("  {}\n", printable_line(where + d.detail));
  }
  if (d.first_byte >= 0)
    fmt::print("    first byte that differs: {}; from byte {} on\n    stored  {}\n    again   {}\n",
               d.first_byte, d.context_begin, printable_line(d.then), printable_line(d.again));
}

nlohmann::json to_json(const Difference& d, const policy::Tokenizer& tokenizer) {
  return {{"episode", d.episode},
          {"position", d.position},
          {"version", d.version},
          {"what", kDifferences[static_cast<int>(d.what)]},
          {"token", {{"stored", d.token_then}, {"again", d.token_again}}},
          {"logprob", {{"stored", d.logprob_then}, {"again", d.logprob_again}}},
          {"finish", {{"stored", finish_name(d.finish_then)}, {"again", finish_name(d.finish_again)}}},
          {"context",
           {{"before", text_of(tokenizer, d.before)},
            {"stored", text_of(tokenizer, d.then)},
            {"again", text_of(tokenizer, d.again)}}}};
}

nlohmann::json to_json(const ToolDifference& d) {
  return {{"episode", d.episode},
          {"turn", d.turn},
          {"call", d.call},
          {"what", "tool"},
          {"tool_what", kToolDifferences[static_cast<int>(d.what)]},
          {"position", d.position},
          {"tool", {{"name", d.tool}, {"stored", d.digest_then}, {"again", d.digest_again}}},
          {"status", {{"stored", d.status_then}, {"again", d.status_again}}},
          {"first_byte", d.first_byte},
          {"context", {{"begin", d.context_begin}, {"stored", d.then}, {"again", d.again}}},
          {"detail", d.detail}};
}

// The tools of these episodes; they are run before any token is computed. orphans: branches whose parents' tools, which made
// their folders, are not kept any more.
rollout::ToolTally replay_tools(PastRun& run, const std::vector<int64_t>& episodes, bool execute,
                                int64_t& orphans) {
  if (run.tasks.environment() == nullptr) return {};
  rollout::ToolReplayer tools(*run.tasks.environment(), *run.tokenizer, execute);
  ProgressLine line;
  size_t done = 0;
  for (const int64_t id : episodes) {
    if (rollout::lost_parent(run.store(), id)) {
      ++orphans;
      continue;
    }
    rollout::WholeEpisode whole = rollout::whole_episode(run.store(), id);
    std::vector<rollout::TaskFile> files;
    if (execute && run.tasks.environment()->has_folder())
      files = run.tasks.files(whole.record.spec.task_index, false);
    tools.add(std::move(whole), std::move(files));
    ++done;
    line.show([&] {
      return fmt::format("tools of episode {} of {}, {} differences", done, episodes.size(),
                         tools.tally().differences.size());
    });
  }
  tools.finish();
  return tools.tally();
}

void print_summary(const rollout::ReplayTally& t, const rollout::ToolTally& tools,
                   const rollout::Rebuilt& rebuilt, const PastRun::Episodes& episodes, int64_t orphans,
                   const policy::Tokenizer& tokenizer) {
  fmt::print("{} tokens of {} episodes generated again under {} policy versions: {}\n", t.tokens,
             episodes.ids.size(), rebuilt.versions,
             t.differences.empty()
                 ? "identical, tokens and log-probabilities"
                 : fmt::format("{} of {} attempts differ", t.differences.size(), t.attempts));
  constexpr size_t kShown = 10;
  for (size_t i = 0; i < std::min(kShown, t.differences.size()); ++i) print(t.differences[i], tokenizer);
  if (t.differences.size() > kShown)
    fmt::print("  and {} more: --json has them all\n", t.differences.size() - kShown);
  if (tools.calls > 0) {
    fmt::print("{} tool calls {}: {}\n", tools.calls,
               tools.run > 0 ? "run again" : "compared with their digests, not run",
               tools.differences.empty() ? "identical"
                                         : fmt::format("{} with a difference", tools.differences.size()));
  }
  for (size_t i = 0; i < std::min(kShown, tools.differences.size()); ++i) print(tools.differences[i]);
  if (tools.differences.size() > kShown)
    fmt::print("  and {} more: --json has them all\n", tools.differences.size() - kShown);
  if (rebuilt.other_hash > 0)
    fmt::print(
        "{} versions came out with another hash than recorded, the first of them {}: an altered store, or "
        "built by other "
        "code?\n",
        rebuilt.other_hash, rebuilt.first_other);
  if (episodes.pruned > 0)
    fmt::print("{} episodes were left out: their tokens are not kept any more\n", episodes.pruned);
  if (orphans > 0)
    fmt::print("the tools of {} branches were not run: what their parents heard is not kept any more\n",
               orphans);
}

int replay(Options o) {
  RunArgument& run_argument = o.again.run;
  // `replay --latest 17 18`: the positionals are episodes.
  if (run_argument.latest && !run_argument.run.empty())
    o.episodes.insert(o.episodes.begin(), std::exchange(run_argument.run, ""));
  if (o.all == !o.episodes.empty())
    throw_input("replay: {}",
                o.all ? "give episodes or --all, not both"
                      : "which episodes? their numbers, as perigee rollouts lists them, or --all");
  if (o.tools != "again" && o.tools != "recorded")
    throw_input("--tools {}: again or recorded is expected", quote(o.tools));
  PastRun run(o.again);
  PastRun::Episodes episodes;
  if (o.all) {
    episodes = run.episodes();
    refuse_nothing_to_check("replay", run, episodes);
  } else {
    std::set<int64_t> ids;
    for (const std::string& text : o.episodes) ids.insert(parse_episode(text));
    episodes.ids.assign(ids.begin(), ids.end());
  }
  rollout::Replayer replayer(run.ctx, run.model, run.config.engine, run.tasks.stop_tokens(),
                             run.tasks.environment() != nullptr);
  for (const int64_t id : episodes.ids) {
    const EpisodeRecord e = run.store().episode(id);
    if (!e.pruned.empty()) throw_input("episode {}: its tokens are not kept any more: {}", id, e.pruned);
    for (rollout::Attempt& a : rollout::attempts_of(e)) replayer.add(std::move(a));
  }
  int64_t orphans = 0;
  const rollout::ToolTally tools = replay_tools(run, episodes.ids, o.tools == "again", orphans);
  rollout::Rebuilt rebuilt;
  if (!replayer.empty())
    rebuilt = run.rebuild(
        replayer.first_version(), replayer.last_version(),
        [&](uint32_t version, const std::byte* weights) { replayer.visit(version, weights); },
        [&] {
          return fmt::format("{} tokens, {} differences", replayer.tally().tokens,
                             replayer.tally().differences.size());
        });
  const rollout::ReplayTally& t = replayer.tally();
  const bool good = t.differences.empty() && tools.differences.empty() && rebuilt.other_hash == 0;
  if (!o.again.json) {
    print_summary(t, tools, rebuilt, episodes, orphans, *run.tokenizer);
    return good ? 0 : 1;
  }
  nlohmann::json differences = nlohmann::json::array();
  for (const Difference& d : t.differences) differences.push_back(to_json(d, *run.tokenizer));
  for (const ToolDifference& d : tools.differences) differences.push_back(to_json(d));
  print_json({{"run", run.place.id},
              {"episodes", episodes.ids.size()},
              {"pruned", episodes.pruned},
              {"attempts", t.attempts},
              {"tokens", t.tokens},
              {"tools", tools.calls},
              {"tools_run", tools.run},
              {"tools_mode", o.tools},
              {"tools_left_out", orphans},
              {"versions", rebuilt.versions},
              {"versions_with_other_hash", rebuilt.other_hash},
              {"damaged_checkpoints", rebuilt.damaged.size()},
              {"differences", std::move(differences)},
              {"identical", good}});
  return good ? 0 : 1;
}

}  // namespace

void add_replay(Program& program) {
  auto o = std::make_shared<Options>();
  Command command =
      program.command("replay", "Generate episodes again and compare them bit for bit", kGroupLook);
  declare_run(command, o->again.run);
  command.positionals("EPISODE", o->episodes, "their numbers, as perigee rollouts lists them")
      .flag("--all", o->all, "every episode of the run")
      .option("--tools", o->tools, "MODE", "again: run them and compare; recorded: only feed what is stored");
  declare_again(command, o->again);
  command.example("replay runs/quickstart 17 18")
      .example("replay --latest --all")
      .example("replay runs/tool-use 99 --tools recorded");
  command.action([o] { return replay(*o); });
}

}  // namespace perigee::apps
