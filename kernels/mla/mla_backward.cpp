// Attention, backwards, and latent attention as the case of it in which a row's value is a part of its key.
// With p = exp(s - lse), D = dout . out:
//   dp = dout . v_i,  ds = scale p (dp - D),  dq = sum_i ds_i k_i,  dk_i = sum_r ds_r q_r,  dv_i = sum_r p_r dout_r
//
// The work is a grid of (block of keys, tile of queries) cells. dq of a query adds its blocks in ascending order, dk and dv
// of a row its tiles in ascending order; tiles and blocks are counted from the stream's start. Either a thread takes a whole
// stream and visits each cell once, or, for few long streams, one pass splits the grid by key blocks for dk and dv and
// another by query tiles for dq: the order of every sum, and so every bit, is the same.
#include "kernels/mla/attend.h"
#include "kernels/mla/mla.h"
#include "kernels/mla/tile.h"
#include "kernels/mla/work.h"

namespace perigee::kernels {
namespace mla {
namespace {

using simd::F16;

constexpr int64_t kTileQueries = 96;

struct Buffers {
  float *keys, *values, *dense, *p, *ds;  // a block's keys and values on their side; its keys, row after row
  static int64_t floats(const AttendShape& s) {
    return turned_floats(s.width) + turned_floats(s.values) + kLatentPage * s.width +
           2 * kTileQueries * kLatentPage;
  }
  Buffers(const AttendShape& s, float* memory) {
    keys = memory, memory += turned_floats(s.width);
    values = memory, memory += turned_floats(s.values);
    dense = memory, memory += kLatentPage * s.width;
    p = memory, memory += kTileQueries * kLatentPage;
    ds = memory;
  }
};

struct StreamWork {
  const AttendShape& shape;
  const StreamGradient& stream;
  float* delta;  // D [queries]

  // Floats that are key and value at once.
  bool shared() const { return stream.key_at == stream.value_at; }
  int64_t queries() const { return stream.count * shape.heads; }
  int64_t tiles() const { return (queries() + kTileQueries - 1) / kTileQueries; }
  int64_t blocks() const { return (stream.count + kLatentPage - 1) / kLatentPage; }
  int64_t block_rows(int64_t block) const {
    return std::min(kLatentPage, stream.count - block * kLatentPage);
  }
  // Cells below the diagonal are empty.
  int64_t first_tile(int64_t block) const { return block * kLatentPage * shape.heads / kTileQueries; }
  int64_t last_block(int64_t tile) const {
    return (std::min(queries(), (tile + 1) * kTileQueries) - 1) / shape.heads / kLatentPage;
  }

  void turn(int64_t block, const Buffers& b) const {
    const float* const rows = stream.rows + block * kLatentPage * shape.row;
    turn_block(rows + stream.key_at, block_rows(block), shape.row, shape.width, nullptr, b.keys);
    if (shared()) return;
    turn_block(rows + stream.value_at, block_rows(block), shape.row, shape.values, nullptr, b.values);
    copy_rows(rows + stream.key_at, shape.row, block_rows(block), shape.width, b.dense);
  }

