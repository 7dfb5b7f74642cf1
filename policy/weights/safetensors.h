// One safetensors file: read by memory map, written whole or not at all.
//
// The format:
//   8 bytes   N, little-endian
//   N bytes   JSON: an object that maps each tensor's name to
//             {"dtype", "shape", "data_offsets": [begin, end)}, the offsets relative to the data, and may
//             map "__metadata__" to texts
//   the rest  the data; the tensors cover it exactly: no gap, no overlap, nothing after
// Downside to know: nothing aligns a tensor, so a view's data may stand at any address and is read through
// memcpy.
//
// ERRORS are input errors of one line: "FILE: tensor NAME: what".
#pragma once
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "base/file.h"
#include "kernels/gemm/gemm.h"

namespace perigee::policy {

enum class TensorType : uint8_t { kF32, kBf16, kF16, kI32, kI64 };
int64_t tensor_type_bytes(TensorType type);
const char* tensor_type_name(TensorType type);  // "F32", "BF16", ...
inline TensorType tensor_type_of(kernels::Dtype d) {
  return d == kernels::Dtype::kF32 ? TensorType::kF32 : TensorType::kBf16;
}

// A tensor of an open file; valid while the file object lives.
struct TensorView {
  std::string name;
  TensorType type = TensorType::kF32;
  std::vector<int64_t> shape;  // [] is a scalar
  int64_t elements = 0;
  const std::byte* data = nullptr;  // elements * tensor_type_bytes(type) bytes, any alignment
  std::string_view file;
  int64_t bytes() const { return elements * tensor_type_bytes(type); }
};

// Elements [begin, begin + count) as float32: exact for F32, BF16 and F16. ERRORS: an integer tensor.
void to_float32(const TensorView& tensor, int64_t begin, int64_t count, float* out);
std::vector<float> to_float32(const TensorView& tensor);
// ERRORS: a floating-point tensor.
std::vector<int64_t> to_int64(const TensorView& tensor);

// The index of the first NaN or infinity.
std::optional<int64_t> first_non_finite(const float* x, int64_t count);

// "[2304, 512]"
std::string shape_text(std::span<const int64_t> shape);

// An open file. Move-only; const after construction, so any thread may read.
class SafetensorsFile {
 public:
  // Validates everything but the values.
  explicit SafetensorsFile(const std::string& path);

  const std::vector<TensorView>& tensors() const { return tensors_; }  // in the order of their data
  const TensorView* find(std::string_view name) const;                 // null when absent
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  const std::string& path() const { return *path_; }

 private:
  std::unique_ptr<std::string> path_;  // views point to it; its address outlives moves
  MappedFile map_;
  std::vector<TensorView> tensors_;
  std::unordered_map<std::string_view, size_t> index_;  // keys are the names in tensors_
  std::map<std::string, std::string> metadata_;
};

struct TensorSpec {
  std::string name;
  TensorType type = TensorType::kF32;
  std::vector<int64_t> shape;
  int64_t elements() const;
  int64_t bytes() const { return elements() * tensor_type_bytes(type); }
};

// Streams a file: the tensors' bytes in the order of specs, in pieces of any size, then commit(). Destroyed
// before that, or on any error (a full disk), an older file of that name stays as it was.
class SafetensorsWriter {
 public:
  // REQUIRES names distinct and not "__metadata__", shapes nonnegative.
  SafetensorsWriter(const std::string& path, std::span<const TensorSpec> specs,
                    const std::map<std::string, std::string>& metadata = {});
  void write(const void* data, int64_t bytes);
  // Rounds to the type, one of F32, BF16. NaN stays NaN.
  void write_float32(const float* x, int64_t count, TensorType type);
  int64_t remaining_bytes() const { return remaining_; }
  // REQUIRES remaining_bytes() == 0.
  void commit();

 private:
  AtomicFile file_;
  int64_t remaining_ = 0;
};

struct NamedTensor {
  TensorSpec spec;
  const void* data = nullptr;  // spec.bytes() bytes
};
void write_safetensors(const std::string& path, std::span<const NamedTensor> tensors,
                       const std::map<std::string, std::string>& metadata = {});

}  // namespace perigee::policy
