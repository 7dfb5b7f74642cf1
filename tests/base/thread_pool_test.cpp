#include "base/thread_pool.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <mutex>
#include <set>
#include <stdexcept>
#include <thread>
#include <vector>

namespace perigee {
namespace {

TEST(ThreadPool, CoversEveryIndexOnceInRangesOfTheGrain) {
  for (int threads : {1, 2, 3, 8}) {
    ThreadPool pool(threads);
    EXPECT_EQ(pool.size(), threads);
    for (int64_t n : {0, 1, 2, 7, 64, 1000}) {
      for (int64_t grain : {1, 3, 64, 5000}) {
        std::vector<std::atomic<int>> hits(static_cast<size_t>(n));
        std::atomic<bool> odd_range{false};
        pool.parallel_for(n, grain, [&](int64_t begin, int64_t end) {
          if (begin >= end || ((end - begin) % grain != 0 && end != n)) odd_range = true;
          for (int64_t i = begin; i < end; ++i) ++hits[static_cast<size_t>(i)];
        });
        EXPECT_FALSE(odd_range);
        for (auto& h : hits) ASSERT_EQ(h, 1) << "threads " << threads << " n " << n << " grain " << grain;
      }
    }
  }
}

TEST(ThreadPool, ZeroThreadsMeansOnePerProcessor) {
  EXPECT_GE(ThreadPool(0).size(), 1);
}

TEST(ThreadPool, AcceptsAnyCallable) {
  ThreadPool pool(2);
  std::atomic<int64_t> sum{0};
  const std::function<void(int64_t, int64_t)> f = [&](int64_t b, int64_t e) { sum += e - b; };
  pool.parallel_for(10, 1, f);
  EXPECT_EQ(sum, 10);
}

TEST(ThreadPool, ThreadsOfTheTeamTakePart) {
  ThreadPool pool(2);
  std::mutex mutex;
  std::set<std::thread::id> ids;
  // The first body waits until a second thread is in the loop too.
  std::atomic<int> inside{0};
  pool.parallel_for(2, 1, [&](int64_t, int64_t) {
    ++inside;
    while (inside < 2) std::this_thread::yield();
    std::lock_guard lock(mutex);
    ids.insert(std::this_thread::get_id());
  });
  EXPECT_EQ(ids.size(), 2u);
}

// Plain memory written by the caller is seen by the bodies, and the other way round, loop after loop; loops
// follow each other so fast that threads come late for some, and now and then so slowly that they sleep.
TEST(ThreadPool, ManyTinyLoopsHandMemoryOverCorrectly) {
  for (int threads : {2, 4}) {
    ThreadPool pool(threads);
    std::vector<int64_t> data(16, 0);
    for (int64_t round = 1; round <= 20'000; ++round) {
      pool.parallel_for(16, 1 + round % 5, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) data[static_cast<size_t>(i)] += i * round;
      });
      if (round % 4000 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
    for (int64_t i = 0; i < 16; ++i) ASSERT_EQ(data[static_cast<size_t>(i)], i * (20'000 * 20'001 / 2));
  }
}

// The number of a loop wraps after 65536: nothing happens there.
TEST(ThreadPool, SurvivesMoreLoopsThanTheCounterHolds) {
  ThreadPool pool(2);
  int64_t sum[2] = {0, 0};
  constexpr int64_t kLoops = 150'000;
  for (int64_t i = 0; i < kLoops; ++i) pool.parallel_for(2, 1, [&](int64_t begin, int64_t) { ++sum[begin]; });
  EXPECT_EQ(sum[0], kLoops);
  EXPECT_EQ(sum[1], kLoops);
}

TEST(ThreadPool, FirstExceptionReachesTheCallerAndThePoolWorksOn) {
  for (int threads : {1, 3}) {
    ThreadPool pool(threads);
    for (int64_t bad : {0, 13, 99}) {
      EXPECT_THROW(pool.parallel_for(100, 1,
                                     [&](int64_t begin, int64_t end) {
                                       if (begin <= bad && bad < end) throw std::runtime_error("body");
                                     }),
                   std::runtime_error);
      std::atomic<int64_t> sum{0};
      pool.parallel_for(100, 7, [&](int64_t begin, int64_t end) { sum += end - begin; });
      EXPECT_EQ(sum, 100);
    }
  }
}

TEST(ThreadPool, EveryBodyThrowing) {
  ThreadPool pool(4);
  for (int i = 0; i < 200; ++i)
    EXPECT_THROW(pool.parallel_for(64, 1, [](int64_t, int64_t) { throw std::logic_error("all"); }),
                 std::logic_error);
}

TEST(ThreadPool, LoopInsideALoopRunsWhole) {
  ThreadPool pool(3);
  std::vector<std::atomic<int>> hits(12 * 10);
  std::atomic<bool> cut{false};
  pool.parallel_for(12, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      pool.parallel_for(10, 1, [&](int64_t b, int64_t e) {
        if (b != 0 || e != 10) cut = true;
        for (int64_t j = b; j < e; ++j) ++hits[static_cast<size_t>(i * 10 + j)];
      });
    }
  });
  EXPECT_FALSE(cut);
  for (auto& h : hits) EXPECT_EQ(h, 1);
}

TEST(ThreadPool, LoopOfOnePoolInsideALoopOfAnother) {
  ThreadPool outer(2);
  std::atomic<int64_t> sum{0};
  outer.parallel_for(4, 1, [&](int64_t, int64_t) {
    ThreadPool inner(2);
    inner.parallel_for(8, 1, [&](int64_t b, int64_t e) { sum += e - b; });
  });
  EXPECT_EQ(sum, 32);
}

TEST(ThreadPool, SecondCallerIsRefused) {
  ThreadPool pool(2);
  std::atomic<bool> entered{false}, tried{false};
  std::thread other([&] {
    while (!entered) std::this_thread::yield();
    EXPECT_THROW(pool.parallel_for(2, 1, [](int64_t, int64_t) {}), std::logic_error);
    tried = true;
  });
  pool.parallel_for(2, 1, [&](int64_t, int64_t) {
    entered = true;
    while (!tried) std::this_thread::yield();
  });
  other.join();
}

TEST(ThreadPool, ComesAndGoesWithoutWork) {
  for (int i = 0; i < 200; ++i) ThreadPool pool(4);
}

}  // namespace
}  // namespace perigee
