// perigee train, perigee resume: a training run from its configuration to its end.
#include <fmt/format.h>

#include "apps/command_line/commands.h"
#include "apps/command_line/commit.h"
#include "apps/command_line/run_argument.h"
#include "apps/command_line/shipped.h"
#include "apps/output/output.h"
#include "apps/runs/run_metrics.h"
#include "base/error.h"
#include "rollout/run/run.h"

namespace perigee::apps {
namespace {

struct Options {
  std::string config;
  RunArgument run;
  std::vector<std::string> sets;
  bool in_process = false, json = false, quiet = false;

  rollout::TrainOptions train() const {
    rollout::TrainOptions t;
    t.in_process = in_process;
    t.quiet = quiet;
    t.code_version = kCommit;
    if (json) t.out = stderr;  // standard output is for the result
    return t;
  }
};

void declare_common(Command& command, Options& o) {
  command.flag("--in-process", o.in_process, "roles as threads of this process, for debugging")
      .flag("--quiet", o.quiet, "no progress")
      .flag("--json", o.json, "print the result as one JSON object; progress goes to standard error");
}

constexpr int kStopped = 130;  // as a shell says of a program that Ctrl-C ended

// As short as it can be typed from here.
std::string from_here(const std::string& path) {
  std::error_code error;
  const std::filesystem::path relative = std::filesystem::relative(path, error);
  return error || relative.empty() || *relative.begin() == ".." ? path : relative.string();
}

RunProgress progress_of(const rollout::RunOutcome& r) {
  StoreReader store(std::filesystem::path(r.run_dir) / kStoreFile);
  return run_progress(store, r.run_id);
}

// "after step 12": how far a stopped run came.
std::string how_far(const rollout::RunOutcome& r) {
  const RunProgress p = progress_of(r);
  if (p.step == 0) return "before its first step";
  return fmt::format("after {}step {}", p.phase == "warmup" ? "warm-up " : "", p.step);
}

int report(rollout::RunOutcome r, bool json) {
  if (!json) r.run_dir = from_here(r.run_dir);
  const std::string typed = shell_word(r.run_dir);
  if (json) {
    nlohmann::json out = {{"run", r.run_id},
                          {"directory", r.run_dir},
                          {"state", r.state},
                          {"steps", r.steps},
                          {"version", r.version},
                          {"weights_hash", r.weights_hash},
                          {"accuracy_after_warmup", nullptr},
                          {"accuracy", nullptr},
                          {"restarts", r.restarts}};
    if (r.accuracy_before >= 0) out["accuracy_after_warmup"] = r.accuracy_before;
    if (r.accuracy_after >= 0) out["accuracy"] = r.accuracy_after;
    if (!r.failure.empty()) out["failure"] = r.failure;
    // "steps" are those of reinforcement learning: a run may have been stopped before it.
    const RunProgress p = progress_of(r);
    out["phase"] = p.phase;
    out["phase_step"] = p.step;
    print_json(out);
  }
  if (r.state == "failed") throw_environment("{} (mend it and go on: perigee resume {})", r.failure, typed);
  if (r.state == "stopped") {
    if (!json) fmt::print("stopped {}; go on with: perigee resume {}\n", how_far(r), typed);
    return kStopped;
  }
  if (r.state != "finished")
    throw_environment(
        "the run ended without a result; what its roles said is in {}/logs. Go on: perigee resume {}",
        r.run_dir, typed);
  if (json) return 0;
  fmt::print("\n");
  const rollout::RunConfig config = rollout::run_config_of(r.run_dir);
  if (r.accuracy_before >= 0)
    fmt::print("held-out accuracy {}  {:5.1f} %\n",
               config.warmup.steps > 0 ? "after the warm-up             " : "before reinforcement learning ",
               100 * r.accuracy_before);
  if (r.accuracy_after >= 0)
    fmt::print("held-out accuracy after reinforcement learning    {:5.1f} %\n", 100 * r.accuracy_after);
  fmt::print("weights                                           version {}, hash {}\n", r.version,
             r.weights_hash);
  if (config.learn.steps > 0)
    fmt::print("rollouts                                          {}\n",
               (std::filesystem::path(r.run_dir) / kStoreFile).string());
  fmt::print("\nNext:\n");
  if (config.learn.steps > 0)
    fmt::print(
        "  perigee rollouts {0} --sort reward     what it wrote, worst first\n"
        "  perigee verify {0}                     sampler against learner, token by token\n",
        typed);
  fmt::print("  perigee eval {0}                       the newest checkpoint on held-out tasks\n", typed);
  return 0;
}

}  // namespace

void add_train(Program& program) {
  auto o = std::make_shared<Options>();
  Command command = program.command("train", "Start a training run", kGroupRun);
  command.positional("CONFIG", o->config, "the run's configuration (docs/configuration.md)")
      .list("--set", o->sets, "KEY=VALUE", "overrides a key of the configuration; may be repeated");
  declare_common(command, *o);
  command.example("train configs/quickstart.json")
      .example("train configs/quickstart.json --set run.seed=2 --set run.dir=runs/second");
  command.action([o] {
    return report(rollout::train(rollout::load_run_config(shipped(o->config), o->sets), o->train()), o->json);
  });
}

void add_resume(Program& program) {
  auto o = std::make_shared<Options>();
  Command command = program.command("resume", "Go on with a run that was stopped or killed", kGroupRun);
  declare_run(command, o->run);
  declare_common(command, *o);
  command.example("resume --latest").example("resume runs/second");
  command.action(
      [o] { return report(rollout::resume(find_resumable(o->run).string(), o->train()), o->json); });
}

}  // namespace perigee::apps
