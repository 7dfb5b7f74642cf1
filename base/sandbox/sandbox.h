// Runs a program that nobody trusts: code that a policy wrote, or a tool's command.
//
// What holds for every run, also when this process is root, and when it is killed (kill -9) in the middle:
//  S1  The program is an unprivileged user inside namespaces of its own (user, process, mount, network, IPC, host name)
//      with no capability, no way to gain one, no way to make a further user namespace, and an allow-list of system
//      calls: no sockets (but socketpair), no ptrace, mount, keyring, io_uring, bpf, perf, memfd or System V IPC.
//  S2  It sees /usr read-only, an empty /tmp and /dev/shm, its own /proc, null devices and the job's folders; nothing
//      else of the machine. No descriptor but its three streams is inherited; the environment is PATH, HOME, LANG,
//      TMPDIR and what the job adds.
//  S3  It cannot write anything outside of /work, /tmp and /dev/shm, each of at most disk_bytes.
//  S4  Nothing of it is left when run() returns, and nothing of it outlives this process.
//  S5  The work folder is a copy: /work is filled from the host's folder before the start, and what changed is written
//      back after the last process of the sandbox is gone, by this process. Only regular files and directories come
//      back, owned by this process's user: no links, pipes, sockets, devices or special mode bits.
// Where the kernel does not allow it, run() refuses. Nothing ever runs outside of it.
//
// Thread safety: all of it may be called from any thread at the same time. Two jobs that write the same folder at once
// each write back the files that they changed; the last one wins, file by file.
#pragma once
#include <cstdint>
#include <filesystem>
#include <stop_token>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace perigee {

struct SandboxLimits {
  double wall_s = 10;
  double cpu_s = 10;                   // of each process; the wall clock bounds their number times
  int64_t memory_bytes = 512ll << 20;  // of all processes together, supervised; writable, of each
  int processes = 32;                  // and threads, alive at the same time
  int64_t output_bytes = 64 << 10;     // kept of each of the two output streams
  int64_t disk_bytes = 64ll << 20;     // of /work, /tmp and /dev/shm each (held in memory), and of one file
  int64_t files = 4096;                // in /work, /tmp and /dev/shm together
};

struct SandboxJob {
  std::vector<std::string> argv;  // [0]: a path in the sandbox, or a name looked up in /usr/bin
  std::string input;              // what it reads from standard input
  std::filesystem::path
      work;  // the host's folder that /work is a copy of; empty: /work starts empty and is dropped
  bool work_writable = true;  // false: nothing is written back
  // Host folder or file -> absolute path in the sandbox, mounted read-only. The sandbox's user must be able to read it.
  std::vector<std::pair<std::filesystem::path, std::string>> read_only;
  std::vector<std::pair<std::string, std::string>> environment;  // name, value
  SandboxLimits limits;
};

struct SandboxResult {
  enum Outcome : uint8_t {
    kExited,     // exit_code is the program's
    kSignalled,  // exit_code is 128 + the signal, of the program itself (a fault, kill)
    kTimeout,    // killed at wall_s, or its CPU time was used up
    kMemory,     // killed: all of it together passed memory_bytes
    kOutput,     // killed: it went on writing far beyond output_bytes
    kDisk,       // killed, or what it left in /work was too much to write back: files or disk_bytes
    kStopped,    // killed: the caller's stop token
  };
  Outcome outcome = kExited;
  int exit_code = 0;          // of kExited and kSignalled; else 137
  std::string output, error;  // standard output and standard error, each cut at output_bytes
  bool truncated = false;     // one of them was cut
  double wall_s = 0;
  std::string note;  // of the write-back: "" or one line on what could not come back (links, a full disk)
};
std::string_view outcome_name(SandboxResult::Outcome outcome);  // "exited", "signalled", "timeout", ...

class Sandbox {
 public:
  // "" when it works here; else one line: what is missing and how to mend it. Tried once, with a real sandbox.
  static std::string why_not();

  // Blocks until nothing of the job is left. The program's failure is a result.
  // ERRORS (environment): why_not(), out of processes or descriptors.
  // ERRORS (input): an empty argv, a NUL inside a text, a work folder that is not there or holds more than disk_bytes or
  // files, a path in read_only that is not there or not readable for the sandbox's user.
  SandboxResult run(const SandboxJob& job, std::stop_token stop = {}) const;

  // The user and group that a sandbox of a root process runs as: of no account, and used for nothing else.
  static constexpr uint32_t kUser = 64987;
};

}  // namespace perigee
