// Attention, forwards, and latent attention as the case of it in which every head reads the same row.
//
// Whether spans are computed one after the other (prefill) or by several threads (decoding one long sequence), the
// operations are the same ones.
#include <cfloat>
#include <cmath>
#include <limits>

#include "kernels/mla/attend.h"
#include "kernels/mla/mla.h"
#include "kernels/mla/tile.h"
#include "kernels/mla/work.h"

namespace perigee::kernels {
namespace mla {
namespace {

using simd::F16;

constexpr int64_t kSpan = 8 * kLatentPage;
// Queries that share one turned block: turning it is then a few percent of the work.
constexpr int64_t kTileQueries = 192;
// A tile this small is worth cutting along the keys: its partial results are small.
constexpr int64_t kSplitQueries = 64;

struct Tile {
  const Stream* stream;
  int64_t first, count;  // queries of the stream
};

// Attention over one span, not yet normalised: sum_i exp(s_i - maximum) v_i, and the sum of the weights.
struct Partial {
  float* o;        // [count, values]
  float* maximum;  // [count]
  float* sum;      // [count]
};

struct Buffers {
  float *turned, *scores, *alpha;
  Partial span, total;
  static int64_t floats(const AttendShape& s) {
    return turned_floats(kRun) + kTileQueries * (kLatentPage + s.values + 5);
  }
  explicit Buffers(float* p) {
    turned = p, p += turned_floats(kRun);
    scores = p, p += kTileQueries * kLatentPage;
    alpha = p, p += kTileQueries;
    span.maximum = p, p += kTileQueries;
    span.sum = p, p += kTileQueries;
    total.maximum = p, p += kTileQueries;
    total.sum = p, p += kTileQueries;
    span.o = p;
    total.o = nullptr;  // the output itself
  }
};

class TileWork {
 public:
  TileWork(const AttendShape& shape, const Tile& tile)
      : shape_(shape), tile_(tile), stream_(*tile.stream), q_(tile.stream->q + tile.first * shape.width) {}

  // Keys that query i of the tile attends to.
  int64_t keys(int64_t i) const { return stream_.position + (tile_.first + i) / shape_.heads + 1; }
  int64_t spans() const { return (keys(tile_.count - 1) + kSpan - 1) / kSpan; }
  // The first query of the tile that attends to key k.
  int64_t first_query(int64_t k) const {
    return std::clamp<int64_t>((k - stream_.position) * shape_.heads - tile_.first, 0, tile_.count);
  }

  void attend(int64_t span, const Partial& to, const Buffers& buffers) const {
    const int64_t first = first_query(span * kSpan);
    std::fill(to.o + first * shape_.values, to.o + tile_.count * shape_.values, 0.0f);
    std::fill(to.maximum + first, to.maximum + tile_.count, -FLT_MAX);
    std::fill(to.sum + first, to.sum + tile_.count, 0.0f);
    const int64_t end = std::min((span + 1) * kSpan, keys(tile_.count - 1));
    for (int64_t key = span * kSpan; key < end; key += kLatentPage) attend_block(key, to, buffers);
  }

  // total <- total with the later span added, for the queries that have keys in it.
  void merge(int64_t span, const Partial& total, const Partial& part) const {
    for (int64_t i = first_query(span * kSpan); i < tile_.count; ++i) {
      const float m = total.maximum[i] > part.maximum[i] ? total.maximum[i] : part.maximum[i];
      const float a = simd::exp(total.maximum[i] - m), b = simd::exp(part.maximum[i] - m);
      total.maximum[i] = m;
      total.sum[i] = total.sum[i] * a + part.sum[i] * b;
      float* const o = total.o + i * shape_.values;
      const float* const p = part.o + i * shape_.values;
      const F16 av = simd::set1(a), bv = simd::set1(b);
      int64_t j = 0;
      for (; j + 16 <= shape_.values; j += 16)
        simd::store(o + j, simd::fma(simd::load(p + j), bv, simd::mul(simd::load(o + j), av)));
      for (; j < shape_.values; ++j) o[j] = __builtin_fmaf(p[j], b, o[j] * a);
    }
  }

  void finish(const Partial& total, float* lse) const {
    for (int64_t i = 0; i < tile_.count; ++i) {
      const float sum = total.sum[i], inverse = 1.0f / sum;
      float* const o = total.o + i * shape_.values;
      int64_t j = 0;
      for (; j + 16 <= shape_.values; j += 16)
        simd::store(o + j, simd::mul(simd::load(o + j), simd::set1(inverse)));
      for (; j < shape_.values; ++j) o[j] *= inverse;
      // simd::log reads the bits of a finite number; anything else passes as it is.
      if (lse != nullptr) lse[i] = sum > 0 && sum <= FLT_MAX ? total.maximum[i] + simd::log(sum) : NAN;
    }
  }

