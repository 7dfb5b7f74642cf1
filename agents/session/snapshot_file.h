// A session's state on disk: one file for one position. The file is a cache: what it is worth is checked when it is
// read, and without it a session is prefilled from its tokens.
//
//   offset size  all numbers little-endian
//   0      8     "perisnap"
//   8      4     format version, 1
//   12     4     version of the weights when it was written
//   16     8     position: tokens that the state covers
//   24     8     bytes of the payload
//   32     16    XXH3-128 of the model's word (HostConfig::model and the sizes of its states): high, low
//   48     16    XXH3-128 of the tokens [0, position), as int32
//   64     16    XXH3-128 of the payload
//   80     8     XXH3-64 of bytes 0 to 79
//   88     ...   payload: policy::Snapshot::bytes
//
// Written to a temporary file beside it, synced, renamed, its directory synced: it is there whole or not at all.
#pragma once
#include <cstdint>
#include <optional>
#include <span>
#include <string>

#include "base/hash.h"
#include "policy/memory/snapshot.h"

namespace perigee::agents {

inline constexpr int64_t kSnapshotHeaderBytes = 88;

// ERRORS (environment): a full disk, I/O. Then no file, or the one that was there.
void write_snapshot(const std::string& path, const policy::Snapshot& snapshot,
                    std::span<const int32_t> tokens, const Hash128& model, uint32_t weights_version);

// The state, or why it is of no use here: damaged, of another model, not a prefix of these tokens. The state covers
// fewer than all of tokens.
struct SnapshotRead {
  std::optional<policy::Snapshot> snapshot;
  std::string refused;
};
SnapshotRead read_snapshot(const std::string& path, std::span<const int32_t> tokens, const Hash128& model);

}  // namespace perigee::agents
