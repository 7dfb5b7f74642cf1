// perigee verify RUN: the log-probability of every token that the run sampled, computed again with the
// learner's forward pass under the version that made it.
#include <fmt/format.h>

#include <cmath>
#include <cstring>

#include "apps/command_line/commands.h"
#include "apps/output/output.h"
#include "apps/replay/past_run.h"
#include "apps/runs/episode_json.h"
#include "base/error.h"
#include "rollout/replay/verify.h"

namespace perigee::apps {
namespace {

struct Options {
  AgainOptions again;
  std::optional<int64_t> episode;
  bool tokens = false;
};

// A list for each number, which a long episode keeps small.
nlohmann::json lists(const std::vector<rollout::VerifiedToken>& tokens) {
  nlohmann::json out = {{"position", nlohmann::json::array()}, {"id", nlohmann::json::array()},
                        {"version", nlohmann::json::array()},  {"stored", nlohmann::json::array()},
                        {"again", nlohmann::json::array()},    {"entropy", nlohmann::json::array()}};
  for (const rollout::VerifiedToken& t : tokens) {
    out["position"].push_back(t.position);
    out["id"].push_back(t.id);
    out["version"].push_back(t.version);
    out["stored"].push_back(t.then);
    out["again"].push_back(t.again);
    out["entropy"].push_back(t.entropy);
  }
  return out;
}

void print_tokens(const PastRun& run, const std::vector<rollout::VerifiedToken>& tokens) {
  Table table({"position", "token", "version", "log-prob", "again", "entropy", ""}, {0, 2, 3, 4, 5});
  for (const rollout::VerifiedToken& t : tokens)
    table.row({std::to_string(t.position), printable_line(token_text(*run.tokenizer, t.id)),
               std::to_string(t.version), fmt::format("{:.6f}", t.then), fmt::format("{:.6f}", t.again),
               fmt::format("{:.4f}", t.entropy),
               std::memcmp(&t.then, &t.again, sizeof t.then) == 0 ? "" : "differs"});
  table.print();
}

int verify(const Options& o) {
  if (o.tokens && !o.episode) throw_input("verify: --tokens goes with --episode: a run has too many");
  PastRun run(o.again);
  rollout::Verifier verifier(run.ctx, run.model, o.tokens);
  PastRun::Episodes episodes;
  if (o.episode)
    episodes.ids.push_back(*o.episode);
  else
    episodes = run.episodes();
  if (!o.episode) refuse_nothing_to_check("verify", run, episodes);
  int64_t unordered = 0, spanning = 0;
  for (const int64_t id : episodes.ids) {
    for (rollout::Attempt& a : rollout::attempts_of(run.store().episode(id))) {
      if (!a.ascending()) {
        ++unordered;
        continue;
      }
      if (!a.one_version()) ++spanning;
      verifier.add(std::move(a));
    }
  }
  rollout::Rebuilt rebuilt;
  if (!verifier.empty())
    rebuilt = run.rebuild(
        verifier.first_version(), verifier.last_version(),
        [&](uint32_t version, const std::byte* weights) { verifier.visit(version, weights); },
        [&] { return fmt::format("{} tokens", verifier.tally().tokens); });
  const rollout::VerifyTally& t = verifier.tally();
  const bool good = t.differ == 0 && unordered == 0 && rebuilt.other_hash == 0;
  if (o.again.json) {
    nlohmann::json out = {{"run", run.place.id},
                          {"episodes", episodes.ids.size()},
                          {"pruned", episodes.pruned},
                          {"tokens", t.tokens},
                          {"differ", t.differ},
                          {"versions", rebuilt.versions},
                          {"versions_with_other_hash", rebuilt.other_hash},
                          {"damaged_checkpoints", rebuilt.damaged.size()},
                          {"attempts_over_several_versions", spanning},
                          {"unordered_attempts", unordered},
                          {"exact", good}};
    out["largest_difference"] =
        std::isfinite(t.largest) ? nlohmann::json(t.largest) : nlohmann::json("infinity");
    if (o.tokens) out["tokens_of_episode"] = lists(verifier.tokens());
    if (t.differ > 0) out["worst"] = {{"episode", t.worst_episode}, {"position", t.worst_position}};
    print_json(out);
    return good ? 0 : 1;
  }
  if (o.tokens) print_tokens(run, verifier.tokens());
  fmt::print("{} tokens of {} episodes computed again under {} policy versions\n", t.tokens,
             episodes.ids.size(), rebuilt.versions);
  fmt::print("tokens that differ    {}\nlargest difference    {:g}\n", t.differ, t.largest);
  if (t.differ > 0)
    fmt::print("the worst             episode {}, position {}: perigee show {} {} --tokens\n",
               t.worst_episode, t.worst_position, run.directory(), t.worst_episode);
  if (rebuilt.other_hash > 0)
    fmt::print(
        "{} versions came out with another hash than recorded, the first of them {}: built by other code?\n",
        rebuilt.other_hash, rebuilt.first_other);
  if (unordered > 0)
    fmt::print("{} attempts go back to an older version, which the run's rules exclude\n", unordered);
  if (episodes.pruned > 0)
    fmt::print("{} episodes were left out: their tokens are not kept any more\n", episodes.pruned);
  return good ? 0 : 1;
}

}  // namespace

void add_verify(Program& program) {
  auto o = std::make_shared<Options>();
  Command command =
      program.command("verify", "Compare the sampler with the learner, token by token", kGroupLook);
  declare_run(command, o->again.run);
  command.option("--episode", o->episode, "N", "only this one")
      .flag("--tokens", o->tokens,
            "of this episode, every token with both log-probabilities and the policy's entropy there");
  declare_again(command, o->again);
  command.example("verify --latest").example("verify runs/quickstart --episode 17 --tokens");
  command.action([o] { return verify(*o); });
}

}  // namespace perigee::apps
