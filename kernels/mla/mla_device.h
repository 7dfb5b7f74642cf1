// Latent attention on the device, forwards; mla_device_grad.h has the gradients. mla.h says what is computed and what the
// letters mean.
//
// PAGES hold kLatentPage rows each, at `page_offset` bytes inside every block of a sequence's page table, aligned to 128
// bytes. Over float a page is [64, width], row-major, as on the CPU. Over bf16 it is a [64, width] matrix in the tiles of
// kernels/gemm/tiles.h, so that one bulk copy puts it into shared memory as the tensor cores read it; latent_store writes
// them and nobody else needs to know. Rows past a sequence's last are never read as numbers and may hold anything.
//
// NUMERICS (bf16): a row's bits are a function of its q, its prefix and its position: keys in blocks of 64, in splits
// whose length is a function of the position (mla_split_blocks), splits merged in ascending order. Decoding, prefill in
// any cut and training give the same bits.
#pragma once
#include "kernels/device/batch.h"
#include "kernels/device/device.h"
#include "kernels/gemm/tiles.h"
#include "kernels/mla/shape.h"

namespace perigee::kernels {

// Bytes of a page of one layer.
template <class T>
int64_t latent_page_bytes(const MlaShape& shape) {
  if constexpr (sizeof(T) == 2) return tiled_elements(kLatentPage, shape.width()) * 2;
  return kLatentPage * shape.width() * static_cast<int64_t>(sizeof(T));
}

// kv [rows, width] f32, as kv_a gives it -> the latent rows: RMSNorm of the first `latent` values (norm_w [latent]), the
// others copied. They go to the pages (unless training) and to c [rows, width], row-major (unless null).
// On the slices' rows only. Over float: the bits of rms_norm_forward and a copy.
template <class T>
void latent_store(Device& device, const MlaShape& shape, const float* kv, const float* norm_w, float eps,
                  const DeviceBatch& batch, int64_t page_offset, T* c);

// q [rows, heads*width] -> out [rows, heads*latent]; lse null or [rows, heads]: log-sum-exp of the scaled scores.
// Row t of a slice attends to keys 0..position + t; the batch's own latent rows are in the pages already. Training: whole
// sequences from position 0, slices in ascending order of their rows, keys are the rows of c [rows, width] (else null).
// Over bf16: latent <= 512, rope <= 64, q and c aligned to 16 bytes. Takes scratch: decoding, at most 256 MiB of partial
// results; otherwise 17 MiB, in training also a copy of c.
template <class T>
void mla_forward(Device& device, const MlaShape& shape, const T* q, const DeviceBatch& batch,
                 int64_t page_offset, const T* c, T* out, float* lse);

}  // namespace perigee::kernels
