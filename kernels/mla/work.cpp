#include "kernels/mla/work.h"

#include "kernels/gemm/transpose.h"

namespace perigee::kernels::mla {

void turn_block(const float* block, int64_t rows, int64_t width, float* turned) {
  for (int64_t i0 = 0; i0 < rows; i0 += 16) {
    const int64_t n = std::min<int64_t>(16, rows - i0);
    for (int64_t j = 0; j < width; j += 16) {
      const int lanes = static_cast<int>(std::min<int64_t>(16, width - j));
      const float* const from = block + i0 * width + j;
      simd::F16 square[16];
      for (int64_t i = 0; i < 16; ++i)
        square[i] = i >= n         ? simd::zero()
                    : lanes == 16 ? simd::load(from + i * width)
                                  : simd::load_partial(from + i * width, lanes);
      // With fewer than 16 columns left the square runs into the next panel, which is written after this one.
      gemm::transpose16(square, turned + i0 * width + j * 16);
    }
  }
}

}  // namespace perigee::kernels::mla
