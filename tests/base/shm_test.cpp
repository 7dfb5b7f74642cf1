#include "base/shm.h"

#include <gtest/gtest.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "base/error.h"

namespace perigee {
namespace {

std::string name(const char* what) { return "/perigee-test-" + std::to_string(::getpid()) + "-" + what; }

TEST(SharedMemory, WhatOneWritesAnotherReadsAndRemovingTheNameLeavesTheMapping) {
  auto writer = SharedMemory::create(name("a"), 10000);
  std::memcpy(writer.writable(), "weights", 7);
  SharedMemory reader;
  ASSERT_TRUE(SharedMemory::open(name("a"), reader));
  EXPECT_EQ(reader.bytes(), 10000);
  const auto names = SharedMemory::list(name(""));
  EXPECT_NE(std::find(names.begin(), names.end(), name("a")), names.end());
  EXPECT_TRUE(SharedMemory::remove(name("a")));
  EXPECT_FALSE(SharedMemory::remove(name("a")));
  EXPECT_EQ(std::memcmp(reader.data(), "weights", 7), 0);
  EXPECT_FALSE(SharedMemory::open(name("a"), reader));
}

TEST(SharedMemory, MoreThanThereIsIsAnErrorThatSaysSoAndLeavesNothing) {
  struct statvfs info {};
  ASSERT_EQ(::statvfs("/dev/shm", &info), 0);
  const int64_t too_much = static_cast<int64_t>(info.f_blocks) * static_cast<int64_t>(info.f_frsize) + (int64_t{1} << 30);
  try {
    SharedMemory::create(name("b"), too_much);
    FAIL() << "created " << too_much << " bytes";
  } catch (const Error& e) {
    EXPECT_EQ(e.kind(), Error::Kind::kEnvironment);
    EXPECT_NE(std::string(e.what()).find("/dev/shm is full"), std::string::npos) << e.what();
  }
  EXPECT_FALSE(SharedMemory::remove(name("b")));
}

TEST(SharedMemory, ANameIsUsedOnce) {
  auto first = SharedMemory::create(name("c"), 64);
  EXPECT_THROW(SharedMemory::create(name("c"), 64), Error);
  SharedMemory::remove(name("c"));
}

}  // namespace
}  // namespace perigee