 private:
  void attend_block(int64_t key, const Partial& to, const Buffers& buffers) const {
    const int64_t width = shape_.width, values = shape_.values, row = shape_.row;
    const int64_t first = first_query(key), count = tile_.count - first;
    const int64_t present = std::min(kLatentPage, keys(tile_.count - 1) - key);
    const int64_t lanes = round_up_16(present);
    const float* const keys_of = stream_.pages[key / kLatentPage] + stream_.key_at;
    const float* const values_of = stream_.pages[key / kLatentPage] + stream_.value_at;
    const bool more = key + kLatentPage < keys(tile_.count - 1);
    const float* const next = more ? stream_.pages[key / kLatentPage + 1] + stream_.key_at : nullptr;
    for (int64_t k = 0; k < width; k += kRun) {
      const int64_t run = std::min(kRun, width - k);
      turn_block(keys_of + k, present, row, run, next == nullptr ? nullptr : next + k, buffers.turned);
      run_product(q_ + first * width, k, run, width, buffers.turned, 16 * run, buffers.scores, count, lanes);
    }
    softmax(buffers, first, count, key, lanes, to);

    // Groups of queries that see the same keys go together; where the diagonal passes through a group, the keys that
    // all see go first and each query then continues its own chain. A key that a row does not see is never multiplied
    // by a zero weight: 0 * NaN is NaN, and -0 + 0 is not -0.
    for (int64_t i = 0; i < count;) {
      const int64_t common = std::min(kLatentPage, keys(first + i) - key);
      const int64_t n = common == kLatentPage ? count - i : std::min<int64_t>(count - i, kTileRows);
      float* const o = to.o + (first + i) * values;
      const float* const p = buffers.scores + i * kLatentPage;
      tile_product<Start::kScale>(
          {common, p, kLatentPage, 1, values_of, row, 16, o, values, buffers.alpha + i}, n, values);
      for (int64_t k = 0; k < n; ++k) {
        const int64_t seen = std::min(kLatentPage, keys(first + i + k) - key);
        if (seen > common)
          tile_product<Start::kLoad>({seen - common, p + k * kLatentPage + common, kLatentPage, 1,
                                      values_of + common * row, row, 16, o + k * values, values, nullptr},
                                     1, values);
      }
      i += n;
    }
  }

  // The scores of `count` queries from `first` against one block: products on entry, weights exp(s - maximum) on return;
  // alpha is the factor that takes what was summed so far to the new maximum. The factors of all queries are taken
  // together, sixteen at a time.
  void softmax(const Buffers& buffers, int64_t first, int64_t count, int64_t key, int64_t lanes,
               const Partial& to) const {
    const F16 scale = simd::set1(shape_.scale);
    float* const maximum = to.maximum + first;
    for (int64_t i = 0; i < count; ++i) {
      float* const scores = buffers.scores + i * kLatentPage;
      const int64_t seen = std::min(kLatentPage, keys(first + i) - key);
      F16 top = simd::set1(-FLT_MAX);
      for (int64_t j = 0; j < lanes; j += 16)
        simd::store(scores + j, simd::mul(simd::load(scores + j), scale));
      for (int64_t j = seen; j < lanes; ++j) scores[j] = -std::numeric_limits<float>::infinity();
      for (int64_t j = 0; j < lanes; j += 16) top = simd::max(simd::load(scores + j), top);
      const float block_max = simd::reduce_max(top);
      const float next = block_max > maximum[i] ? block_max : maximum[i];
      buffers.alpha[i] = maximum[i] - next;
      maximum[i] = next;
    }
    for (int64_t i = 0; i < count; i += 16) {
      const int n = static_cast<int>(std::min<int64_t>(16, count - i));
      simd::store_partial(buffers.alpha + i, simd::exp(simd::load_partial(buffers.alpha + i, n)), n);
    }
    for (int64_t i = 0; i < count; ++i) {
      float* const scores = buffers.scores + i * kLatentPage;
      const F16 top = simd::set1(maximum[i]);
      F16 total = simd::zero();
      for (int64_t j = 0; j < lanes; j += 16) {
        const F16 p = simd::exp(simd::sub(simd::load(scores + j), top));
        simd::store(scores + j, p);
        total = simd::add(total, p);
      }
      to.sum[first + i] = to.sum[first + i] * buffers.alpha[i] + simd::reduce_add(total);
    }
  }

