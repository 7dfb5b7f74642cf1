// Mamba2's recurrence on the device. The mathematics and the chunks are those of kernels/ssd/ssd.h.
// Reference: tests/kernels/ssd/ssd_ref.h
//
// T, the type of activations, is float (the bits of the CPU) or bf16: inputs are widened, the arithmetic is the same chain
// of float32 operations, and outputs are rounded once. So over bf16 too a row's result and the state have the same bits
// however a sequence was cut into calls and whatever else was in the batch.
//
// Common shapes: q,k T [rows, heads*dk]; v,out T [rows, heads*dv]; g float32 [rows, heads], natural-log decay <= 0 of any
// magnitude. dk and dv at most 128 are in one pass of shared memory; larger ones work as far as it
// reaches (forwards dk to 512, backwards dk and dv to 320).
// REQUIRES rows of different slices are disjoint; entries of count 0 may stand anywhere. Rows outside of every slice are
// neither read nor written.
#pragma once
#include <cstdint>

#include "kernels/device/batch.h"
#include "kernels/device/device.h"
#include "kernels/kda/kda_device.h"
#include "kernels/kda/shape.h"

namespace perigee::kernels {

using SsdShape = KdaShape;

// Bytes of one sequence's state in one layer, a multiple of 256: the layout of ssd.h in float32 for both types. All zero is
// the state of an empty sequence; a fork copies it.
template <class T>
int64_t ssd_state_bytes(const SsdShape& shape);

// out for every row of the slices; each sequence's state, at state_offset bytes (a multiple of 256) in its recurrent memory,
// goes on by count rows.
// batch.training(): sequences start from zero and no state is kept; state_offset is ignored.
// chunk_states: null, or (training only) [kda_chunk_slots(rows, slices)][heads][dk][dv], chunk c of slice i at
// kda_chunk_slot(begin, i, c) (kernels/kda/kda_device.h).
template <class T>
void ssd_forward(Device& dev, const SsdShape& shape, const T* q, const T* k, const T* v, const float* g,
                 const DeviceBatch& batch, int64_t state_offset, T* out, T* chunk_states = nullptr);

// Gradients for a training batch; all outputs overwritten on the slices' rows. chunk_states as ssd_forward wrote it.
// dq,dk_ T [rows, heads*dk]; dv_ T [rows, heads*dv]; dg float32 [rows, heads].
template <class T>
void ssd_backward(Device& dev, const SsdShape& shape, const T* q, const T* k, const T* v, const float* g,
                  const T* chunk_states, const DeviceBatch& batch, const T* dout, T* dq, T* dk_, T* dv_, float* dg);

}  // namespace perigee::kernels
