// What a gated norm multiplies by.
#pragma once
#include <cstdint>

namespace perigee::kernels {

enum class OutputGate : uint8_t {
  kSigmoid,  // sigmoid(gate)
  kSwish,    // gate * sigmoid(gate)
  kNone,     // 1: gate is null
};

}  // namespace perigee::kernels
