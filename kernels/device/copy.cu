#include "kernels/device/launch.cuh"

namespace perigee::kernels {
namespace {

// Word is what a thread moves: the widest that all sizes allow.
template <class Word>
__global__ void pieces(std::byte* to, int64_t ld_to, const std::byte* from, int64_t ld_from, int64_t words, int64_t all) {
  const int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  wait_for_previous();
  let_next_start();
  if (i >= all) return;
  const int64_t row = i / words, word = i % words;
  reinterpret_cast<Word*>(to + row * ld_to)[word] = reinterpret_cast<const Word*>(from + row * ld_from)[word];
}

template <class Word>
void launch(cudaStream_t stream, void* to, int64_t ld_to, const void* from, int64_t ld_from, int64_t width,
            int64_t rows) {
  const int64_t words = width / static_cast<int64_t>(sizeof(Word));
  launch_dependent(pieces<Word>, dim3(blocks_for(rows * words, 256)), dim3(256), 0, stream, static_cast<std::byte*>(to),
                   ld_to, static_cast<const std::byte*>(from), ld_from, words, rows * words);
}

}  // namespace

void copy_pieces(cudaStream_t stream, void* to, int64_t ld_to, const void* from, int64_t ld_from, int64_t width,
                 int64_t rows) {
  const auto all = reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) |
                   static_cast<uintptr_t>(ld_to | ld_from | width);
  if (all % 16 == 0) return launch<uint4>(stream, to, ld_to, from, ld_from, width, rows);
  if (all % 8 == 0) return launch<uint2>(stream, to, ld_to, from, ld_from, width, rows);
  launch<uint32_t>(stream, to, ld_to, from, ld_from, width, rows);
}

}  // namespace perigee::kernels
