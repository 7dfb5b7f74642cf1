// A fixed team of threads that runs loops. The caller's thread is one of the team.
//
// Thread safety: parallel_for may be called by one thread at a time (one loop in flight per pool; a second
// caller is a bug and is refused); each role of a run owns its pool. Results must not depend on how a loop is
// cut: the numeric contract relies on it, so a body writes only what its own indices name.
//
// The other threads of the team help if they come in time: a loop ends when all its ranges are done, whether
// or not a sleeping thread has woken meanwhile. So a loop costs no more than running it alone plus the call
// that wakes, also when several processes share the processors.
#pragma once
#include <cstdint>
#include <memory>
#include <type_traits>

namespace perigee {

class ThreadPool {
 public:
  // threads >= 1; 0 means one per available processor.
  explicit ThreadPool(int threads = 0);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const;

  // Calls body(int64_t begin, int64_t end) on disjoint ranges that cover [0, n), each a multiple of grain
  // long but for the last. Ranges are claimed as threads come free. Returns when all are done. The first
  // exception is rethrown here; ranges not yet claimed by then are left out. With n <= grain, with one
  // thread, or inside a body of the same pool, runs body(0, n) on the caller without touching the team.
  // Allocates nothing.
  template <class Body>
  void parallel_for(int64_t n, int64_t grain, const Body& body) {
    static_assert(std::is_invocable_v<const Body&, int64_t, int64_t>);
    run(n, grain, {&body, [](const void* b, int64_t begin, int64_t end) {
                     (*static_cast<const Body*>(b))(begin, end);
                   }});
  }

 private:
  // A borrowed callable: unlike std::function it never allocates.
  struct Call {
    const void* body;
    void (*invoke)(const void* body, int64_t begin, int64_t end);
    void operator()(int64_t begin, int64_t end) const { invoke(body, begin, end); }
  };
  void run(int64_t n, int64_t grain, Call call);

  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace perigee
