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
  bool one_of_several = false;  // named as DIRECTORY/ID
  std::filesystem::path store() const { return directory / kStoreFile; }
  // What names it on the command line.
  std::filesystem::path name() const { return one_of_several ? directory / id : directory; }
};

// The positional RUN and --latest of a command.
struct RunArgument {
  std::string run;
  bool latest = false;
};
void declare_run(Command& command, RunArgument& argument);

// A directory with a store is the newest run in it; DIRECTORY/ID is one of several (docs/store.md).
// ERRORS (input): neither or both given; no such run (with the nearest); a file; nothing under runs/.
RunPlace find_run(const RunArgument& argument);
// The directory of a run to go on with. Besides what find_run finds, one that holds the run's configuration but no run
// in its store yet: it was killed as it started. ERRORS (input): as find_run.
std::filesystem::path find_resumable(const RunArgument& argument);

// ERRORS (input): not the number of an episode.
int64_t parse_episode(const std::string& text);

// Some process holds the lock of the store in this directory: its run goes on. Asked of the kernel's list of locks: trying the
// lock would keep out a run that starts in that instant. True where there is no such list.
bool being_written(const std::filesystem::path& directory);

// The runs of the stores in directories under `root`, newest first; unreadable ones come last, with a reason in `problem`.
struct ListedRun {
  std::filesystem::path directory;
  RunRecord record;
  std::string problem;
  bool one_of_several = false;  // the store holds others too
  // What names it on the command line.
  std::filesystem::path name() const { return one_of_several ? directory / record.id : directory; }
};
std::vector<ListedRun> list_runs(const std::filesystem::path& root = kRunsDirectory);

}  // namespace perigee::apps
