// The weights of a checkpoint directory: model.safetensors, or shards with model.safetensors.index.json, as
// Hugging Face lays them out.
//
// ERRORS are input errors of one line that name the file, the tensor and what to do.
#pragma once
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "policy/weights/safetensors.h"

namespace perigee::policy {

// All tensors of a checkpoint, wherever they lie.
// Move-only; const after construction, so any thread may read.
class SafetensorsSet {
 public:
  // path: a directory or one .safetensors file. With an index, every tensor must be in the shard that the
  // index names, and no shard may hold one that the index does not give to it.
  explicit SafetensorsSet(const std::string& path);

  const std::vector<const TensorView*>& tensors() const { return tensors_; }  // by file, then by position
  const TensorView* find(std::string_view name) const;                        // null when absent
  // The floating-point tensor of exactly this shape.
  // ERRORS: absent (with the nearest name), another shape, integers.
  const TensorView& need(std::string_view name, std::span<const int64_t> shape) const;
  int64_t total_bytes() const;
  const std::string& path() const { return path_; }

 private:
  void open_indexed(const std::string& index_path);
  void add(const TensorView& tensor);

  std::string path_;
  std::vector<std::unique_ptr<SafetensorsFile>> files_;
  std::vector<const TensorView*> tensors_;
  std::unordered_map<std::string_view, const TensorView*> index_;
};

// Writes a checkpoint's tensors, streamed in the order of specs as by SafetensorsWriter, into
// model.safetensors when they fit into max_shard_bytes and into model-0000i-of-0000n.safetensors with an
// index otherwise. A shard holds at least one tensor, so one larger than the limit makes a larger file.
// Nothing appears before commit(); the index appears last. Files are replaced one after the other: for a
// directory that changes all at once, write into a new one and rename it.
class SafetensorsSetWriter {
 public:
  // REQUIRES what SafetensorsWriter requires. ERRORS: the directory holds weights of another layout, which
  // would be left lying beside the new ones.
  SafetensorsSetWriter(const std::string& directory, std::span<const TensorSpec> specs,
                       int64_t max_shard_bytes, const std::map<std::string, std::string>& metadata = {});
  void write(const void* data, int64_t bytes);
  // Continues the tensor at hand with values of its own type (F32 or BF16), rounded.
  void write_float32(const float* x, int64_t count);
  void commit();

 private:
  struct Shard {
    std::string name;
    std::unique_ptr<SafetensorsWriter> writer;
  };
  void advance();

  std::string directory_;
  std::vector<Shard> shards_;
  std::string index_json_;  // empty: a single file
  // Where the stream stands.
  std::vector<TensorSpec> specs_;
  size_t tensor_ = 0, shard_ = 0;
  int64_t tensor_remaining_ = 0;
};

}  // namespace perigee::policy
