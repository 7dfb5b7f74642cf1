#include "kernels/device/cuda/host_copy.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

#include "kernels/device/device.h"
#include "kernels/device/runtime.h"

namespace perigee::kernels {
namespace {

constexpr int64_t kPiece = int64_t{4} << 20;
constexpr int kMostThreads = 4;

// A thread's two pieces and its stream.
struct Lane {
  PinnedMemory memory{2 * kPiece};
  cudaStream_t stream = nullptr;
  cudaEvent_t done[2] = {};
};

// Threads take pieces from `next` until none is left: one is copied by the device while the other is by the processor.
cudaError_t work(Lane& lane, int ordinal, std::byte* to, const std::byte* from, int64_t bytes,
                 cudaMemcpyKind kind, std::atomic<int64_t>& next) {
  cudaError_t error = cudaSetDevice(ordinal);
  struct Piece {
    int64_t at = 0, bytes = 0;
  } held[2];
  const bool in = kind == cudaMemcpyHostToDevice;
  const auto attempt = [&](cudaError_t e) {
    if (error == cudaSuccess) error = e;
  };
  const auto finish = [&](int i) {  // of a piece on its way
    if (held[i].bytes == 0) return;
    attempt(cudaEventSynchronize(lane.done[i]));
    if (!in && error == cudaSuccess)
      std::memcpy(to + held[i].at, lane.memory.data() + i * kPiece, static_cast<size_t>(held[i].bytes));
    held[i].bytes = 0;
  };
  for (int i = 0; error == cudaSuccess; i ^= 1) {
    finish(i);
    const int64_t at = next.fetch_add(kPiece);
    if (at >= bytes) break;
    held[i] = {at, std::min(kPiece, bytes - at)};
    const auto size = static_cast<size_t>(held[i].bytes);
    std::byte* const pinned = lane.memory.data() + i * kPiece;
    if (in) std::memcpy(pinned, from + at, size);
    attempt(cudaMemcpyAsync(in ? to + at : pinned, in ? pinned : from + at, size, kind, lane.stream));
    attempt(cudaEventRecord(lane.done[i], lane.stream));
  }
  finish(0);
  finish(1);
  return error;
}

}  // namespace

bool copy_large(int ordinal, void* to, const void* from, int64_t bytes, cudaMemcpyKind kind) {
  cudaPointerAttributes attributes;
  if (cudaPointerGetAttributes(&attributes, kind == cudaMemcpyHostToDevice ? from : to) == cudaSuccess &&
      attributes.type != cudaMemoryTypeUnregistered)
    return false;
  cudaGetLastError();
  // Pinning takes longer than copying, so the pieces are kept; the process's end gives them back.
  static std::mutex mutex;
  static std::vector<Lane>& lanes = *new std::vector<Lane>();
  const std::lock_guard lock(mutex);
  if (lanes.empty()) {
    lanes.resize(std::clamp<size_t>(std::thread::hardware_concurrency(), 1, kMostThreads));
    for (Lane& lane : lanes) {
      PERIGEE_CUDA(cudaStreamCreateWithFlags(&lane.stream, cudaStreamNonBlocking));
      for (cudaEvent_t& e : lane.done) PERIGEE_CUDA(cudaEventCreateWithFlags(&e, cudaEventDisableTiming));
    }
  }
  std::atomic<int64_t> next{0};
  std::vector<cudaError_t> errors(lanes.size(), cudaSuccess);
  const auto run = [&](size_t i) {
    errors[i] = work(lanes[i], ordinal, static_cast<std::byte*>(to), static_cast<const std::byte*>(from),
                     bytes, kind, next);
  };
  {
    std::vector<std::jthread> threads;
    for (size_t i = 1; i < lanes.size(); ++i) threads.emplace_back(run, i);
    run(0);
  }
  for (cudaError_t error : errors) PERIGEE_CUDA(error);
  return true;
}

}  // namespace perigee::kernels
