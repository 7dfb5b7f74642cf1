// Kimi Delta Attention on the device. The mathematics, the chunks of kKdaChunk tokens aligned to absolute positions and
// the float functions are those of kernels/kda/kda.h (float: the same bits as there). docs/kernels/kda.md tells how the
// bf16 functions work.
//
// Common shapes: q,k T [rows, heads*dk]; v,out T [rows, heads*dv]; g float32 [rows, heads*dk] natural-log decay <= 0 of
// any magnitude; beta float32 [rows, heads]; k L2-normalised, q L2-normalised and scaled by dk^-1/2.
// REQUIRES (T = bf16) dk and dv multiples of 16, at most 128, and activations aligned to 16 bytes; fast for 128.
// REQUIRES rows of different slices are disjoint and slices with rows are in ascending order of begin; entries of count
// 0 may stand anywhere. Rows outside of every slice are neither read nor written.
#pragma once
#include <cstdint>

#include "kernels/device/batch.h"
#include "kernels/device/device.h"
#include "kernels/kda/shape.h"

namespace perigee::kernels {

// Bytes of one sequence's state in one layer, a multiple of 256. All zero is the state of an empty sequence; a fork copies
// it. float: the layout of kda.h. bf16: opaque; S is a float32 stored as two planes of 16 bits (its rounding to bf16 and
// the rest), so that a decoding step reads only the first; beside it the rows of the open chunk. What the rows past
// position % kKdaChunk hold means nothing.
template <class T>
int64_t kda_state_bytes(const KdaShape& shape);

// Where chunk_states keeps S at the start of chunk c of slice i: [slot][heads][dk][dv] of T (for bf16: S rounded half
// away from zero, the very operand that the forward multiplied by), slot as below; slots that no chunk has are not
// written. kda_chunk_slots is how many there are for a batch of so many rows and entries.
#if defined(__CUDACC__)
__host__ __device__
#endif
constexpr int64_t kda_chunk_slot(int64_t slice_begin, int64_t slice_index, int64_t chunk) {
  return slice_begin / kKdaChunk + slice_index + chunk;
}
constexpr int64_t kda_chunk_slots(int64_t rows, int64_t slices) { return rows / kKdaChunk + slices; }

// out for every row of the slices; each sequence's state, at state_offset bytes (a multiple of 256) in its recurrent
// memory (aligned to 256), goes on by count rows. A slice may start and end anywhere in a chunk: out and the state have
// the same bits however a sequence was cut into calls and whatever else was in the batch.
// batch.training(): sequences start from zero and no state is kept; state_offset is ignored.
// chunk_states: null, or (training only) kda_chunk_slots x [heads][dk][dv].
// Scratch, T = bf16 and max_count > 1: heads * (min(slots, kKdaSegment + 24) * 13.8 KB + 1.25 slots * 4 B + slices * 1 KB +
// 128 KiB * min(slices, kKdaRoundSlices)) with slots = rows / 16 + 2 slices.
inline constexpr int64_t kKdaSegment = 1024;      // chunks that one pass of the bf16 prefill takes (16,384 tokens)
inline constexpr int64_t kKdaRoundSlices = 16;    // so many sequences may share every pass
template <class T>
void kda_forward(Device& dev, const KdaShape& shape, const T* q, const T* k, const T* v, const float* g,
                 const float* beta, const DeviceBatch& batch, int64_t state_offset, T* out, T* chunk_states = nullptr);

// Gradients for a training batch; all outputs overwritten on the slices' rows. chunk_states as kda_forward wrote it.
// dq,dk_ T [rows, heads*dk]; dv_ T [rows, heads*dv]; dg float32 [rows, heads*dk]; dbeta float32 [rows, heads].
template <class T>
void kda_backward(Device& dev, const KdaShape& shape, const T* q, const T* k, const T* v, const float* g,
                  const float* beta, const T* chunk_states, const DeviceBatch& batch, const T* dout, T* dq, T* dk_,
                  T* dv_, float* dg, float* dbeta);

}  // namespace perigee::kernels
