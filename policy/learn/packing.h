// Cutting a batch into micro-batches of packed sequences, and the compact list of what each has to predict.
// Private to policy/learn.
#pragma once
#include <cstdint>
#include <span>
#include <vector>

#include "policy/learn/trainer.h"

namespace perigee::policy {

// Whole sequences, one after the other. Only the positions that are trained on go through the vocabulary:
// entry i says that the hidden state of row rows[i] predicts targets[i].
struct MicroBatch {
  std::vector<const TrainSequence*> sequences;
  std::vector<int32_t> tokens;
  std::vector<int64_t> lengths;
  std::vector<int64_t> rows;
  std::vector<int32_t> targets;
  std::vector<int64_t> offsets;  // [sequences + 1] into rows: the entries of each sequence
  float temperature = 1;
  bool curated = false;

  int64_t entries() const { return static_cast<int64_t>(rows.size()); }
};

// In the order given; a new micro-batch starts where the next sequence would exceed max_tokens, or differs in
// temperature or in being curated. every_token: take every position but the first, whatever the mask.
std::vector<MicroBatch> pack(std::span<const TrainSequence* const> sequences, int64_t max_tokens,
                             bool every_token);

}  // namespace perigee::policy
