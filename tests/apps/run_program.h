// Runs the perigee program as a user does and keeps what it said.
#pragma once
#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <vector>

#include "tests/base/temp_directory.h"

namespace perigee {

inline std::string slurp(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  std::stringstream text;
  text << in.rdbuf();
  return text.str();
}

inline void spill(const std::string& path, const std::string& bytes) {
  std::ofstream out(path, std::ios::binary);
  out << bytes;
  ASSERT_TRUE(out.good()) << path;
}

struct Said {
  int code = -1;  // exit code; 1000 + signal when a signal ended it
  std::string out, err;
  nlohmann::json json() const { return nlohmann::json::parse(out, nullptr, false); }
};

struct RunOptions {
  std::string directory;                 // working directory; empty: here
  std::vector<std::string> environment;  // "NAME=value", added
  rlim_t max_file_bytes = RLIM_INFINITY;
  std::string program = PERIGEE_PROGRAM;
};

inline Said run_perigee(const std::vector<std::string>& args, const RunOptions& options = {}) {
  TempDirectory place;
  const std::string out = place / "out", err = place / "err";
  const pid_t pid = fork();
  if (pid == 0) {
    const auto redirect = [](const std::string& path, int to) {
      const int fd = open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
      dup2(fd, to);
    };
    redirect(out, STDOUT_FILENO);
    redirect(err, STDERR_FILENO);
    if (!options.directory.empty() && chdir(options.directory.c_str()) != 0) _exit(126);
    for (const std::string& e : options.environment) putenv(const_cast<char*>(e.c_str()));
    if (options.max_file_bytes != RLIM_INFINITY) {
      const rlimit limit{options.max_file_bytes, options.max_file_bytes};
      setrlimit(RLIMIT_FSIZE, &limit);
      signal(SIGXFSZ, SIG_IGN);  // writing beyond fails instead, as on a full disk
    }
    std::vector<char*> argv{const_cast<char*>(options.program.c_str())};
    for (const std::string& a : args) argv.push_back(const_cast<char*>(a.c_str()));
    argv.push_back(nullptr);
    execv(options.program.c_str(), argv.data());
    _exit(127);
  }
  int status = 0;
  waitpid(pid, &status, 0);
  Said said;
  said.code = WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
  said.out = slurp(out);
  said.err = slurp(err);
  return said;
}

// Bad input: exit code 2, nothing on standard output, one line on standard error that holds `needle`.
inline void expect_refused(const std::vector<std::string>& args, const std::string& needle,
                           const RunOptions& options = {}) {
  const Said said = run_perigee(args, options);
  std::string command;
  for (const std::string& a : args) command += " " + a;
  EXPECT_EQ(said.code, 2) << command << "\n" << said.err;
  EXPECT_EQ(said.out, "") << command;
  EXPECT_EQ(said.err.rfind("perigee: error: ", 0), 0u) << command << "\n" << said.err;
  EXPECT_EQ(std::count(said.err.begin(), said.err.end(), '\n'), 1) << command << "\n" << said.err;
  EXPECT_NE(said.err.find(needle), std::string::npos)
      << command << "\nwanted: " << needle << "\nsaid: " << said.err;
}

inline std::string golden(const std::string& name) {
  return std::string(PERIGEE_SOURCE_DIR) + "/tests/golden/" + name;
}

// A run that takes a second or two: the architecture of the tiny golden case, fresh weights.
inline nlohmann::json small_run(const std::string& directory) {
  return {
      {"run", {{"name", "small"}, {"dir", directory}, {"seed", 3}}},
      {"model", {{"config", golden("tiny/config.json")}}},
      {"tasks", {{"kind", "arithmetic"}, {"min_digits", 1}, {"max_digits", 1}}},
      // The pattern gives an untrained policy rewards that differ, so that steps change the weights.
      {"reward",
       {{{"verifier", "numeric"}},
        {{"verifier", "regex"}, {"pattern", "[a-m]"}, {"accept_truncated", true}, {"weight", 0.5}}}},
      {"warmup", {{"steps", 2}, {"batch", 4}, {"eval_every", 2}}},
      {"rollout", {{"groups_per_step", 2}, {"group_size", 4}, {"max_new_tokens", 12}, {"segment_tokens", 5}}},
      {"learn", {{"steps", 2}}},
      {"eval", {{"every", 2}, {"tasks", 6}}},
      {"checkpoint", {{"every", 1}, {"keep", 1}}},
      {"workers", {{"threads", 1}}}};
}

}  // namespace perigee
