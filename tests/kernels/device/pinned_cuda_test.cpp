// What passes between host and device through pinned memory: as many bytes as asked for, in their place among other work.
#include "kernels/device/pinned.h"

#include "tests/kernels/device_fixture.h"

namespace perigee::kernels {
namespace {

class Pinned : public DeviceTest {};

TEST_F(Pinned, fetches_blocks_of_any_size) {
  constexpr int64_t kMost = kMostFetched + 4096;
  const PinnedMemory host(kMost);
  for (int64_t i = 0; i < kMost; ++i) host.data()[i] = static_cast<std::byte>(i * 7 + i / 251);
  for (int64_t bytes : {int64_t{0}, int64_t{1}, int64_t{16}, int64_t{760}, int64_t{4096}, int64_t{16384},
                        int64_t{16400}, int64_t{100'000}, kMostFetched, kMostFetched + 1, kMost}) {
    const DeviceArray<uint8_t> there(device(), kMost);
    fetch(device(), there.data(), host.data(), bytes);
    const std::vector<uint8_t> got = there.get();
    EXPECT_EQ(std::memcmp(got.data(), host.data(), static_cast<size_t>(bytes)), 0) << bytes;
    for (int64_t i = (bytes + 15) / 16 * 16; i < kMost; ++i)
      ASSERT_EQ(got[static_cast<size_t>(i)], 0xff) << bytes;
  }
}

// A graph reads what the host wrote before its launch, and the bell says that it is through.
TEST_F(Pinned, a_graph_fetches_anew_and_rings) {
  constexpr int64_t kWords = 3000;
  const PinnedMemory host(kWords * 4), result(kWords * 4);
  const DeviceArray<int32_t> in(device(), kWords);
  auto* const words = reinterpret_cast<int32_t*>(host.data());
  const auto* const results = reinterpret_cast<const int32_t*>(result.data());
  const DeviceGraph graph(device(), [&] {
    fetch(device(), in.data(), host.data(), kWords * 4);
    device().copy_2d(result.data(), kWords * 4, in.data(), kWords * 4, kWords * 4, 1);
  });
  Bell bell;
  bell.wait(device());  // nothing to wait for
  for (int32_t turn = 0; turn < 200; ++turn) {
    for (int32_t i = 0; i < kWords; ++i) words[i] = turn * 5000 + i;
    graph.launch(device());
    bell.ring(device());
    bell.wait(device());
    for (int32_t i = 0; i < kWords; ++i) ASSERT_EQ(results[i], turn * 5000 + i);
  }
}

}  // namespace
}  // namespace perigee::kernels
