// Starts bubblewrap: between fork and exec, everything that must not depend on it.
#pragma once
#include <sys/types.h>

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace perigee::sandbox {

struct Launch {
  std::vector<std::string> argv;  // [0] is the path of the program
  std::vector<int> descriptors;   // [i] becomes descriptor i; each above 9. All others are closed
  std::optional<uint32_t> user;   // the user and group to become first
  struct Limit {
    int resource;  // RLIMIT_...
    uint64_t value, hard;
  };
  std::vector<Limit> limits;
};

// The child's process id. It is killed when the calling thread ends. ERRORS (environment): what the kernel refuses.
pid_t launch(const Launch& what);

}  // namespace perigee::sandbox
