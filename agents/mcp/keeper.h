// A child that does not outlive its owner, with all of its descendants.
//
// Between the owner and the child stands a keeper, a process that does nothing but wait: on the end of a pipe that the
// owner alone holds (closed by the kernel however the owner dies), and on the child. When either ends it kills the
// child's process group and whatever else descends from it, daemons included: as their subreaper it inherits them. Should
// the keeper die, the child gets SIGKILL.
#pragma once
#include <sys/types.h>

#include <string>
#include <utility>
#include <vector>

namespace perigee::agents {

class KeptChild {
 public:
  // argv[0]: a path, or a name to look for in PATH. environment: all of it. directory: "" for the owner's.
  // Throws Error(kEnvironment) when it cannot be started.
  KeptChild(const std::vector<std::string>& argv,
            const std::vector<std::pair<std::string, std::string>>& environment,
            const std::string& directory);
  // Ends it: closes its input, then, after a moment, SIGTERM, then SIGKILL. Returns when nothing of it runs.
  ~KeptChild();
  KeptChild(const KeptChild&) = delete;
  KeptChild& operator=(const KeptChild&) = delete;

  // Not blocking; of the child's standard input, output and error.
  int input() const { return input_; }
  int output() const { return output_; }
  int error() const { return error_; }
  // Nothing more is written: the child reads the end of its input.
  void close_input();

 private:
  pid_t keeper_ = -1;
  int lifeline_ = -1, input_ = -1, output_ = -1, error_ = -1;
};

}  // namespace perigee::agents
