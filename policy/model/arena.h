// Where a set of tensors lies. One ArenaLayout describes arenas of two kinds:
//   weights    weight_bytes()  matrices and tables in `dtype`, vectors and router in float32 (byte_offset)
//   flat f32   elements()      gradients, Adam moments, float32 masters: a float per element (element_offset)
// Matrices lie in both as the device that multiplies them reads them: in panels (kernels/gemm/weight.h) for the CPU and
// for float32 on a GPU, in tiles (kernels/gemm/tiles.h) for bfloat16 on a GPU. Padding elements are zero and stay zero.
//
// A model's parameters are one such set (params.h), the adapters beside a frozen model another (adapter.h).
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "kernels/gemm/weight.h"

namespace perigee::policy {

using kernels::Dtype;

enum class TensorForm {
  kPanels,     // matrix in panels, in the layout's dtype
  kTiles,      // matrix in tiles, bfloat16 (MatrixForm::kTiles)
  kPanelsF32,  // matrix in panels, float32 whatever the dtype (the router)
  kTable,      // row-major matrix, in the layout's dtype (the embedding)
  kVector,     // float32, n values (k = 1) or [n, k] row-major
};

// Where a layout's matrices are multiplied.
enum class MatrixForm {
  kPanels,
  kTiles,  // on a GPU; REQUIRES bfloat16
};

struct ParamSpec {
  std::string name;  // "layers.3.q_proj"
  TensorForm form;
  int64_t n = 0, k = 1;
  int64_t elements = 0;        // padding included
  int64_t element_offset = 0;  // multiple of 16
  int64_t byte_offset = 0;     // multiple of 64
  bool trained = true;         // false: not changed by gradients (the router's bias)
  // Whether a weights arena holds it in the layout's dtype; else in float32.
  bool in_dtype() const { return form != TensorForm::kPanelsF32 && form != TensorForm::kVector; }
  // Position of element (i, j) inside the tensor's elements.
  int64_t index(int64_t i, int64_t j) const;
};

class ArenaLayout {
 public:
  Dtype dtype() const { return dtype_; }
  MatrixForm matrices() const { return matrices_; }
  const std::vector<ParamSpec>& tensors() const { return tensors_; }
  const ParamSpec& tensor(int i) const { return tensors_[static_cast<size_t>(i)]; }

  int64_t elements() const { return elements_; }          // of a flat f32 arena, padding included
  int64_t weight_bytes() const { return weight_bytes_; }  // of a weights arena
  int64_t parameter_count() const;                        // without padding

  // A weights arena from a flat f32 arena (rounding to nearest even in bfloat16), and back (exact).
  void flat_to_weights(const float* flat, std::byte* weights) const;
  void weights_to_flat(const std::byte* weights, float* flat) const;

 protected:
  ArenaLayout(Dtype dtype, MatrixForm matrices);
  // The tensor's number.
  int add(std::string name, TensorForm form, int64_t n, int64_t k, bool trained = true);

 private:
  Dtype dtype_;
  MatrixForm matrices_;
  std::vector<ParamSpec> tensors_;
  int64_t elements_ = 0, weight_bytes_ = 0;
};

}  // namespace perigee::policy
