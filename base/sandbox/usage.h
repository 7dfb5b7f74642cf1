// What the processes of a sandbox hold, read from its own /proc: the bound on memory where no control group is at hand.
#pragma once
#include <cstdint>

namespace perigee::sandbox {

// Bytes of memory of all processes below `proc` (an open /proc of their process namespace): their pages of no file, those
// of several processes counted once. Files in the sandbox's file systems have bounds of their own and do not count, and
// no other memory can be shared (seccomp_filter.cpp). As long as a cheap upper estimate stays below enough_bytes, that estimate is the answer. What cannot be read
// (a process that just ended) counts as nothing.
int64_t memory_bytes(int proc, int64_t enough_bytes);

}  // namespace perigee::sandbox
