// A model directory opened for computing: layout, weights arena, tokenizer.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "kernels/sampling/sampling.h"
#include "policy/model/params.h"
#include "policy/tokenizer/tokenizer.h"

#include "apps/command.h"

namespace perigee::apps {

class OpenModel {
 public:
  // dtype: "float32", "bfloat16", or "auto" for that of the checkpoint. ERRORS (input): what load_model says.
  OpenModel(const std::string& directory, const std::string& dtype);

  const policy::ParamLayout& layout() const { return *layout_; }
  const policy::ModelConfig& config() const { return layout_->config(); }
  const std::byte* weights() const { return aligned_; }
  const policy::Tokenizer& tokenizer() const { return *tokenizer_; }

 private:
  std::shared_ptr<const policy::ParamLayout> layout_;
  std::vector<std::byte> arena_;
  std::byte* aligned_ = nullptr;
  std::unique_ptr<policy::Tokenizer> tokenizer_;
};

// ERRORS (input): names the option and the values it takes.
policy::Dtype parse_dtype(const std::string& name);

// "1,2,3" or "[1, 2, 3]" or numbers separated by blanks. ERRORS (input): not a number, or outside [0, vocab).
std::vector<int32_t> parse_ids(const std::string& text, int64_t vocab);

// The sampling options of generate.
struct SamplingOptions {
  double temperature = 1, top_p = 1, min_p = 0;
  int64_t top_k = 0;
  double repetition_penalty = 1, presence_penalty = 0, frequency_penalty = 0;
  std::vector<std::string> logit_bias;  // ID=B
  int64_t seed = 0;
  kernels::SamplingParams params(int64_t vocab) const;  // ERRORS (input): out of range
};
void declare_sampling(Command& command, SamplingOptions& options);

}  // namespace perigee::apps
