#include "policy/model/arena.h"

#include <cstring>

#include "base/error.h"
#include "kernels/gemm/tiles.h"

namespace perigee::policy {
namespace {

int64_t round_up(int64_t x, int64_t to) {
  return (x + to - 1) / to * to;
}

bool in_panels(TensorForm form) {
  return form == TensorForm::kPanels || form == TensorForm::kPanelsF32;
}

// kernels::to_bf16 of a whole array, without branches: the learner does it to every weight in every step.
void narrow_to_bf16(const float* from, int64_t n, uint16_t* to) {
  for (int64_t i = 0; i < n; ++i) {
    uint32_t b;
    std::memcpy(&b, from + i, sizeof b);
    const uint32_t nearest = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16, nan = (b >> 16) | 0x40u;
    to[i] = static_cast<uint16_t>((b & 0x7fffffffu) > 0x7f800000u ? nan : nearest);
  }
}

}  // namespace

int64_t ParamSpec::index(int64_t i, int64_t j) const {
  if (form == TensorForm::kTiles) return kernels::tiled_index(k, i, j);
  if (in_panels(form)) return ((i / kernels::kPanel) * k + j) * kernels::kPanel + i % kernels::kPanel;
  return i * k + j;
}

ArenaLayout::ArenaLayout(Dtype dtype, MatrixForm matrices) : dtype_(dtype), matrices_(matrices) {
  PERIGEE_CHECK(matrices == MatrixForm::kPanels || dtype == Dtype::kBf16);
}

int ArenaLayout::add(std::string name, TensorForm form, int64_t n, int64_t k, bool trained) {
  ParamSpec t;
  t.name = std::move(name);
  t.form = form == TensorForm::kPanels && matrices_ == MatrixForm::kTiles ? TensorForm::kTiles : form;
  t.n = n;
  t.k = k;
  t.trained = trained;
  t.elements = t.form == TensorForm::kTiles ? kernels::tiled_elements(n, k)
               : in_panels(form)            ? kernels::panel_elements(n, k)
                                            : n * k;
  t.element_offset = elements_;
  t.byte_offset = weight_bytes_;
  elements_ += round_up(t.elements, 16);
  weight_bytes_ += round_up(t.elements * (t.in_dtype() ? kernels::dtype_bytes(dtype_) : 4), 64);
  tensors_.push_back(std::move(t));
  return static_cast<int>(tensors_.size()) - 1;
}

int64_t ArenaLayout::parameter_count() const {
  int64_t sum = 0;
  for (const ParamSpec& t : tensors_) sum += t.n * t.k;
  return sum;
}

void ArenaLayout::flat_to_weights(const float* flat, std::byte* weights) const {
  // The gaps between tensors too: the arena is hashed.
  std::memset(weights, 0, static_cast<size_t>(weight_bytes_));
  for (const ParamSpec& t : tensors_) {
    const float* from = flat + t.element_offset;
    if (dtype_ == Dtype::kBf16 && t.in_dtype()) {
      auto* to = reinterpret_cast<uint16_t*>(weights + t.byte_offset);
      narrow_to_bf16(from, t.elements, to);
    } else {
      std::memcpy(weights + t.byte_offset, from, static_cast<size_t>(t.elements) * 4);
    }
  }
}

void ArenaLayout::weights_to_flat(const std::byte* weights, float* flat) const {
  std::memset(flat, 0, static_cast<size_t>(elements_) * 4);
  for (const ParamSpec& t : tensors_) {
    float* to = flat + t.element_offset;
    if (dtype_ == Dtype::kBf16 && t.in_dtype()) {
      const auto* from = reinterpret_cast<const uint16_t*>(weights + t.byte_offset);
      for (int64_t i = 0; i < t.elements; ++i) to[i] = kernels::from_bf16(from[i]);
    } else {
      std::memcpy(to, weights + t.byte_offset, static_cast<size_t>(t.elements) * 4);
    }
  }
}

}  // namespace perigee::policy
