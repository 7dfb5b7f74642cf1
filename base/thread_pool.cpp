#include "base/thread_pool.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "base/error.h"

namespace perigee {
namespace {
// Between loops a thread spins this often before it sleeps: long enough to bridge the serial parts of a decode step,
// short enough that the other processes of a run on the same two cores are not starved.
constexpr int kSpins = 2000;

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}
}  // namespace

struct ThreadPool::Impl {
  std::vector<std::thread> threads;
  std::atomic<uint32_t> generation{0};  // a new value starts a loop
  std::atomic<bool> stop{false};

  // The loop in flight; written before `generation`, read after it.
  const std::function<void(int64_t, int64_t)>* body = nullptr;
  int64_t n = 0, grain = 1;
  std::atomic<int64_t> next{0};
  std::atomic<int> running{0};

  std::mutex failure_mutex;
  std::exception_ptr failure;  // guarded by failure_mutex

  void work() {
    try {
      for (;;) {
        const int64_t begin = next.fetch_add(grain, std::memory_order_relaxed);
        if (begin >= n) break;
        (*body)(begin, std::min(n, begin + grain));
      }
    } catch (...) {
      std::lock_guard lock(failure_mutex);
      if (!failure) failure = std::current_exception();
      next.store(n, std::memory_order_relaxed);
    }
  }

  void run_thread() {
    uint32_t seen = 0;
    for (;;) {
      uint32_t now = generation.load(std::memory_order_acquire);
      for (int spin = 0; now == seen && spin < kSpins; ++spin) {
        relax();
        now = generation.load(std::memory_order_acquire);
      }
      if (now == seen) {
        generation.wait(seen, std::memory_order_acquire);
        continue;
      }
      seen = now;
      if (stop.load(std::memory_order_relaxed)) return;
      work();
      if (running.fetch_sub(1, std::memory_order_acq_rel) == 1) running.notify_one();
    }
  }
};

ThreadPool::ThreadPool(int threads) : impl_(std::make_unique<Impl>()) {
  if (threads <= 0) threads = std::max(1u, std::thread::hardware_concurrency());
  for (int i = 1; i < threads; ++i) impl_->threads.emplace_back([this] { impl_->run_thread(); });
}

ThreadPool::~ThreadPool() {
  impl_->stop = true;
  impl_->generation.fetch_add(1, std::memory_order_release);
  impl_->generation.notify_all();
  for (auto& t : impl_->threads) t.join();
}

int ThreadPool::size() const { return static_cast<int>(impl_->threads.size()) + 1; }

void ThreadPool::parallel_for(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  PERIGEE_CHECK(grain > 0, "grain {}", grain);
  if (n <= 0) return;
  if (n <= grain || impl_->threads.empty()) {
    body(0, n);
    return;
  }
  Impl& p = *impl_;
  p.body = &body;
  p.n = n;
  p.grain = grain;
  p.next.store(0, std::memory_order_relaxed);
  p.running.store(static_cast<int>(p.threads.size()), std::memory_order_relaxed);
  p.generation.fetch_add(1, std::memory_order_release);
  p.generation.notify_all();
  p.work();
  for (int left, spin = 0; (left = p.running.load(std::memory_order_acquire)) != 0; ++spin) {
    if (spin < kSpins) {
      relax();
    } else {
      p.running.wait(left, std::memory_order_acquire);
    }
  }
  if (p.failure) {
    auto failure = std::exchange(p.failure, nullptr);
    std::rethrow_exception(failure);
  }
}

}  // namespace perigee
