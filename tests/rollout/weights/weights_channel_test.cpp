#include "rollout/weights/weights_channel.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>

#include "base/error.h"

namespace perigee::rollout {
namespace {

TEST(WeightsChannel, AVersionArrivesWithItsHashAndOldOnesGo) {
  const std::string run = "/nowhere/run-" + std::to_string(::getpid());
  WeightsSubscriber subscriber;
  WeightsNotice first, second;
  {
    WeightsPublisher publisher(run, 1000);
    std::memset(publisher.begin(1), 'a', 1000);
    first = publisher.notice(1);
    ASSERT_TRUE(subscriber.take(first, 1000));
    EXPECT_EQ(static_cast<char>(subscriber.data()[999]), 'a');
    std::memset(publisher.begin(2), 'b', 1000);
    second = publisher.notice(2);
    publisher.retire(2);
    EXPECT_EQ(SharedMemory::list(shm_prefix(run)).size(), 1u);
    publisher.retire(3);  // the latest stays
    EXPECT_EQ(SharedMemory::list(shm_prefix(run)).size(), 1u);
    EXPECT_FALSE(subscriber.take(first, 1000));
    EXPECT_EQ(static_cast<char>(subscriber.data()[0]), 'a');  // still mapped
    auto wrong = second;
    wrong.hash[0] = wrong.hash[0] == '0' ? '1' : '0';
    EXPECT_THROW(subscriber.take(wrong, 1000), Error);
    EXPECT_THROW(subscriber.take(second, 999), Error);
    ASSERT_TRUE(subscriber.take(second, 1000));
  }
  EXPECT_TRUE(SharedMemory::list(shm_prefix(run)).empty());
  EXPECT_EQ(static_cast<char>(subscriber.data()[0]), 'b');
}

TEST(WeightsChannel, LeftoversOfAKilledRunAreRemovedAndOfOthersAreNot) {
  const std::string run = "/nowhere/killed-" + std::to_string(::getpid());
  const auto object = SharedMemory::create(shm_prefix(run) + "1-2-v3-4", 100);
  const auto other = SharedMemory::create(shm_prefix(run + "x") + "1-2-v3-4", 100);
  EXPECT_EQ(remove_leftovers(run), 1);
  EXPECT_EQ(remove_leftovers(run), 0);
  EXPECT_EQ(remove_leftovers(run + "x"), 1);
}

}  // namespace
}  // namespace perigee::rollout
