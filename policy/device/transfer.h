// Weights between a model directory and a GPU, tensor by tensor through small pinned buffers: neither the host nor the
// device ever holds the model twice, and the host never once.
#pragma once
#include <string>

#include "kernels/device/device.h"
#include "policy/model/params.h"

namespace perigee::policy {

struct Transfer {
  int64_t bytes = 0;  // of tensors in the files
  double seconds = 0;
};

// Every tensor of the directory's safetensors (float32, bfloat16, float16) to its place in a weights arena on the device,
// with the bits that load_model and flat_to_weights (policy/weights/checkpoint.h, params.h) give. The same checks: all are
// there with their shapes, finite, and no others. threads: that read; 0: as many as pay.
// ERRORS (input): one line with the file, the tensor and what is wrong; the arena is then garbage.
Transfer device_load(kernels::Device& device, const ParamLayout& layout, const std::string& directory, std::byte* weights,
                     int threads = 0);

// config.json and safetensors into a directory (made), in dtype, in shards of at most max_shard_bytes: the files that
// save_model writes for the same weights.
Transfer device_save(kernels::Device& device, const ParamLayout& layout, const std::byte* weights,
                     const std::string& directory, Dtype dtype, int64_t max_shard_bytes = int64_t{5} << 30);

// Bytes of the tensors that device_save writes.
int64_t checkpoint_bytes(const ParamLayout& layout, Dtype dtype);

namespace device {

// How the elements of a checkpoint tensor lie in an arena: row r, column c of its matrix [rows, k] belong to element
// (row_offset + r, c) of the tensor at `first`; or, with heads, its rows are cut into nope + v for each head, of which the
// first nope are columns of absorb_k and the others rows of absorb_v. Private to policy/device.
struct Placement {
  std::byte* first = nullptr;   // the tensor, or absorb_k of head 0
  std::byte* second = nullptr;  // absorb_v of head 0
  int64_t k = 1;                // of the rows in the file
  int64_t row_offset = 0;
  int64_t nope = 0, v = 0;  // 0: no heads
  int64_t first_stride = 0, second_stride = 0;  // bytes between heads
  TensorForm form = TensorForm::kVector;
  bool narrow = false;  // bfloat16 in the arena
};
Placement placement_of(const ParamLayout& layout, const CheckpointTensor& t, std::byte* weights);

enum class FileType { kF32, kBf16, kF16 };
// Elements [begin, begin + count) of the checkpoint tensor: from a buffer in the file's type into the arena, noting the
// least index of one that is not finite in *bad (device memory, which holds -1 as unsigned before); and back.
void scatter(kernels::Device& device, const Placement& p, int64_t begin, int64_t count, const void* from, FileType type,
             unsigned long long* bad);
void gather(kernels::Device& device, const Placement& p, int64_t begin, int64_t count, void* to, FileType type);

}  // namespace device
}  // namespace perigee::policy
