// What latent attention and attention with heads of keys share: streams of queries that attend to part of each row.
// Callers have checked the shapes.
//
// A stream is what reads one key and one value of each row: all heads of a slice (latent attention; the value is a part of
// the key), or one group of heads (kernels/attention). Query r of a stream is head r % heads of its token r / heads; q, out
// and lse are dense in r.
//
// NUMERICS: a query's order of operations is a function of its position: keys in spans of kSpan; inside a span blocks of
// kLatentPage with a running maximum; spans merged in ascending order.
#pragma once
#include <cstdint>
#include <span>

#include "kernels/context.h"
#include "kernels/mla/shape.h"

namespace perigee::kernels::mla {

struct AttendShape {
  int64_t heads;          // queries of a stream at one token
  int64_t width, values;  // floats of a key, of a value
  int64_t row;            // floats from one token's row to the next
  float scale;
};

struct Stream {
  int64_t count, position;  // tokens [position, position + count) of a sequence
  const float* const* pages;
  int64_t key_at, value_at;  // where the key and the value begin in a row
  const float* q;            // [count*heads, width]
  float* out;                // [count*heads, values]
  float* lse;                // null or [count*heads]: log-sum-exp of the scaled scores
};
void attend(Context& ctx, const AttendShape& shape, std::span<const Stream> streams);

// With p = exp(s - lse): dq is overwritten, and so are the key's and the value's part of every row of drows; where they
// are the same floats (key_at == value_at) they receive the sum.
struct StreamGradient {
  int64_t count;      // tokens [0, count) of a sequence
  const float* rows;  // [count, row]
  int64_t key_at, value_at;
  const float *q, *out, *lse, *dout;  // as in Stream; dout [count*heads, values]
  float* dq;                          // [count*heads, width]
  float* drows;                       // [count, row]
};
void attend_backward(Context& ctx, const AttendShape& shape, std::span<const StreamGradient> streams);

}  // namespace perigee::kernels::mla
