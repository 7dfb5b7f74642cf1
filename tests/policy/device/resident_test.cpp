// Weights that several processes map, on the host.
#include "policy/device/resident.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <vector>

namespace perigee::policy {
namespace {

TEST(Resident, AnotherProcessReadsWhatWasWrittenAndTheMemoryOutlivesItsMaker) {
  constexpr int64_t kBytes = (int64_t{1} << 20) + 64;
  ResidentWeights made = ResidentWeights::create(nullptr, kBytes);
  EXPECT_EQ(made.data()[kBytes - 1], std::byte{0});
  for (int64_t i = 0; i < kBytes; ++i) made.writable()[i] = static_cast<std::byte>(i * 7);
  const std::string fingerprint = weights_fingerprint(made.data(), kBytes);
  const int kept = ::dup(made.descriptor());
  made = ResidentWeights();
  const pid_t child = ::fork();
  if (child == 0) {
    const ResidentWeights mapped = ResidentWeights::map(nullptr, ::dup(kept), kBytes);
    ::_exit(weights_fingerprint(mapped.data(), kBytes) == fingerprint ? 0 : 1);
  }
  int status = -1;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  EXPECT_THROW(ResidentWeights::map(nullptr, ::dup(kept), kBytes + 64), Error);
  ::close(kept);
}

TEST(Resident, FingerprintsSeeEveryBitAndItsPlace) {
  std::vector<std::byte> a(4096, std::byte{0});
  const std::string zero = weights_fingerprint(a.data(), 4096);
  EXPECT_EQ(zero.size(), 32u);
  EXPECT_NE(zero, weights_fingerprint(a.data(), 4088));
  for (const size_t at : {size_t{0}, size_t{8}, size_t{4095}}) {
    a[at] = std::byte{1};
    const std::string one = weights_fingerprint(a.data(), 4096);
    EXPECT_NE(one, zero);
    EXPECT_NE(one.substr(0, 16), zero.substr(0, 16));
    EXPECT_NE(one.substr(16), zero.substr(16));
    a[at] = std::byte{0};
  }
  // Two words exchanged.
  a[0] = std::byte{1};
  a[8] = std::byte{2};
  const std::string first = weights_fingerprint(a.data(), 4096);
  std::swap(a[0], a[8]);
  EXPECT_NE(first, weights_fingerprint(a.data(), 4096));
}

}  // namespace
}  // namespace perigee::policy
