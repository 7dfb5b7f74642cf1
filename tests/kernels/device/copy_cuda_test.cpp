// Copies between host and device that are large enough to go in pieces.
#include <algorithm>

#include "base/random.h"
#include "tests/kernels/device_fixture.h"

namespace perigee::kernels {
namespace {

using CopyDevice = DeviceTest;

TEST_F(CopyDevice, LargeCopiesArriveWhole) {
  Device& d = device();
  Random random(1);
  for (int64_t n : {int64_t{33} << 20, (int64_t{70} << 20) + 12345}) {
    std::vector<uint64_t> words(static_cast<size_t>(n / 8 + 1));
    for (uint64_t& w : words) w = random.next_u64();
    std::vector<uint8_t> back(static_cast<size_t>(n) + 8, 0x5a);
    auto* const memory = static_cast<std::byte*>(d.allocate(n));
    auto* const second = static_cast<std::byte*>(d.allocate(n));
    const auto* host = reinterpret_cast<const uint8_t*>(words.data());
    d.copy_in(memory, host, n);
    d.copy(second, memory, n);  // in stream order behind it
    d.zero(memory, n);
    d.copy_out(back.data(), second, n);
    EXPECT_EQ(std::memcmp(back.data(), host, static_cast<size_t>(n)), 0);
    EXPECT_EQ(back[static_cast<size_t>(n)], 0x5a);
    d.copy_out(back.data(), memory, n);
    EXPECT_EQ(std::count(back.begin(), back.end() - 8, 0), n);
    PinnedMemory pinned(n);
    d.copy_out(pinned.data(), second, n);
    EXPECT_EQ(std::memcmp(pinned.data(), host, static_cast<size_t>(n)), 0);
    d.release(memory);
    d.release(second);
  }
}

}  // namespace
}  // namespace perigee::kernels
