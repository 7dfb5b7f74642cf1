// Softmax attention with grouped heads on the device. attention.h says what is computed and what the letters mean.
//
// PAGES hold kLatentPage rows of one layer, [64, kv_width()] of T, row-major as on the CPU, at `page_offset` bytes (a
// multiple of 16) inside every block of a sequence's page table. Rows past a sequence's last are never read as numbers.
//
// NUMERICS: float: the bits of the CPU. bf16: the same operations in float32 on the widened values, rounded once at the
// end; so a row's bits are a function of its query, its prefix and its position. Decoding, prefill in any cut and training
// give the same bits.
// REQUIRES dim <= 256, and for bf16 arrays aligned to 8 bytes where dim is a multiple of 4.
#pragma once
#include "kernels/attention/shape.h"
#include "kernels/device/batch.h"
#include "kernels/device/device.h"

namespace perigee::kernels {

inline constexpr int64_t kAttentionMostDim = 256;

// Bytes of a page of one layer.
template <class T>
int64_t attention_page_bytes(const AttentionShape& shape) {
  return 64 * shape.kv_width() * static_cast<int64_t>(sizeof(T));
}

// kv [rows, kv_width()], keys rotated already, to the pages: the slices' rows. Not for training.
template <class T>
void attention_store(Device& device, const AttentionShape& shape, const T* kv, const DeviceBatch& batch,
                     int64_t page_offset);

// q [rows, heads*dim] -> out [rows, heads*dim]; lse null or [rows, heads].
// Row t of a slice attends to keys 0..position + t; the batch's own are in the pages already. Training: whole sequences
// from position 0, whose keys are the rows of kv [rows, kv_width()] (else null).
// Takes scratch: decoding, at most 256 MiB of partial results, or those of one sequence.
template <class T>
void attention_forward(Device& device, const AttentionShape& shape, const T* q, const DeviceBatch& batch,
                       int64_t page_offset, const T* kv, T* out, float* lse);

// For a training batch; out, lse as attention_forward<T> wrote them. dq [rows, heads*dim] and dkv [rows, kv_width()]
// overwritten on the slices' rows. Takes rows * heads * 4 bytes of scratch.
template <class T>
void attention_backward(Device& device, const AttentionShape& shape, const T* q, const T* kv,
                        const DeviceBatch& batch, const T* out, const float* lse, const T* dout, T* dq,
                        T* dkv);

}  // namespace perigee::kernels
