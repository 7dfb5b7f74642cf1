// How a state and a chunk's record of the general delta rule in bf16 lie in memory. The instructions and the plan are
// KDA's (kernels/kda/kda_bf16.cuh); docs/kernels/dplr.md says what differs. Internal to kernels/dplr.
#pragma once
#include "kernels/dplr/dplr_device.h"
#include "kernels/kda/kda_bf16.cuh"

namespace perigee::kernels::dplr {

using kda::kChunk;
using kda::kDim;

// One head's part of a state, in bytes: S, in the planes of kda::StateLayout, and the rows of the open chunk as they came.
// A chunk that goes on is computed again from them: S changes only when it closes.
struct StateLayout {
  static constexpr int kHigh = kda::StateLayout::kHigh, kLow = kda::StateLayout::kLow;
  static constexpr int kKeys = 65536;      // bf16 [16][128]
  static constexpr int kRemovals = 69632;  // bf16 [16][128] a
  static constexpr int kReads = 73728;     // bf16 [16][128] b
  static constexpr int kValues = 77824;    // bf16 [16][128]
  static constexpr int kGates = 81920;     // float [16][128]
  static constexpr int kBytes = 90112;
};

// What the scan needs to know of a chunk of a head, tiles and pieces as in kda::Record.
struct Record {
  static constexpr int kGammaBQ = 0;  // bf16, per half of the channels [32][64]: Gamma . B, then Gamma . Q
  static constexpr int kKeysAtEnd = 8192;       // bf16, per half [16][64]: K decayed to the end
  static constexpr int kRemovalsAtEnd = 12288;  // likewise A
  static constexpr int kT = 16384;              // bf16 [2 i][2 j][8 i][8 j]: -(I + StrictTril(B A~))^-1
  static constexpr int kC = 16896;              // StrictTril(B K~), likewise
  static constexpr int kF = 17408;              // Tril(Q K~)
  static constexpr int kH = 17920;              // Tril(Q A~)
  static constexpr int kGamma = 18432;  // float: the decay of the whole chunk, per sixteen channels [t][n][2]
  static constexpr int kBytes = 18944;
};

// As kda::Problem.
struct Problem {
  int heads, dk, dv;
  const bf16 *q, *k, *v, *a, *b;
  const float* g;
  DeviceBatch batch;
  int64_t state_offset;
  bf16 *out, *chunk_states;
  int2* table;
  unsigned* ready;
  uint8_t* records;
  uint8_t* carry[2];
  int slot_begin, slot_end;

  __device__ uint8_t* state(int slice, int head) const {
    return reinterpret_cast<uint8_t*>(batch.recurrent[slice]) + state_offset +
           static_cast<int64_t>(head) * StateLayout::kBytes;
  }
};

void launch_intra(Device& dev, const Problem& p);
void launch_scan(Device& dev, const Problem& p);

}  // namespace perigee::kernels::dplr