  const AttendShape& shape_;
  const Tile tile_;
  const Stream& stream_;
  const float* const q_;
};

}  // namespace

void attend(Context& ctx, const AttendShape& shape, std::span<const Stream> streams) {
  const int threads = ctx.pool.size();
  int64_t queries = 0;
  for (const Stream& s : streams) queries += s.count * shape.heads;
  // Smaller tiles when there would be too few for the threads; not so small that turning blocks dominates.
  const int64_t tile_queries = std::clamp<int64_t>((queries / (4 * threads) + 5) / 6 * 6,
                                                   std::min<int64_t>(24, kTileQueries), kTileQueries);
  int64_t tile_count = 0;
  for (const Stream& s : streams) tile_count += (s.count * shape.heads + tile_queries - 1) / tile_queries;
  if (tile_count == 0) return;

  Scratch::Mark mark(ctx.scratch);
  Tile* const tiles = ctx.scratch.take<Tile>(tile_count);
  int64_t t = 0, largest = 0, spans = 0;
  for (const Stream& s : streams)
    for (int64_t r = 0, n = s.count * shape.heads; r < n; r += tile_queries) {
      tiles[t] = {&s, r, std::min(tile_queries, n - r)};
      largest = std::max(largest, tiles[t].count);
      spans += TileWork(shape, tiles[t]).spans();
      ++t;
    }
  const auto output = [&](const Tile& tile, const Partial& total) {
    Partial p = total;
    p.o = tile.stream->out + tile.first * shape.values;
    return p;
  };
  const auto lse_of = [](const Tile& tile) {
    return tile.stream->lse == nullptr ? nullptr : tile.stream->lse + tile.first;
  };

  if (threads == 1 || tile_count >= 2 * threads || spans == tile_count || largest > kSplitQueries) {
    // Later tiles have more keys: claimed first, they leave no long tail.
    for_tasks(ctx, tile_count, Buffers::floats(shape), [&](int64_t i, float* memory) {
      const Tile& tile = tiles[tile_count - 1 - i];
      const Buffers buffers(memory);
      const TileWork work(shape, tile);
      const Partial total = output(tile, buffers.total);
      work.attend(0, total, buffers);
      for (int64_t span = 1; span < work.spans(); ++span) {
        work.attend(span, buffers.span, buffers);
        work.merge(span, total, buffers.span);
      }
      work.finish(total, lse_of(tile));
    });
    return;
  }

  // A few rows over many keys: every (tile, span) is a task of its own, merged afterwards in the same order.
  struct Piece {
    int64_t tile, span;
    Partial partial;
  };
  Piece* const pieces = ctx.scratch.take<Piece>(spans);
  int64_t n = 0;
  for (int64_t i = 0; i < tile_count; ++i)
    for (int64_t span = 0, e = TileWork(shape, tiles[i]).spans(); span < e; ++span) {
      float* const p = ctx.scratch.take<float>(tiles[i].count * (shape.values + 2));
      pieces[n++] = {i, span, {p + 2 * tiles[i].count, p, p + tiles[i].count}};
    }
  for_tasks(ctx, spans, Buffers::floats(shape), [&](int64_t i, float* memory) {
    TileWork(shape, tiles[pieces[i].tile]).attend(pieces[i].span, pieces[i].partial, Buffers(memory));
  });
  for (int64_t i = 0; i < spans; ++i) {
    const Tile& tile = tiles[pieces[i].tile];
    const TileWork work(shape, tile);
    int64_t j = i;
    const Partial total = output(tile, pieces[i].partial);
    std::copy_n(pieces[i].partial.o, tile.count * shape.values, total.o);
    while (j + 1 < spans && pieces[j + 1].tile == pieces[i].tile) {
      ++j;
      work.merge(pieces[j].span, total, pieces[j].partial);
    }
    work.finish(total, lse_of(tile));
    i = j;
  }
}

}  // namespace mla

void mla_forward(Context& ctx, const MlaShape& shape, const float* q, std::span<const MlaSlice> slices,
                 float* out, float* lse) {
  const int64_t heads = shape.heads, width = shape.width(), latent = shape.latent;
  PERIGEE_CHECK(heads > 0 && latent > 0 && shape.rope >= 0, "heads {} latent {} rope {}", heads, latent,
                shape.rope);
  Scratch::Mark mark(ctx.scratch);
  auto* const streams = ctx.scratch.take<mla::Stream>(static_cast<int64_t>(slices.size()));
  for (size_t i = 0; i < slices.size(); ++i) {
    const Slice& s = slices[i].slice;
    PERIGEE_CHECK(s.count >= 0 && s.position >= 0, "count {} position {}", s.count, s.position);
    streams[i] = {s.count,
                  s.position,
                  slices[i].pages,
                  0,
                  0,
                  q + s.begin * heads * width,
                  out + s.begin * heads * latent,
                  lse == nullptr ? nullptr : lse + s.begin * heads};
  }
  mla::attend(ctx, {heads, width, latent, width, shape.scale}, {streams, slices.size()});
}

}  // namespace perigee::kernels
