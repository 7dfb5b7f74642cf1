#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "base/random.h"
#include "kernels/gemm/gemm.h"

namespace perigee::kernels {
namespace {

// Rows that lie far apart are copied before they are used, whole vectors at a time: the sums are those of rows that lie
// close together, for every remainder of a vector, and what lies between the rows (NaN here) is not read.
TEST(Gemm, GradWeightOfRowsFarApartIsThatOfRowsTogether) {
  Context ctx(2);
  Random random(1);
  std::vector<int64_t> inputs = {143, 144, 145, 161, 250};
  for (int64_t k = 1; k <= 34; ++k) inputs.push_back(k);
  for (const int64_t rows : {1, 5, 300})
    for (const int64_t n : {1, 15, 16, 17, 33, 47, 64, 70})
      for (const int64_t k : inputs) {
        const int64_t far_x = k + 300, far_dy = n + 301;
        std::vector<float> x(static_cast<size_t>(rows * k)), dy(static_cast<size_t>(rows * n));
        std::vector<float> wide_x(static_cast<size_t>(rows * far_x), NAN),
            wide_dy(static_cast<size_t>(rows * far_dy), NAN);
        for (float& v : x) v = random.next_float() - 0.5f;
        for (float& v : dy) v = random.next_float() - 0.5f;
        for (int64_t r = 0; r < rows; ++r) {
          std::copy_n(x.begin() + r * k, k, wide_x.begin() + r * far_x);
          std::copy_n(dy.begin() + r * n, n, wide_dy.begin() + r * far_dy);
        }
        std::vector<float> together(static_cast<size_t>(panel_elements(n, k)), 0.25f), apart = together;
        const MatmulGradWeightTask near{dy.data(), n, x.data(), k, rows, together.data(), n, k};
        const MatmulGradWeightTask far{
            wide_dy.data(), far_dy, wide_x.data(), far_x, rows, apart.data(), n, k};
        matmul_grad_weight(ctx, {&near, 1});
        matmul_grad_weight(ctx, {&far, 1});
        ASSERT_EQ(std::memcmp(together.data(), apart.data(), together.size() * sizeof(float)), 0)
            << "rows " << rows << " n " << n << " k " << k;
      }
}

}  // namespace
}  // namespace perigee::kernels
