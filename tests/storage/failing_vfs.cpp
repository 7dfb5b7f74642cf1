#include "tests/storage/failing_vfs.h"

#include <cstring>

namespace perigee::storage_test {
namespace {

FaultPlan plan;
sqlite3_vfs* base_vfs = nullptr;

// SQLite allocates szOsFile bytes: ours, then those of the VFS below.
struct File {
  sqlite3_file head;
};
sqlite3_file* below(sqlite3_file* file) {
  return reinterpret_cast<sqlite3_file*>(reinterpret_cast<File*>(file) + 1);
}

bool fails() {
  ++plan.operations;
  const bool hit =
      plan.fail_at > 0 && (plan.forever ? plan.operations >= plan.fail_at : plan.operations == plan.fail_at);
  plan.failures += hit;
  return hit;
}

int close(sqlite3_file* f) {
  return below(f)->pMethods ? below(f)->pMethods->xClose(below(f)) : SQLITE_OK;
}
int read(sqlite3_file* f, void* to, int n, sqlite3_int64 at) {
  return below(f)->pMethods->xRead(below(f), to, n, at);
}
int write(sqlite3_file* f, const void* from, int n, sqlite3_int64 at) {
  if (fails()) {
    if (plan.torn && n > 1) below(f)->pMethods->xWrite(below(f), from, n / 2, at);
    return plan.write_code;
  }
  return below(f)->pMethods->xWrite(below(f), from, n, at);
}
int truncate(sqlite3_file* f, sqlite3_int64 size) {
  return fails() ? SQLITE_IOERR_TRUNCATE : below(f)->pMethods->xTruncate(below(f), size);
}
int sync(sqlite3_file*, int) {
  return fails() ? plan.sync_code : SQLITE_OK;
}
int file_size(sqlite3_file* f, sqlite3_int64* size) {
  return below(f)->pMethods->xFileSize(below(f), size);
}
int lock(sqlite3_file* f, int level) {
  return below(f)->pMethods->xLock(below(f), level);
}
int unlock(sqlite3_file* f, int level) {
  return below(f)->pMethods->xUnlock(below(f), level);
}
int check_reserved(sqlite3_file* f, int* out) {
  return below(f)->pMethods->xCheckReservedLock(below(f), out);
}
int control(sqlite3_file* f, int op, void* arg) {
  return below(f)->pMethods->xFileControl(below(f), op, arg);
}
int sector_size(sqlite3_file* f) {
  return below(f)->pMethods->xSectorSize(below(f));
}
int characteristics(sqlite3_file* f) {
  return below(f)->pMethods->xDeviceCharacteristics(below(f));
}
int shm_map(sqlite3_file* f, int page, int size, int extend, void volatile** out) {
  return below(f)->pMethods->xShmMap(below(f), page, size, extend, out);
}
int shm_lock(sqlite3_file* f, int offset, int n, int flags) {
  return below(f)->pMethods->xShmLock(below(f), offset, n, flags);
}
void shm_barrier(sqlite3_file* f) {
  below(f)->pMethods->xShmBarrier(below(f));
}
int shm_unmap(sqlite3_file* f, int remove) {
  return below(f)->pMethods->xShmUnmap(below(f), remove);
}

// Version 2: with shared memory for the log, without memory-mapped reads.
const sqlite3_io_methods kMethods = {
    2,         close,          read,    write,       truncate,        sync,    file_size, lock,
    unlock,    check_reserved, control, sector_size, characteristics, shm_map, shm_lock,  shm_barrier,
    shm_unmap, nullptr,        nullptr};

int open(sqlite3_vfs*, const char* name, sqlite3_file* f, int flags, int* out_flags) {
  f->pMethods = nullptr;
  std::memset(below(f), 0, base_vfs->szOsFile);
  const int rc = base_vfs->xOpen(base_vfs, name, below(f), flags, out_flags);
  if (rc == SQLITE_OK) f->pMethods = &kMethods;
  return rc;
}
int remove(sqlite3_vfs*, const char* name, int sync_directory) {
  return fails() ? SQLITE_IOERR_DELETE : base_vfs->xDelete(base_vfs, name, sync_directory);
}

}  // namespace

FaultPlan& fault_plan() {
  return plan;
}

const char* failing_vfs() {
  static sqlite3_vfs vfs = [] {
    base_vfs = sqlite3_vfs_find(nullptr);
    sqlite3_vfs v = *base_vfs;
    v.szOsFile = static_cast<int>(sizeof(File)) + base_vfs->szOsFile;
    v.zName = "perigee-failing";
    v.pNext = nullptr;
    v.xOpen = open;
    v.xDelete = remove;
    return v;
  }();
  static const int registered = sqlite3_vfs_register(&vfs, 0);
  (void)registered;
  return vfs.zName;
}

}  // namespace perigee::storage_test
