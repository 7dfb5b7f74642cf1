// Attention over latent rows, backwards. With p = exp(s - lse), D = dout . out:
//   dp = dout . c[0:latent],  ds = scale p (dp - D),  dq = sum_i ds_i c_i,  dc_i = sum_r ds_r q_r + [p_r dout_r | 0]
//
// The work is a grid of (block of keys, tile of queries) cells. dq of a query adds its blocks in ascending order, dc of a
// key its tiles in ascending order; tiles and blocks are counted from the slice's start. Either a thread takes a whole
// slice and visits each cell once, or, for few long slices, one pass splits the grid by key blocks for dc and another by
// query tiles for dq: the order of every sum, and so every bit, is the same.
#include "kernels/mla/mla.h"
#include "kernels/mla/tile.h"
#include "kernels/mla/work.h"

namespace perigee::kernels {
namespace {

using mla::Start;
using mla::tile_product;
using simd::F16;

constexpr int64_t kTileQueries = 96;

struct Buffers {
  float *turned, *p, *ds;
  static int64_t floats(const MlaShape& s) {
    return mla::turned_floats(s.width()) + 2 * kTileQueries * kLatentPage;
  }
  Buffers(const MlaShape& s, float* memory) {
    turned = memory, memory += mla::turned_floats(s.width());
    p = memory, memory += kTileQueries * kLatentPage;
    ds = memory;
  }
};

// The pointers of one slice, from its first row.
struct SliceWork {
  const MlaShape& shape;
  int64_t rows;
  const float *q, *c, *lse, *dout, *delta;
  float *dq, *dc;

  int64_t queries() const { return rows * shape.heads; }
  int64_t tiles() const { return (queries() + kTileQueries - 1) / kTileQueries; }
  int64_t blocks() const { return (rows + kLatentPage - 1) / kLatentPage; }
  int64_t block_rows(int64_t block) const { return std::min(kLatentPage, rows - block * kLatentPage); }
  // Cells below the diagonal are empty.
  int64_t first_tile(int64_t block) const { return block * kLatentPage * shape.heads / kTileQueries; }
  int64_t last_block(int64_t tile) const {
    return (std::min(queries(), (tile + 1) * kTileQueries) - 1) / shape.heads / kLatentPage;
  }

  void turn(int64_t block, const Buffers& b) const {
    mla::turn_block(c + block * kLatentPage * shape.width(), block_rows(block), shape.width(), shape.width(),
                    nullptr, b.turned);
  }

