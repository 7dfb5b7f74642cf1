// perigee config: what a configuration comes to, and the page that documents all keys.
#include <fmt/format.h>

#include <algorithm>
#include <string>

#include "apps/command_line/commands.h"
#include "apps/command_line/environment_variables.h"
#include "apps/command_line/shipped.h"
#include "apps/output/output.h"
#include "base/error.h"
#include "policy/model/config.h"
#include "rollout/setup/run_config.h"

namespace perigee::apps {
namespace {

// The sections of all keys; the heading and the variables stand on the page once.
std::string key_tables() {
  std::string text = rollout::run_config_markdown();
  text.erase(0, std::min(text.size(), text.find("## ")));
  if (const size_t end = text.find("\n## Environment variables"); end != text.npos) text.resize(end);
  return text;
}

// docs/configuration.md is this text; a test compares them.
void print_page() {
  fmt::print(
      "# Configuration\n\n"
      "A run is configured by one JSON file (comments are allowed). Every key has a default but for the "
      "model, the tasks\n"
      "and the rewards; an unknown key is refused with the nearest known one. `--set key=value` overrides a "
      "key on the\n"
      "command line, and `tasks.max_digits=3` or `reward.0.weight=2` what is inside of a key of type JSON;\n"
      "`perigee config FILE` prints the whole configuration with defaults filled in.\n\n"
      "The paths `model.path`, `model.config`, `tokenizer.path`, `tasks.path` and `tasks.held_out_path` count from here, or, "
      "where nothing\n"
      "is there, from the directory of the file; `run.dir` from here.\n\n"
      "This page is printed by `perigee config --markdown`: change the declaration in "
      "rollout/setup/run_config.cpp, not the page.\n\n"
      "{}\n"
      "## Environment variables\n\n"
      "A variable that starts with `PERIGEE_` and is not in this table is refused.\n\n"
      "| variable | meaning |\n|---|---|\n",
      key_tables());
  for (const EnvironmentVariable& v : environment_table()) fmt::print("| `{}` | {} |\n", v.name, v.meaning);
}

}  // namespace

void add_config(Program& program) {
  struct Options {
    std::string config;
    std::vector<std::string> sets;
    bool markdown = false;
  };
  auto o = std::make_shared<Options>();
  Command command =
      program.command("config", "Check a configuration and print it with its defaults, as JSON", kGroupRun);
  command.positional("CONFIG", o->config, "the run's configuration", false)
      .list("--set", o->sets, "KEY=VALUE", "overrides a key of the configuration; may be repeated")
      .flag("--markdown", o->markdown, "print the documentation of all keys instead")
      .example("config configs/quickstart.json --set learn.lr=3e-4")
      .example("config --markdown > docs/configuration.md");
  command.action([o] {
    if (o->markdown != o->config.empty())
      throw_input("config: give a configuration, or --markdown for the page of all keys");
    if (o->markdown) {
      print_page();
      return 0;
    }
    const rollout::RunConfig config = rollout::load_run_config(shipped(o->config), o->sets);
    if (config.model.config.is_object()) policy::parse_model_config(config.model.config, shipped(o->config) + ": model.config");
    print_json(config.effective);
    return 0;
  });
}

}  // namespace perigee::apps
