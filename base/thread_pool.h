// A fixed team of threads that runs loops. The caller's thread is one of the team.
//
// Thread safety: parallel_for may be called by one thread at a time (one loop in flight per pool); each role of a run
// owns its pool. Results must not depend on how a loop is cut: the numeric contract relies on it, so a body writes
// only what its own indices name.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>

namespace perigee {

class ThreadPool {
 public:
  // threads >= 1; 0 means one per available processor.
  explicit ThreadPool(int threads = 0);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const;

  // Calls body(begin, end) on disjoint ranges that cover [0, n), each a multiple of grain long but for the last.
  // Ranges are claimed as threads come free. Returns when all are done. The first exception is rethrown here.
  // With n <= grain or one thread, runs on the caller without touching the team.
  void parallel_for(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace perigee
