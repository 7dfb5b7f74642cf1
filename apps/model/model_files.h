// What the commands that open a model take beside it: token ids, sampling.
#pragma once
#include <string>
#include <vector>

#include "apps/command_line/command.h"
#include "apps/model/open_model.h"
#include "kernels/sampling/sampling.h"

namespace perigee::apps {

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
