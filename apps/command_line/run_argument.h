// How a run is named on the command line: a path, an id, or --latest.
#pragma once
#include <filesystem>
#include <string>
#include <vector>

#include "apps/command_line/command.h"
#include "storage/records.h"
#include "storage/store.h"

namespace perigee::apps {

// Where runs live unless run.dir says otherwise.
inline constexpr char kRunsDirectory[] = "runs";
inline constexpr char kStoreFile[] = "store.sqlite";
inline constexpr char kConfigFile[] = "config.json";

struct RunPlace {
  std::filesystem::path directory;
  std::string id;  // of the run in the store there
  std::filesystem::path store() const { return directory / kStoreFile; }
};

// The positional RUN and --latest of a command.
struct RunArgument {
  std::string run;
  bool latest = false;
};
void declare_run(Command& command, RunArgument& argument);

// ERRORS (input): neither or both given; no such run (with the nearest); nothing under runs/.
RunPlace find_run(const RunArgument& argument);
// The directory of a run to go on with. Besides what find_run finds, one that holds the run's configuration but no run
// in its store yet: it was killed as it started. ERRORS (input): as find_run.
std::filesystem::path find_resumable(const RunArgument& argument);

// ERRORS (input): not the number of an episode.
int64_t parse_episode(const std::string& text);

// Directories under `root` that hold a store, newest run first; unreadable ones come last, with a reason in
// `problem`.
struct ListedRun {
  std::filesystem::path directory;
  RunRecord record;
  std::string problem;
};
std::vector<ListedRun> list_runs(const std::filesystem::path& root = kRunsDirectory);

}  // namespace perigee::apps
