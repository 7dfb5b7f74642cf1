// Does what a plan says: each run as a process of this program, some at a time, resumed where it stopped.
//
// In the directory OUT: configs/ID.json, what each run was started from; runs/ID/, an ordinary run; logs/ID.log, what its
// process said; evaluations/ID/N.json, what `perigee eval` said of its newest weights at the N-th point of an accuracy by
// length. All of them appear whole or not at all, so that a kill at any moment loses no more than the steps since a checkpoint.
#pragma once
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "apps/compare/plan.h"

namespace perigee::apps::compare {

struct RunsOptions {
  std::filesystem::path out;
  int64_t jobs = 2;     // processes at a time
  std::string program;  // empty: this one
  bool quiet = false;
};

struct RunsEnd {
  bool stopped = false;               // by SIGINT or SIGTERM
  std::vector<std::string> failures;  // one line each
};

std::filesystem::path run_directory(const std::filesystem::path& out, const PlannedRun& run);
std::filesystem::path evaluation_file(const std::filesystem::path& out, const PlannedRun& run, size_t point);

// What `perigee eval` said of this point as it is asked now; nullopt: not asked yet, or something else.
std::optional<nlohmann::json> evaluation_said(const Plan& plan, const std::filesystem::path& out,
                                              const PlannedRun& run, size_t point);

// Holds OUT for one process.
class OutLock {
 public:
  // ERRORS (input): another process has it.
  explicit OutLock(const std::filesystem::path& out);
  ~OutLock();
  OutLock(const OutLock&) = delete;
  OutLock& operator=(const OutLock&) = delete;

 private:
  int fd_ = -1;
};

// ERRORS (input): a run in OUT that was made from another configuration, by name and key; OUT holds files of something else.
void check_out(const Plan& plan, const std::filesystem::path& out);

// Runs what is not finished, then evaluates what has points and no result. Progress goes to standard error.
RunsEnd do_runs(const Plan& plan, const RunsOptions& options);

}  // namespace perigee::apps::compare