  // One cell, the block already turned. The first cell of a sum overwrites.
  void cell(int64_t block, int64_t tile, bool want_dq, bool want_drows, const Buffers& b) const {
    const int64_t width = shape.width, values = shape.values, row = shape.row;
    const int64_t first = std::max(tile * kTileQueries, block * kLatentPage * shape.heads);
    const int64_t count = std::min(queries(), (tile + 1) * kTileQueries) - first;
    const int64_t keys = block_rows(block), lanes = round_up_16(keys);
    const float* const tile_q = stream.q + first * width;
    const float* const tile_dout = stream.dout + first * values;
    long_product(tile_q, width, width, b.keys, 16 * width, b.p, count, lanes);
    // A shared value is the beginning of the key.
    if (shared())
      long_product(tile_dout, values, values, b.keys, 16 * width, b.ds, count, lanes);
    else
      long_product(tile_dout, values, values, b.values, 16 * values, b.ds, count, lanes);
    for (int64_t i = 0; i < count; ++i) {
      float* const p = b.p + i * kLatentPage;
      float* const ds = b.ds + i * kLatentPage;
      const F16 scale = simd::set1(shape.scale), row_lse = simd::set1(stream.lse[first + i]),
                row_delta = simd::set1(delta[first + i]);
      for (int64_t j = 0; j < lanes; j += 16) {
        const F16 weight = simd::exp(simd::sub(simd::mul(simd::load(p + j), scale), row_lse));
        simd::store(p + j, weight);
        simd::store(ds + j, simd::mul(scale, simd::mul(weight, simd::sub(simd::load(ds + j), row_delta))));
      }
      for (int64_t j = (first + i) / shape.heads - block * kLatentPage + 1; j < keys; ++j) p[j] = ds[j] = 0;
    }
    const int64_t block_at = block * kLatentPage * row;
    if (want_dq) {
      float* const dq = stream.dq + first * width;
      // Rows of several heads lie kilobytes apart, in few sets of the L1 cache: they are read from their copy.
      const float* const block_keys = shared() ? stream.rows + block_at + stream.key_at : b.dense;
      const TileArgs to_dq = {keys, b.ds, kLatentPage, 1,      block_keys, shared() ? row : width,
                              16,   dq,   width,       nullptr};
      block == 0 ? tile_product<Start::kZero>(to_dq, count, width)
                 : tile_product<Start::kLoad>(to_dq, count, width);
    }
    if (want_drows) {
      const bool fresh = tile == first_tile(block);
      float* const dkeys = stream.drows + block_at + stream.key_at;
      float* const dvalues = stream.drows + block_at + stream.value_at;
      const TileArgs to_keys = {count, b.ds, 1, kLatentPage, tile_q, width, 16, dkeys, row, nullptr};
      fresh ? tile_product<Start::kZero>(to_keys, keys, width)
            : tile_product<Start::kLoad>(to_keys, keys, width);
      const TileArgs to_values = {count, b.p, 1, kLatentPage, tile_dout, values, 16, dvalues, row, nullptr};
      fresh && !shared() ? tile_product<Start::kZero>(to_values, keys, values)
                         : tile_product<Start::kLoad>(to_values, keys, values);
    }
  }
};

}  // namespace

void attend_backward(Context& ctx, const AttendShape& shape, std::span<const StreamGradient> streams) {
  int64_t cells = 0, largest = 0, blocks = 0, tiles = 0, queries = 0;
  for (const StreamGradient& s : streams) {
    cells += s.count * s.count;
    largest = std::max(largest, s.count * s.count);
    blocks += (s.count + kLatentPage - 1) / kLatentPage;
    tiles += (s.count * shape.heads + kTileQueries - 1) / kTileQueries;
    queries += s.count * shape.heads;
  }
  if (queries == 0) return;

  Scratch::Mark mark(ctx.scratch);
  const int64_t stream_count = static_cast<int64_t>(streams.size());
  float* delta = ctx.scratch.take<float>(queries);
  StreamWork* const works = ctx.scratch.take<StreamWork>(stream_count);
  for (int64_t i = 0; i < stream_count; ++i) {
    const StreamGradient& s = streams[static_cast<size_t>(i)];
    new (works + i) StreamWork{shape, s, delta};
    delta += s.count * shape.heads;
  }
  for_tasks(ctx, stream_count, 0, [&](int64_t i, float*) {
    const StreamGradient& s = works[i].stream;
    for (int64_t r = 0; r < works[i].queries(); ++r)
      works[i].delta[r] = simd::dot(s.dout + r * shape.values, s.out + r * shape.values, shape.values);
  });

  if (largest * ctx.pool.size() <= cells || ctx.pool.size() == 1) {
    for_tasks(ctx, stream_count, Buffers::floats(shape), [&](int64_t i, float* memory) {
      const StreamWork& work = works[i];
      const Buffers buffers(shape, memory);
      for (int64_t block = 0; block < work.blocks(); ++block) {
        work.turn(block, buffers);
        for (int64_t t = work.first_tile(block); t < work.tiles(); ++t)
          work.cell(block, t, true, true, buffers);
      }
    });
    return;
  }

  struct Task {
    const StreamWork* work;
    int64_t index;
    bool is_block;  // a block of keys for dk and dv, or a tile of queries for dq
  };
  Task* const tasks = ctx.scratch.take<Task>(blocks + tiles);
  int64_t n = 0;
  for (int64_t i = 0; i < stream_count; ++i)
    for (int64_t b = 0; b < works[i].blocks(); ++b) tasks[n++] = {works + i, b, true};
  for (int64_t i = 0; i < stream_count; ++i)
    for (int64_t t = works[i].tiles() - 1; t >= 0; --t) tasks[n++] = {works + i, t, false};
  for_tasks(ctx, n, Buffers::floats(shape), [&](int64_t i, float* memory) {
    const StreamWork& work = *tasks[i].work;
    const Buffers buffers(shape, memory);
    const int64_t index = tasks[i].index;
    if (tasks[i].is_block) {
      work.turn(index, buffers);
      for (int64_t t = work.first_tile(index); t < work.tiles(); ++t)
        work.cell(index, t, false, true, buffers);
    } else {
      for (int64_t block = 0; block <= work.last_block(index); ++block) {
        work.turn(block, buffers);
        work.cell(block, index, true, false, buffers);
      }
    }
  });
}

}  // namespace mla

void mla_backward(Context& ctx, const MlaShape& shape, const float* q, const float* c,
                  std::span<const Slice> slices, const float* out, const float* lse, const float* dout,
                  float* dq, float* dc) {
  const int64_t width = shape.width(), latent = shape.latent, heads = shape.heads;
  PERIGEE_CHECK(heads > 0 && latent > 0 && shape.rope >= 0, "heads {} latent {} rope {}", heads, latent,
                shape.rope);
  Scratch::Mark mark(ctx.scratch);
  auto* const streams = ctx.scratch.take<mla::StreamGradient>(static_cast<int64_t>(slices.size()));
  for (size_t i = 0; i < slices.size(); ++i) {
    const Slice& s = slices[i];
    PERIGEE_CHECK(s.position == 0 && s.count >= 0,
                  "slice at position {} with {} rows: backward takes whole sequences", s.position, s.count);
    streams[i] = {s.count,
                  c + s.begin * width,
                  0,
                  0,
                  q + s.begin * heads * width,
                  out + s.begin * heads * latent,
                  lse + s.begin * heads,
                  dout + s.begin * heads * latent,
                  dq + s.begin * heads * width,
                  dc + s.begin * width};
  }
  mla::attend_backward(ctx, {heads, width, latent, width, shape.scale}, {streams, slices.size()});
}

}  // namespace perigee::kernels
