// The system calls that a program in the sandbox may make.
#pragma once
#include <string>

namespace perigee::sandbox {

// The filter as the kernel takes it (an array of sock_filter), for this machine's architecture. Built once.
// What python3, a shell and the core utilities need is allowed; what is known and refused answers EPERM; the rest
// answers ENOSYS, as on an older kernel, which makes libraries fall back to calls that are allowed. A call of another
// architecture kills the process. ERRORS (environment): libseccomp does not know this machine.
const std::string& seccomp_program();

}  // namespace perigee::sandbox
