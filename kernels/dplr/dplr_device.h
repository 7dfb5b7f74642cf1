// The general delta rule (diagonal plus low rank) on the device. The mathematics, the chunks of kKdaChunk tokens aligned
// to absolute positions and the float functions are those of kernels/dplr/dplr.h (float: the same bits as there).
// docs/kernels/dplr.md tells how the bf16 functions work and what they take beside KDA's.
//
// Common shapes: q,k,a,b T [rows, heads*dk]; v,out T [rows, heads*dv]; g float32 [rows, heads*dk] natural-log decay <= 0
// of any magnitude. Inputs may be one and the same array (k and a, say).
// REQUIRES (T = bf16) dk and dv multiples of 16, at most 128, and activations aligned to 16 bytes; fast for 128.
// REQUIRES rows of different slices are disjoint and slices with rows are in ascending order of begin; entries of count
// 0 may stand anywhere. Rows outside of every slice are neither read nor written.
#pragma once
#include <cstdint>

#include "kernels/device/batch.h"
#include "kernels/device/device.h"
#include "kernels/dplr/shape.h"

namespace perigee::kernels {

// Bytes of one sequence's state in one layer, a multiple of 256. All zero is the state of an empty sequence; a fork copies
// it. float: the layout of dplr.h. bf16: opaque, S in float32.
template <class T>
int64_t dplr_state_bytes(const DplrShape& shape);

template <class T>
struct DplrDeviceInputs {
  const T *q, *k, *v, *a, *b;
  const float* g;
};

// out for every row of the slices; each sequence's state, at state_offset bytes (a multiple of 256) in its recurrent
// memory (aligned to 256), goes on by count rows. A slice may start and end anywhere in a chunk: out and the state have
// the same bits however a sequence was cut into calls and whatever else was in the batch.
// batch.training(): sequences start from zero and no state is kept; state_offset is ignored.
// chunk_states: null, or (training only) where S at the start of chunk c of slice i is kept for the backward, in
// [slot][heads][dk][dv] of T with kda_chunk_slot(begin, i, c) of kernels/kda/kda_device.h; kda_chunk_slots(rows, slices)
// slots in all, of which those that no chunk has are not written.
// Scratch, T = bf16: heads * (min(slots, kDplrSegment + 8) * 18.9 KB + slots * 4 B + 128 KiB) with slots = rows / 16 +
// 2 slices.
inline constexpr int64_t kDplrSegment = 1024;  // chunks that one pass of the bf16 forward takes (16,384 tokens)
template <class T>
void dplr_forward(Device& dev, const DplrShape& shape, const DplrDeviceInputs<T>& in,
                  const DeviceBatch& batch, int64_t state_offset, T* out, T* chunk_states = nullptr);

// Gradients for a training batch; all outputs overwritten on the slices' rows. chunk_states as dplr_forward wrote it.
// dq,dk,da,db T [rows, heads*dk]; dv T [rows, heads*dv]; dg float32 [rows, heads*dk].
// Scratch, T = bf16: min(slots * heads, 4,096) * 116 KB + slots * (8 + 4 heads) B + heads * 128 KiB with slots =
// kda_chunk_slots(rows, slices).
template <class T>
struct DplrDeviceGradients {
  T *dq, *dk, *dv, *da, *db;
  float* dg;
};
template <class T>
void dplr_backward(Device& dev, const DplrShape& shape, const DplrDeviceInputs<T>& in, const T* chunk_states,
                   const DeviceBatch& batch, const T* dout, const DplrDeviceGradients<T>& gradients);

}  // namespace perigee::kernels
