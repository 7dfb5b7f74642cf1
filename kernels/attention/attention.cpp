// Softmax attention: each group of heads that reads the same key is a stream of kernels/mla/attend.h, whose queries have to
// lie one after the other. With one group they do already; with more they are copied there and back, one copy of each
// number against the keys that it meets.
#include "kernels/attention/attention.h"

#include <cstring>

#include "kernels/mla/attend.h"

namespace perigee::kernels {
namespace {

void check(const AttentionShape& s) {
  PERIGEE_CHECK(s.heads > 0 && s.kv_heads > 0 && s.heads % s.kv_heads == 0 && s.dim > 0,
                "heads {} kv_heads {} dim {}", s.heads, s.kv_heads, s.dim);
}

// Between rows [heads * width] of a batch and the same floats group by group: group g of a slice at
// (begin * heads + g * count * group) * width, [count, group * width]. Batches of one group stay where they are.
class Groups {
 public:
  Groups(Context& ctx, const AttentionShape& shape, std::span<const Slice> slices)
      : ctx_(ctx), shape_(shape), slices_(slices) {
    for (const Slice& s : slices) end_ = std::max(end_, s.begin + s.count);
  }
  bool dense() const { return shape_.kv_heads == 1; }
  // The first float of the group, in either order.
  int64_t at(const Slice& s, int64_t g, int64_t width) const {
    return (s.begin * shape_.heads + g * s.count * shape_.group()) * width;
  }
  const float* gathered(const float* rows, int64_t width) const {
    if (dense() || rows == nullptr) return rows;
    float* const to = ctx_.scratch.take<float>(end_ * shape_.heads * width);
    move(width,
         [&](int64_t row, int64_t group, size_t bytes) { std::memcpy(to + group, rows + row, bytes); });
    return to;
  }
  // Where to write what `scatter` then puts into `rows`.
  float* target(float* rows, int64_t width) const {
    return dense() || rows == nullptr ? rows : ctx_.scratch.take<float>(end_ * shape_.heads * width);
  }
  void scatter(const float* from, float* rows, int64_t width) const {
    if (from == rows) return;
    move(width,
         [&](int64_t row, int64_t group, size_t bytes) { std::memcpy(rows + row, from + group, bytes); });
  }

 private:
  // copy(place in the rows, place in the groups, bytes) for every token and group.
  template <class Copy>
  void move(int64_t width, const Copy& copy) const {
    const int64_t floats = shape_.group() * width;
    for (const Slice& s : slices_)
      ctx_.parallel_for(s.count, 256, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t)
          for (int64_t g = 0; g < shape_.kv_heads; ++g)
            copy((s.begin + t) * shape_.heads * width + g * floats, at(s, g, width) + t * floats,
                 static_cast<size_t>(floats) * sizeof(float));
      });
  }

  Context& ctx_;
  const AttentionShape& shape_;
  std::span<const Slice> slices_;
  int64_t end_ = 0;
};

mla::AttendShape attend_shape(const AttentionShape& s) {
  return {s.group(), s.dim, s.dim, s.kv_width(), s.scale};
}

}  // namespace

void attention_forward(Context& ctx, const AttentionShape& shape, const float* q,
                       std::span<const AttentionSlice> slices, float* out, float* lse) {
  check(shape);
  Scratch::Mark mark(ctx.scratch);
  const int64_t count = static_cast<int64_t>(slices.size());
  auto* const rows = ctx.scratch.take<Slice>(count);
  for (int64_t i = 0; i < count; ++i) {
    rows[i] = slices[static_cast<size_t>(i)].slice;
    PERIGEE_CHECK(rows[i].count >= 0 && rows[i].position >= 0, "count {} position {}", rows[i].count,
                  rows[i].position);
  }
  const int64_t dim = shape.dim;
  const Groups groups(ctx, shape, {rows, slices.size()});
  const float* const grouped_q = groups.gathered(q, dim);
  float* const grouped_out = groups.target(out, dim);
  float* const grouped_lse = groups.target(lse, 1);
  auto* const streams = ctx.scratch.take<mla::Stream>(count * shape.kv_heads);
  size_t n = 0;
  for (int64_t i = 0; i < count; ++i)
    for (int64_t g = 0; g < shape.kv_heads; ++g)
      streams[n++] = {rows[i].count,
                      rows[i].position,
                      slices[static_cast<size_t>(i)].pages,
                      g * dim,
                      (shape.kv_heads + g) * dim,
                      grouped_q + groups.at(rows[i], g, dim),
                      grouped_out + groups.at(rows[i], g, dim),
                      lse == nullptr ? nullptr : grouped_lse + groups.at(rows[i], g, 1)};
  mla::attend(ctx, attend_shape(shape), {streams, n});
  groups.scatter(grouped_out, out, dim);
  groups.scatter(grouped_lse, lse, 1);
}

void attention_backward(Context& ctx, const AttentionShape& shape, const float* q, const float* kv,
                        std::span<const Slice> slices, const float* out, const float* lse, const float* dout,
                        float* dq, float* dkv) {
  check(shape);
  Scratch::Mark mark(ctx.scratch);
  const int64_t dim = shape.dim;
  const Groups groups(ctx, shape, slices);
  const float* const grouped_q = groups.gathered(q, dim);
  const float* const grouped_out = groups.gathered(out, dim);
  const float* const grouped_lse = groups.gathered(lse, 1);
  const float* const grouped_dout = groups.gathered(dout, dim);
  float* const grouped_dq = groups.target(dq, dim);
  auto* const streams =
      ctx.scratch.take<mla::StreamGradient>(static_cast<int64_t>(slices.size()) * shape.kv_heads);
  size_t n = 0;
  for (const Slice& s : slices) {
    PERIGEE_CHECK(s.position == 0 && s.count >= 0,
                  "slice at position {} with {} rows: backward takes whole sequences", s.position, s.count);
    for (int64_t g = 0; g < shape.kv_heads; ++g) {
      const int64_t at = groups.at(s, g, dim);
      streams[n++] = {s.count,
                      kv + s.begin * shape.kv_width(),
                      g * dim,
                      (shape.kv_heads + g) * dim,
                      grouped_q + at,
                      grouped_out + at,
                      grouped_lse + groups.at(s, g, 1),
                      grouped_dout + at,
                      grouped_dq + at,
                      dkv + s.begin * shape.kv_width()};
    }
  }
  mla::attend_backward(ctx, attend_shape(shape), {streams, n});
  groups.scatter(grouped_dq, dq, dim);
}

}  // namespace perigee::kernels
