// A sequence's state as bytes on the host: what a session is suspended to and resumed or forked from.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace perigee::policy {

// The state after `position` tokens. bytes: the recurrent part, then the blocks in order (StateLayout), the last
// one whole. Restored, it continues with the bits of the sequence it was taken from; it fits the layout and device kind
// that made it (StatePool::restore checks the sizes).
struct Snapshot {
  int64_t position = 0;
  std::vector<std::byte> bytes;
};

}  // namespace perigee::policy
