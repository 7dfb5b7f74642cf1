// perigee inspect RUN...: a page that shows runs, on loopback.
#include <fmt/format.h>
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <thread>

#include "apps/command_line/commands.h"
#include "apps/command_line/run_argument.h"
#include "apps/inspect/server.h"
#include "base/error.h"
#include "base/process.h"
#include "base/text.h"

namespace perigee::apps {
namespace {

struct Options {
  std::vector<std::string> runs;
  bool latest = false;
  int64_t port = 0;
  std::string open = "auto";
};

std::atomic<int> g_signal{0};
void on_signal(int) {
  if (g_signal.exchange(1) != 0) _exit(130);
}

// A browser comes up where somebody sits before a screen; elsewhere the address is what is wanted.
bool should_open(const std::string& open) {
  const bool screen = std::getenv("DISPLAY") != nullptr || std::getenv("WAYLAND_DISPLAY") != nullptr;
  return open == "yes" || (open == "auto" && screen && isatty(STDOUT_FILENO) != 0);
}

int show_page(const Options& o) {
  if (o.port < 0 || o.port > 65535) throw_input("--port {}: 0 to 65535 is expected", o.port);
  if (o.open != "auto" && o.open != "yes" && o.open != "no")
    throw_input("--open {}: auto, yes or no is expected", quote(o.open));
  std::vector<RunPlace> places;
  for (const std::string& run : o.runs) places.push_back(find_run({.run = run}));
  if (o.latest) places.push_back(find_run({.latest = true}));
  for (const RunPlace& place : places)
    StoreReader(place.store()).run(place.id);  // refused here rather than in the page
  if (places.empty() && !std::filesystem::is_directory(kRunsDirectory))
    throw_input("no run under ./{}; start one: perigee train configs/quickstart.json", kRunsDirectory);
  inspect::RunSet runs =
      places.empty() ? inspect::RunSet(std::filesystem::path(kRunsDirectory)) : inspect::RunSet(places);
  inspect::InspectServer server(runs, {.port = static_cast<uint16_t>(o.port), .program = current_program()});

  struct sigaction action {};
  action.sa_handler = on_signal;
  sigemptyset(&action.sa_mask);
  ::sigaction(SIGINT, &action, nullptr);
  ::sigaction(SIGTERM, &action, nullptr);
  fmt::print("{}\n", server.address());
  std::fflush(stdout);
  if (isatty(STDERR_FILENO) != 0) fmt::print(stderr, "open it in a browser; Ctrl-C ends it\n");
  Child browser;
  if (should_open(o.open)) {
    try {
      browser = Child::start("/usr/bin/xdg-open", {server.address()}, "/dev/null");
    } catch (const Error& e) {
      fmt::print(stderr, "perigee: warning: no browser was opened: {}\n", e.what());
    }
  }
  while (g_signal == 0) std::this_thread::sleep_for(std::chrono::milliseconds(50));
  return 0;
}

}  // namespace

void add_inspect(Program& program) {
  auto o = std::make_shared<Options>();
  Command command = program.command("inspect", "Look at runs and rollouts in a browser", kGroupLook);
  command
      .positionals("RUN", o->runs,
                   "runs' directories, or their ids under runs/; several are overlaid; none: all under runs/")
      .flag("--latest", o->latest, "the newest run under runs/")
      .option("--port", o->port, "N", "0: any free one")
      .option("--open", o->open, "WHEN", "open a browser: auto (when there is a screen), yes or no")
      .example("inspect runs/quickstart")
      .example("inspect runs/a runs/b --port 8700");
  command.action([o] { return show_page(*o); });
}

}  // namespace perigee::apps
