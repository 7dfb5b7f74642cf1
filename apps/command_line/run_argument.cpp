#include "apps/command_line/run_argument.h"

#include <algorithm>
#include <charconv>
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

}  // namespace

void declare_run(Command& command, RunArgument& argument) {
  command.positional("RUN", argument.run, "a run's directory, or its id under runs/", false)
      .flag("--latest", argument.latest, "the newest run under runs/, instead of RUN");
}

std::vector<ListedRun> list_runs(const fs::path& root) {
  std::vector<ListedRun> out;
  std::error_code error;
  for (fs::directory_iterator it(root, error), end; !error && it != end; it.increment(error)) {
    if (!holds_store(it->path())) continue;
    ListedRun run{it->path(), {}, {}};
    try {
      run.record = record_in(it->path());
    } catch (const Error& e) {
      run.problem = e.what();
    }
    out.push_back(std::move(run));
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
    return {runs.front().directory, runs.front().record.id};
  }
  if (argument.run.empty())
    throw_input("which run? Give its directory or id, or --latest; perigee runs lists them");
  for (const fs::path& directory : places(argument.run))
    if (holds_store(directory)) return {directory, record_in(directory).id};
  std::vector<std::string> names;
  for (const ListedRun& run : list_runs()) {
    if (run.problem.empty() && run.record.id == argument.run) return {run.directory, run.record.id};
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
