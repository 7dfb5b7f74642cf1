// The tables of the store and how older ones become today's. docs/formats/store.md explains each column.
#pragma once
#include <cstdint>
#include <span>

#include "storage/sqlite.h"

namespace perigee::storage {

constexpr int64_t kApplicationId = 0x50455249;  // "PERI"

// A migration brings user_version from its place in the list to one more. Once released it never changes.
using Migration = const char*;
std::span<const Migration> migrations();
inline int64_t schema_version() {
  return static_cast<int64_t>(migrations().size());
}

enum class FileKind : uint8_t { kEmpty, kStore, kForeign };
// Reads the header and modifies nothing. A file that is no database at all throws kInput.
FileKind file_kind(Database& db);

// Applies what is missing, all in one transaction: a kill leaves the old version or the new one.
// REQUIRES user_version <= steps.size().
void migrate(Database& db, std::span<const Migration> steps);

// The first finding of quick_check throws kEnvironment.
void require_sound(Database& db);

}  // namespace perigee::storage
