// What the reductions over the vocabulary are made of, on the CPU and on the device.
#pragma once
#include <cstdint>

namespace perigee::kernels {

// Entries of a row that are reduced together: part of the numeric contract.
inline constexpr int64_t kVocabBlock = 256;

struct LogitStats {
  float lse;      // log sum exp(z)
  float entropy;  // -sum p log p
};

}  // namespace perigee::kernels
