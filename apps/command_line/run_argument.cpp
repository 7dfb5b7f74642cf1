#include "apps/command_line/run_argument.h"

#include <sys/stat.h>

#include <algorithm>
#include <charconv>
#include <fstream>
#include <optional>
#include <sstream>
#include <system_error>

#include "base/error.h"
#include "base/text.h"

namespace perigee::apps {
namespace fs = std::filesystem;
namespace {

// The newest run of the store in this directory.
RunRecord record_in(const fs::path& directory) {
  StoreReader store(directory / kStoreFile);
  const std::vector<RunRecord> runs = store.runs();
  if (runs.empty())
    throw_input("{}: the store holds no run; was `perigee train` stopped as it started?", directory.string());
  return runs.back();
}

// Where a run that was named so may live.
std::vector<fs::path> places(const fs::path& given) {
  return {given, given.filename() == kStoreFile ? given.parent_path() : given,
          fs::path(kRunsDirectory) / given};
}

bool holds_store(const fs::path& directory) {
  std::error_code ignored;
  return fs::exists(directory / kStoreFile, ignored);
}

// DIRECTORY/ID where the store in the directory holds a run of this id.
std::optional<RunPlace> one_of_several(const fs::path& given) {
  const fs::path directory = given.parent_path().empty() ? "." : given.parent_path();
  if (!holds_store(directory)) return {};
  StoreReader store(directory / kStoreFile);
  for (const RunRecord& run : store.runs())
    if (run.id == given.filename()) return RunPlace{directory, run.id, true};
  return {};
}

}  // namespace

void declare_run(Command& command, RunArgument& argument) {
  command.positional("RUN", argument.run, "a run's directory, or its id under runs/", false)
      .flag("--latest", argument.latest, "the newest run under runs/, instead of RUN");
}

bool being_written(const fs::path& directory) {
  struct stat file {};
  if (::stat((directory / kStoreFile).concat(".lock").c_str(), &file) != 0) return false;
  std::ifstream locks("/proc/locks");
  if (!locks) return true;
  const std::string inode = ":" + std::to_string(file.st_ino);
  for (std::string line; std::getline(locks, line);) {
    std::istringstream words(line);
    std::string number, kind, advisory, mode, pid, place_of_file;
    words >> number >> kind >> advisory >> mode >> pid >> place_of_file;
    if (kind == "FLOCK" && mode == "WRITE" && place_of_file.ends_with(inode)) return true;
  }
  return false;
}

std::vector<ListedRun> list_runs(const fs::path& root) {
  std::vector<ListedRun> out;
  std::error_code error;
  for (fs::directory_iterator it(root, error), end; !error && it != end; it.increment(error)) {
    if (!holds_store(it->path())) continue;
    try {
      record_in(it->path());  // holds one
      StoreReader store(it->path() / kStoreFile);
      const std::vector<RunRecord> runs = store.runs();
      for (const RunRecord& run : runs) out.push_back({it->path(), run, {}, runs.size() > 1});
    } catch (const Error& e) {
      out.push_back({it->path(), {}, e.what()});
    }
  }
  std::sort(out.begin(), out.end(), [](const ListedRun& a, const ListedRun& b) {
    if (a.record.created_us != b.record.created_us) return a.record.created_us > b.record.created_us;
    return a.directory < b.directory;
  });
  return out;
}

RunPlace find_run(const RunArgument& argument) {
  if (argument.latest && !argument.run.empty()) throw_input("name a run or say --latest, not both");
  if (argument.latest) {
    const std::vector<ListedRun> runs = list_runs();
    if (runs.empty())
      throw_input("no run under ./{}; start one: perigee train configs/quickstart.json", kRunsDirectory);
    if (!runs.front().problem.empty()) throw_environment("{}", runs.front().problem);
    return {runs.front().directory, runs.front().record.id, runs.front().one_of_several};
  }
  if (argument.run.empty())
    throw_input("which run? Give its directory or id, or --latest; perigee runs lists them");
  for (const fs::path& directory : places(argument.run))
    if (holds_store(directory)) return {directory, record_in(directory).id};
  for (const fs::path& given : {fs::path(argument.run), fs::path(kRunsDirectory) / argument.run})
    if (const auto place = one_of_several(given)) return *place;
  std::error_code ignored;
  if (fs::is_regular_file(argument.run, ignored))
    throw_input("{} is a file; a run is a directory: make one and move the store to DIRECTORY/{}",
                quote(argument.run), kStoreFile);
  std::vector<std::string> names;
  for (const ListedRun& run : list_runs()) {
    if (run.problem.empty() && run.record.id == argument.run)
      return {run.directory, run.record.id, run.one_of_several};
    names.push_back(run.directory.filename().string());
    if (run.problem.empty()) names.push_back(run.record.id);
  }
  throw_input("no run {}: neither a directory with {} nor an id under ./{}{}; perigee runs lists them",
              quote(argument.run), kStoreFile, kRunsDirectory, did_you_mean(argument.run, names));
}

fs::path find_resumable(const RunArgument& argument) {
  if (!argument.latest && !argument.run.empty()) {
    std::error_code ignored;
    // A store first: a model's directory of the same name holds a config.json too.
    for (const char* file : {kStoreFile, kConfigFile})
      for (const fs::path& directory : places(argument.run))
        if (fs::exists(directory / file, ignored) && fs::exists(directory / kConfigFile, ignored))
          return directory;
  }
  return find_run(argument).directory;
}

int64_t parse_episode(const std::string& text) {
  int64_t id = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), id);
  if (error != std::errc{} || end != text.data() + text.size() || id < 1)
    throw_input("{} is not the number of an episode; perigee rollouts lists them", quote(text));
  return id;
}

}  // namespace perigee::apps
