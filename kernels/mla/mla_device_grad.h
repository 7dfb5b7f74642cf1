// The gradients of attention over latent rows on the device; the CPU's contract is in mla.h.
#pragma once
#include <cstdint>

#include "kernels/device/batch.h"
#include "kernels/device/device.h"
#include "kernels/mla/shape.h"

namespace perigee::kernels {

// For a training batch: whole sequences from position 0.
//  q     [rows, heads*width]   queries, the key half of kv_b_proj absorbed
//  c     [rows, width]         the batch's latent rows
//  out   [rows, heads*latent]  and
//  lse   [rows, heads]         as mla_forward<T> wrote them
//  dout  [rows, heads*latent]
//  dq    [rows, heads*width]   overwritten on the slices' rows
//  dc    [rows, width] f32     overwritten on the slices' rows
// float: the bits of the CPU's mla_backward. bf16: products on the tensor cores with float32 sums; the weights p and ds
// are rounded to bf16 between the products. The same inputs give the same bits: every sum has one order, a function of
// the shapes and of the slices' lengths.
// REQUIRES (bf16) the arrays aligned to 16 bytes. Latent 512 or 256, rope 64 and an even number of heads on a device
// of capability 9.0 go to the tensor cores; all else takes the float path's kernels, which are slow.
// ASYNC on the device's stream; takes mla_backward_scratch_bytes of scratch; may be captured into a graph.
template <class T>
void mla_backward(Device& device, const MlaShape& shape, const T* q, const T* c, const DeviceBatch& batch,
                  const T* out, const float* lse, const T* dout, T* dq, float* dc);

// What mla_backward<T> takes of the scratch.
template <class T>
int64_t mla_backward_scratch_bytes(const Device& device, const MlaShape& shape, int64_t rows,
                                   int64_t max_count);

// From the latent rows back to what kv_a_proj gave (latent_store, backwards): the first `latent` values went through an
// RMSNorm, the rest as they are.
//  kv      [rows, width] f32  the projection's output        norm_w  [latent] f32
//  dc      [rows, width] f32  as mla_backward wrote it       dkv     [rows, width], overwritten; for float it may be dc
//  dnorm_w [latent] f32       accumulated
// float: the bits of the CPU (rms_norm_backward of kernels/norm/norm.h and a copy). bf16: the same arithmetic with dkv
// rounded at the end, and rows added to dnorm_w in runs of 64, the runs in ascending order.
template <class T>
void latent_grad(Device& device, const MlaShape& shape, int64_t rows, const float* kv, const float* norm_w,
                 float eps, const float* dc, T* dkv, float* dnorm_w);

}  // namespace perigee::kernels
