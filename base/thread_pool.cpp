#include "base/thread_pool.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "base/error.h"

namespace perigee {
namespace {
// A thread without work looks this often before it sleeps, some tens of microseconds: long enough to bridge
// the serial parts of a decode step, short enough that the other processes of a run on the same processors
// are not starved.
constexpr int kSpins = 2000;

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// The state of a pool in one word, so that joining a loop and closing it exclude each other:
//   bits 31..16  the loop's number, wrapping; a thread that sleeps through 65536 loops only misses one more
//   bit  15      open: threads may still join
//   bits 14..0   threads that joined and have not left
// Invariants: the fields of the loop are written only while closed with nobody inside; they are read only by
// threads inside. Only the caller opens and closes.
constexpr uint32_t kOpen = 1u << 15, kInside = kOpen - 1, kLoop = 1u << 16;
constexpr uint32_t loop_number(uint32_t state) {
  return state / kLoop;
}
}  // namespace

struct ThreadPool::Impl {
  std::vector<std::thread> threads;
  std::atomic<uint32_t> state{0};
  std::atomic<bool> stop{false};
  std::atomic<bool> busy{false};  // a caller is in parallel_for
  // Changes whenever the last thread leaves a closed loop; the caller sleeps on it.
  std::atomic<uint32_t> left{0};

  // The loop in flight.
  Call call{};
  int64_t n = 0, grain = 1;
  alignas(64) std::atomic<int64_t> next{0};

  std::mutex failure_mutex;
  std::exception_ptr failure;  // guarded by failure_mutex

  // The pool whose body this thread is running, so that a loop inside a loop is recognised.
  static thread_local const Impl* current;

  void work() {
    const Impl* const outer = std::exchange(current, this);
    try {
      for (;;) {
        const int64_t begin = next.fetch_add(grain, std::memory_order_relaxed);
        if (begin >= n) break;
        call(begin, std::min(n, begin + grain));
      }
    } catch (...) {
      std::lock_guard lock(failure_mutex);
      if (!failure) failure = std::current_exception();
      next.store(n, std::memory_order_relaxed);
    }
    current = outer;
  }

  void run_thread() {
    uint32_t seen = 0;  // the loop this thread last joined or came too late for
    for (;;) {
      uint32_t now = state.load(std::memory_order_acquire);
      for (int spin = 0; loop_number(now) == seen && spin < kSpins; ++spin) {
        relax();
        now = state.load(std::memory_order_acquire);
      }
      if (stop.load(std::memory_order_acquire)) return;
      if (loop_number(now) == seen) {
        state.wait(now, std::memory_order_acquire);
        continue;
      }
      if ((now & kOpen) != 0) {
        if (!state.compare_exchange_weak(now, now + 1, std::memory_order_acq_rel)) continue;
        work();
        const uint32_t before = state.fetch_sub(1, std::memory_order_acq_rel);
        if ((before & (kOpen | kInside)) == 1) {
          left.fetch_add(1);
          left.notify_one();
        }
      }
      seen = loop_number(now);
    }
  }

  void open() {
    // Only the caller changes a closed, empty state. Sequentially consistent, as the wake-up below must not
    // miss a thread that is about to sleep.
    const uint32_t loop = (loop_number(state.load(std::memory_order_relaxed)) + 1) * kLoop;
    state.exchange(loop | kOpen);
    state.notify_all();
  }

  void close_and_wait() {
    uint32_t now = state.fetch_and(~kOpen, std::memory_order_acq_rel) & ~kOpen;
    for (int spin = 0; (now & kInside) != 0; ++spin) {
      if (spin < kSpins) {
        relax();
      } else {
        const uint32_t seen = left.load();
        if ((state.load() & kInside) == 0) break;
        left.wait(seen);
      }
      now = state.load(std::memory_order_acquire);
    }
  }
};

thread_local const ThreadPool::Impl* ThreadPool::Impl::current = nullptr;

ThreadPool::ThreadPool(int threads) : impl_(std::make_unique<Impl>()) {
  PERIGEE_CHECK(threads >= 0 && threads < static_cast<int>(kInside), "threads {}", threads);
  if (threads == 0) threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  impl_->threads.reserve(static_cast<size_t>(threads));
  for (int i = 1; i < threads; ++i) impl_->threads.emplace_back([this] { impl_->run_thread(); });
}

ThreadPool::~ThreadPool() {
  impl_->stop.store(true, std::memory_order_release);
  impl_->state.fetch_add(kLoop);
  impl_->state.notify_all();
  for (auto& t : impl_->threads) t.join();
}

int ThreadPool::size() const {
  return static_cast<int>(impl_->threads.size()) + 1;
}

void ThreadPool::run(int64_t n, int64_t grain, Call call) {
  PERIGEE_CHECK(grain > 0, "grain {}", grain);
  if (n <= 0) return;
  Impl& p = *impl_;
  if (n <= grain || p.threads.empty() || Impl::current == &p) {
    call(0, n);
    return;
  }
  PERIGEE_CHECK(!p.busy.exchange(true, std::memory_order_acquire), "two threads run loops on one pool");
  p.call = call;
  p.n = n;
  p.grain = grain;
  p.next.store(0, std::memory_order_relaxed);
  p.open();
  p.work();
  p.close_and_wait();
  std::exception_ptr failure = std::exchange(p.failure, nullptr);  // all have left: nobody else touches it
  p.busy.store(false, std::memory_order_release);
  if (failure) std::rethrow_exception(failure);
}

}  // namespace perigee
