// Child processes: started from an argument list (no shell), dying with their parent, reaped.
#pragma once
#include <sys/types.h>

#include <optional>
#include <string>
#include <vector>

namespace perigee {

// How a process ended.
struct ProcessEnd {
  int exit_code = 0;  // when signal is 0
  int signal = 0;
  std::string text() const;  // "exit code 1", "killed by signal 9 (Killed)"
};

// A child. Destroying a Child that runs kills it (SIGKILL) and waits for it.
class Child {
 public:
  Child() = default;
  ~Child();
  Child(Child&& other) noexcept;
  Child& operator=(Child&& other) noexcept;

  // Starts program (a path) with these arguments (argv[1..]). The child gets SIGKILL when the calling *thread* ends, so
  // start children from a thread that lives as long as they should. Standard input is /dev/null; output is inherited,
  // or appended to output_file. own_group: Ctrl-C in a terminal does not reach it, the caller passes signals on. Throws
  // Error(kEnvironment) when it cannot be started.
  static Child start(const std::string& program, const std::vector<std::string>& arguments,
                     const std::string& output_file = {}, bool own_group = false);

  // How it ended, or nullopt while it runs. Once it has ended, keeps giving the same answer.
  std::optional<ProcessEnd> poll();
  // Waits up to timeout_ms for it to end.
  std::optional<ProcessEnd> wait(int timeout_ms);
  void signal(int number);

  pid_t pid() const { return pid_; }
  bool started() const { return pid_ > 0; }

 private:
  pid_t pid_ = -1;
  std::optional<ProcessEnd> end_;
};

// Path of the running program.
std::string current_program();

}  // namespace perigee
