// A packed batch: rows of several sequences one after the other, each continuing at its own absolute position.
#pragma once
#include <cstdint>

namespace perigee::kernels {

// Rows [begin, begin + count) of the batch are the tokens at positions [position, position + count) of one sequence.
struct Slice {
  int64_t begin = 0;
  int64_t count = 0;
  int64_t position = 0;
};

}  // namespace perigee::kernels
