#include "kernels/device/launch.cuh"
#include "policy/device/resident.h"

namespace perigee::policy {
namespace {

using namespace kernels;

constexpr int kThreads = 256;

// Each block adds its share of the words to out[0] and out[1]: sums of integers, so that the order does not matter.
__global__ void __launch_bounds__(kThreads) add_words(const uint64_t* words, int64_t count, unsigned long long* out) {
  uint64_t first = 0, second = 0;
  for (int64_t i = blockIdx.x * int64_t{kThreads} + threadIdx.x; i < count; i += int64_t{gridDim.x} * kThreads) {
    const device::WordSums s = device::word_sums(words[i], static_cast<uint64_t>(i));
    first += s.first;
    second += s.second;
  }
  for (int step = 16; step > 0; step /= 2) {
    first += __shfl_down_sync(0xffffffffu, first, step);
    second += __shfl_down_sync(0xffffffffu, second, step);
  }
  if (threadIdx.x % 32 == 0) {
    atomicAdd(out, static_cast<unsigned long long>(first));
    atomicAdd(out + 1, static_cast<unsigned long long>(second));
  }
}

}  // namespace

std::string weights_fingerprint(Device& device, const std::byte* weights, int64_t bytes) {
  PERIGEE_CHECK(bytes % 8 == 0);
  DeviceScratch::Mark mark(device.scratch);
  auto* sums = device.scratch.take<unsigned long long>(2);
  device.zero(sums, 16);
  const auto blocks = static_cast<unsigned>(device.info().multiprocessors) * 8;
  add_words<<<blocks, kThreads, 0, device.stream()>>>(reinterpret_cast<const uint64_t*>(weights), bytes / 8, sums);
  PERIGEE_LAUNCHED();
  unsigned long long host[2];
  device.copy_out(host, sums, 16);
  static const char* digits = "0123456789abcdef";
  std::string text;
  for (const unsigned long long word : host)
    for (int shift = 60; shift >= 0; shift -= 4) text += digits[(word >> shift) & 15];
  return text;
}

}  // namespace perigee::policy
