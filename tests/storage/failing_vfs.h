// An SQLite VFS over the default one whose n-th write, sync, truncate or deletion fails. Syncs are otherwise
// skipped: the process lives on, so the kernel's copy is what a reopened store reads, and a sweep over n
// takes seconds. For one thread at a time.
#pragma once
#include <sqlite3.h>

#include <cstdint>

namespace perigee::storage_test {

struct FaultPlan {
  int64_t operations = 0;  // seen since the plan was set
  int64_t fail_at = 0;     // 1-based; 0: never
  bool forever = false;    // and all after it
  int write_code = SQLITE_FULL;
  int sync_code = SQLITE_IOERR_FSYNC;
  bool torn = false;  // a failing write leaves its first half in the file
  int64_t failures = 0;
};

// Name of the VFS; registered on the first call.
const char* failing_vfs();
FaultPlan& fault_plan();

}  // namespace perigee::storage_test
