// What the steps of the bf16 backward share: those of KDA (kernels/kda/kda_backward_bf16.cuh), whose scan this is too.
// Internal to kernels/dplr.
#pragma once
#include "kernels/dplr/dplr_bf16.cuh"
#include "kernels/kda/kda_backward_bf16.cuh"

namespace perigee::kernels::dplr_grad {

using namespace kda_grad;

// Of one chunk and head, written by the first step. It begins as KDA's, with Gamma B where that has Gamma K, beta -1, and W
// where that has R: then what the scan calls dX is z.
struct Record : kda_grad::Record {
  static constexpr int kKeys = kda_grad::Record::kBytes;  // fragments of K~ at the chunk's end
  static constexpr int kC = kKeys + kTileBytes;           // fragment of Cᵀ, the first operand
  static constexpr int kF = kC + kFragmentBytes;          // of Fᵀ
  static constexpr int kBytes = kF + kFragmentBytes;
};

struct Operands {
  using Record = dplr_grad::Record;
  int heads, dk, dv;
  DplrDeviceInputs<bf16> in;
  const bf16 *states, *dout;
  DplrDeviceGradients<bf16> out;
  DeviceBatch batch;
  const int2* table;       // [slots] slice and chunk, or -1
  int slot0, slot1;        // the segment
  const uint8_t* forward;  // [slot1 - slot0, heads][dplr::Record::kBytes]
  std::byte* records;      // [slot1 - slot0, heads][Record::kBytes]
  std::byte* dx;           // [slot1 - slot0, heads] fragments of z
  std::byte* ds;           // [slot1 - slot0, heads][dv / 16][dk / 16] fragments of dS'ᵀ
  float *carry_in, *carry_out;
};

void launch_finish(Device& dev, const Operands& o);

}  // namespace perigee::kernels::dplr_grad
