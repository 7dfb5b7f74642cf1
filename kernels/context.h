// What a kernel needs besides its operands. One Context per role (engine, learner); not thread safe.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "base/error.h"
#include "base/thread_pool.h"

namespace perigee::kernels {

// Temporary memory, taken and given back in stack order; grows while warming up and then allocates nothing.
// Memory is 64-byte aligned and holds garbage.
class Scratch {
 public:
  // Everything taken after the mark is given back when the mark dies.
  class Mark {
   public:
    explicit Mark(Scratch& s) : scratch_(s), block_(s.block_), used_(s.used_) {}
    ~Mark() {
      scratch_.block_ = block_;
      scratch_.used_ = used_;
    }
    Mark(const Mark&) = delete;
    Mark& operator=(const Mark&) = delete;

   private:
    Scratch& scratch_;
    size_t block_, used_;
  };

  template <class T>
  T* take(int64_t count) {
    return static_cast<T*>(take_bytes(static_cast<size_t>(count) * sizeof(T)));
  }
  // Bytes held from the system, for the memory plan and for the test that steady state allocates nothing.
  size_t capacity_bytes() const {
    size_t sum = 0;
    for (const auto& b : blocks_) sum += b.bytes;
    return sum;
  }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  struct Block {
    std::unique_ptr<void, Free> memory;
    size_t bytes;
  };
  void* take_bytes(size_t bytes) {
    bytes = (bytes + 63) / 64 * 64;
    while (block_ < blocks_.size() && used_ + bytes > blocks_[block_].bytes) {
      ++block_;
      used_ = 0;
    }
    if (block_ == blocks_.size()) {
      const size_t size = ((bytes > kBlockBytes ? bytes : kBlockBytes) + kHugePage - 1) / kHugePage * kHugePage;
      void* p = std::aligned_alloc(kHugePage, size);
      if (p == nullptr) throw_environment("out of memory: {} MiB for temporary buffers; lower the batch or micro-batch size", size >> 20);
#if defined(__linux__)
      // Activations are gigabytes: with small pages each first touch is a fault and each pass misses the page table's
      // cache. Only a wish; without it everything is the same but slower.
      madvise(p, size, MADV_HUGEPAGE);
#endif
      blocks_.push_back({std::unique_ptr<void, Free>(p), size});
      used_ = 0;
    }
    void* p = static_cast<char*>(blocks_[block_].memory.get()) + used_;
    used_ += bytes;
    return p;
  }

  static constexpr size_t kBlockBytes = size_t{8} << 20, kHugePage = size_t{2} << 20;
  std::vector<Block> blocks_;
  size_t block_ = 0, used_ = 0;  // the next free byte
};

struct Context {
  explicit Context(int threads = 0) : pool(threads) {}
  ThreadPool pool;
  // For the calling thread only: a loop body on the pool keeps its temporaries on its stack, or takes slices of what
  // the caller took before the loop.
  Scratch scratch;

  template <class Body>
  void parallel_for(int64_t n, int64_t grain, const Body& body) {
    pool.parallel_for(n, grain, body);
  }
};

}  // namespace perigee::kernels
