// A model on disk: a directory with config.json and safetensors (one file, or shards and an index), in the
// Hugging Face layout, to and from the arenas of policy/model/params.h.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "policy/model/params.h"

namespace perigee::policy {

struct LoadedModel {
  std::shared_ptr<const ParamLayout> layout;
  std::vector<float> flat;  // float32 values of every parameter [layout->elements()]
};

// Reads config.json and every tensor (float32, bfloat16, float16), by memory map. dtype and matrices are those of
// the layout the model will compute in. Every tensor must be there with its shape and be finite; tensors the
// architecture does not know are refused by name.
// ERRORS (input): one line with the file, the tensor and what is wrong.
LoadedModel load_model(const std::string& directory, Dtype dtype, MatrixForm matrices = MatrixForm::kPanels);

// Writes config.json and safetensors into `directory` (created; must not hold another model unless
// overwrite), in `dtype`, in shards of at most max_shard_bytes. Each file appears complete or not at all.
void save_model(const std::string& directory, const ParamLayout& layout, const float* flat, Dtype dtype,
                int64_t max_shard_bytes = int64_t{5} << 30, bool overwrite = false);

}  // namespace perigee::policy
