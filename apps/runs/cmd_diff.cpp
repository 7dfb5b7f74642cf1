// perigee diff: two episodes side by side, or two runs: what is not the same, and where it begins.
#include "apps/command_line/commands.h"
#include "apps/runs/diff.h"
#include "base/error.h"

namespace perigee::apps {
namespace {

struct Options {
  std::vector<std::string> names;
  bool json = false;
};

int diff(const Options& o) {
  const auto& n = o.names;
  if (n.size() == 2) return diff_runs(n[0], n[1], o.json);
  if (n.size() == 3) return diff_episodes({n[0], n[1]}, {n[0], n[2]}, o.json);
  if (n.size() == 4) return diff_episodes({n[0], n[1]}, {n[2], n[3]}, o.json);
  throw_input(
      "diff: two runs (RUN RUN), two episodes of one run (RUN EPISODE EPISODE), or of two (RUN EPISODE RUN "
      "EPISODE)");
}

}  // namespace

void add_diff(Program& program) {
  auto o = std::make_shared<Options>();
  Command command = program.command("diff", "Two episodes or two runs: where they part", kGroupLook);
  command.positionals("WHAT", o->names, "RUN RUN, RUN EPISODE EPISODE, or RUN EPISODE RUN EPISODE")
      .flag("--json", o->json, "print one JSON object")
      .example("diff runs/quickstart runs/quickstart-lr2")
      .example("diff runs/quickstart 17 18")
      .example("diff runs/a 17 runs/b 17");
  command.action([o] { return diff(*o); });
}

}  // namespace perigee::apps
