// The time of a decoding token behind contexts of different lengths, and what they take of memory: measured without reading
// a million tokens first. A sequence's memory is filled with random numbers, which take as long to read as real ones, and
// its position set; then the backend's passes of one token are timed.
#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "policy/model/config.h"

namespace perigee::apps::compare {

struct ContextPoint {
  int64_t tokens = 0;
  int64_t bytes = 0;            // of a sequence this long: state and cache
  std::string left_out;         // why it was not measured; empty: it was
  std::vector<double> seconds;  // of each step
  std::vector<double>
      processor_s;  // likewise, processor time of all threads: a shared machine does not lengthen it
  double median_s = 0, min_s = 0, max_s = 0;
  double processor_median_s = 0;

  void summarize();  // the medians and ends, of the lists
};

struct ContextOptions {
  std::vector<int64_t> lengths;  // ascending
  int64_t steps = 9;
  int64_t threads = 1;
  int64_t memory_bytes = 0;                       // at most for the sequence
  std::function<void(int64_t tokens)> on_length;  // before each
};

// On the CPU, weights random and float32, one sequence. Lengths beyond the memory or the model's own are left out and say so.
std::vector<ContextPoint> measure_context(const policy::ModelConfig& config, const ContextOptions& options);

// Half of the memory that is free, by the machine and by the control group.
int64_t context_memory_bytes();

}  // namespace perigee::apps::compare
