// Small exchanges with the host that pass its pinned memory by kernels. A copy between two kernels of a stream is another
// engine's work: the device stands still for 6 to 14 us until it knows of it, and the host learns of a copy's end 5 us later
// than of a word that a kernel wrote.
#pragma once
#include <cstdint>

#include "kernels/device/device.h"

namespace perigee::kernels {

// Device::copy_in from pinned memory, for blocks that the next kernel waits for; not for weights (as Device::copy_2d). Reads
// the host's memory in stream order: it stays as it is until then. Both addresses are multiples of 16; up to 15 bytes more
// are copied, to the next multiple. More than kMostFetched is left to the copy engine, which is as fast then.
inline constexpr int64_t kMostFetched = int64_t{256} << 10;
void fetch(Device& device, void* to, const std::byte* from, int64_t bytes);

// Tells the host that the device has come to a place in its stream.
class Bell {
 public:
  Bell();
  // Behind all that was launched, which writes to pinned memory too, perhaps. Not for graphs: each ring is another.
  void ring(Device& device);
  // Until the last ring() has come; then what was launched before it is done. Throws like Device::synchronize(). It does
  // not put the thread to sleep.
  void wait(Device& device);

 private:
  uint64_t heard() const;
  PinnedMemory memory_;
  uint64_t rings_ = 0;
};

}  // namespace perigee::kernels