  // One cell, the block already turned. The first cell of a sum overwrites.
  void cell(int64_t block, int64_t tile, bool want_dq, bool want_dc, const Buffers& b) const {
    const int64_t width = shape.width(), latent = shape.latent;
    const int64_t first = std::max(tile * kTileQueries, block * kLatentPage * shape.heads);
    const int64_t count = std::min(queries(), (tile + 1) * kTileQueries) - first;
    const int64_t keys = block_rows(block), lanes = mla::round_up_16(keys);
    const float* const tile_q = q + first * width;
    const float* const tile_dout = dout + first * latent;
    const float* const block_c = c + block * kLatentPage * width;
    mla::long_product(tile_q, width, width, b.turned, 16 * width, b.p, count, lanes);
    mla::long_product(tile_dout, latent, latent, b.turned, 16 * width, b.ds, count, lanes);
    for (int64_t i = 0; i < count; ++i) {
      float* const p = b.p + i * kLatentPage;
      float* const ds = b.ds + i * kLatentPage;
      const F16 scale = simd::set1(shape.scale), row_lse = simd::set1(lse[first + i]),
                row_delta = simd::set1(delta[first + i]);
      for (int64_t j = 0; j < lanes; j += 16) {
        const F16 weight = simd::exp(simd::sub(simd::mul(simd::load(p + j), scale), row_lse));
        simd::store(p + j, weight);
        simd::store(ds + j, simd::mul(scale, simd::mul(weight, simd::sub(simd::load(ds + j), row_delta))));
      }
      for (int64_t j = (first + i) / shape.heads - block * kLatentPage + 1; j < keys; ++j) p[j] = ds[j] = 0;
    }
    if (want_dq) {
      const mla::TileArgs to_dq = {keys,  b.ds, kLatentPage,        1,     block_c,
                                   width, 16,   dq + first * width, width, nullptr};
      block == 0 ? tile_product<Start::kZero>(to_dq, count, width)
                 : tile_product<Start::kLoad>(to_dq, count, width);
    }
    if (want_dc) {
      float* const block_dc = dc + block * kLatentPage * width;
      const mla::TileArgs to_keys = {count, b.ds, 1,        kLatentPage, tile_q,
                                     width, 16,   block_dc, width,       nullptr};
      tile == first_tile(block) ? tile_product<Start::kZero>(to_keys, keys, width)
                                : tile_product<Start::kLoad>(to_keys, keys, width);
      tile_product<Start::kLoad>(
          {count, b.p, 1, kLatentPage, tile_dout, latent, 16, block_dc, width, nullptr}, keys, latent);
    }
  }
};

}  // namespace

void mla_backward(Context& ctx, const MlaShape& shape, const float* q, const float* c,
                  std::span<const Slice> slices, const float* out, const float* lse, const float* dout,
                  float* dq, float* dc) {
  const int64_t width = shape.width(), latent = shape.latent, heads = shape.heads;
  PERIGEE_CHECK(heads > 0 && latent > 0 && shape.rope >= 0, "heads {} latent {} rope {}", heads, latent,
                shape.rope);
  int64_t rows = 0, end = 0, cells = 0, largest = 0, blocks = 0, tiles = 0;
  for (const Slice& s : slices) {
    PERIGEE_CHECK(s.position == 0 && s.count >= 0,
                  "slice at position {} with {} rows: backward takes whole sequences", s.position, s.count);
    rows += s.count;
    end = std::max(end, s.begin + s.count);
    cells += s.count * s.count;
    largest = std::max(largest, s.count * s.count);
    blocks += (s.count + kLatentPage - 1) / kLatentPage;
    tiles += (s.count * heads + kTileQueries - 1) / kTileQueries;
  }
  if (rows == 0) return;

  Scratch::Mark mark(ctx.scratch);
  float* const delta = ctx.scratch.take<float>(end * heads);
  const auto work_of = [&](const Slice& s) {
    return SliceWork{shape,
                     s.count,
                     q + s.begin * heads * width,
                     c + s.begin * width,
                     lse + s.begin * heads,
                     dout + s.begin * heads * latent,
                     delta + s.begin * heads,
                     dq + s.begin * heads * width,
                     dc + s.begin * width};
  };
  const int64_t slice_count = static_cast<int64_t>(slices.size());
  mla::for_tasks(ctx, slice_count, 0, [&](int64_t i, float*) {
    const Slice& s = slices[static_cast<size_t>(i)];
    for (int64_t r = s.begin * heads; r < (s.begin + s.count) * heads; ++r)
      delta[r] = simd::dot(dout + r * latent, out + r * latent, latent);
  });

  if (largest * ctx.pool.size() <= cells || ctx.pool.size() == 1) {
    mla::for_tasks(ctx, slice_count, Buffers::floats(shape), [&](int64_t i, float* memory) {
      const SliceWork work = work_of(slices[static_cast<size_t>(i)]);
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
    const Slice* slice;
    int64_t index;
    bool is_block;  // a block of keys for dc, or a tile of queries for dq
  };
  Task* const tasks = ctx.scratch.take<Task>(blocks + tiles);
  int64_t n = 0;
  for (const Slice& s : slices) {
    const SliceWork work = work_of(s);
    for (int64_t b = 0; b < work.blocks(); ++b) tasks[n++] = {&s, b, true};
  }
  for (const Slice& s : slices) {
    const SliceWork work = work_of(s);
    for (int64_t t = work.tiles() - 1; t >= 0; --t) tasks[n++] = {&s, t, false};
  }
  mla::for_tasks(ctx, n, Buffers::floats(shape), [&](int64_t i, float* memory) {
    const SliceWork work = work_of(*tasks[i].slice);
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

}  // namespace perigee::kernels
