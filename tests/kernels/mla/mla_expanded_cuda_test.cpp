// Prompts with the keys of every head written out, against the definition in double.
#include <algorithm>

#include "kernels/gemm/gemm_device.h"
#include "kernels/mla/mla_device.h"
#include "kernels/mla/mla_expanded_device.h"
#include "tests/kernels/device_fixture.h"
#include "tests/kernels/mla/testing.h"

namespace perigee::kernels {
namespace {

using testing::normals;
using MlaExpanded = DeviceTest;

constexpr int64_t kNope = kExpandedNope, kRope = kExpandedRope, kValue = kExpandedValue;

double wide(const std::vector<bf16>& x, int64_t i) {
  return from_bf16(x[static_cast<size_t>(i)].bits);
}

// Rows of sequences in one batch, and keys of all their positions.
struct Case {
  ExpandedShape shape;
  std::vector<DeviceSlice> slices;
  std::vector<bf16> q;                          // [rows, heads * 192]
  std::vector<std::vector<bf16>> k, common, v;  // of each slice's sequence
  int64_t rows = 0;

  Case(int64_t heads, const std::vector<DeviceSlice>& parts, float q_scale = 1.0f)
      : shape{heads, 64, 0.0721687824f} {
    uint64_t seed = 3;
    for (DeviceSlice s : parts) {
      s.begin = static_cast<int32_t>(rows);
      rows += s.count;
      slices.push_back(s);
      const int64_t keys = s.position + s.count;
      k.push_back(narrow(normals(keys * heads * kNope, ++seed)));
      common.push_back(narrow(normals(keys * kRope, ++seed)));
      v.push_back(narrow(normals(keys * heads * kValue, ++seed)));
    }
    q = narrow(normals(rows * heads * (kNope + kRope), 2, q_scale));
  }

  std::vector<bf16> attend(Device& device, int64_t least_rows, int64_t arena, bool* merges = nullptr) const {
    const ExpandedPlan plan = plan_expanded(slices, least_rows, arena);
    if (merges != nullptr) *merges = plan.merges;
    const DeviceArray<DeviceSlice> slice(device, slices);
    DeviceBatch batch;
    batch.rows = static_cast<int32_t>(rows);
    batch.slices = static_cast<int32_t>(slices.size());
    batch.slice = slice;
    const int64_t heads = shape.heads, width = shape.latent + kRope;
    const DeviceArray<bf16> queries(device, q), out(device, rows * heads * kValue);
    const DeviceArray<float> partial(device, rows * heads * kValue), log_sum(device, rows * heads);
    for (const ExpandedRound& round : plan.rounds) {
      const std::vector<ExpandedPiece> pieces(plan.pieces.begin() + round.first_piece,
                                              plan.pieces.begin() + round.first_piece + round.pieces);
      EXPECT_LE(round.rows, arena);
      const auto array = [&](int64_t row) {
        return std::vector<bf16>(static_cast<size_t>(round.rows * row));
      };
      std::vector<bf16> c = array(width), keys = array(heads * kNope), values = array(heads * kValue);
      for (const ExpandedPiece& p : pieces) {
        const auto put = [&](std::vector<bf16>& to, int64_t ld, int64_t column, const std::vector<bf16>& from,
                             int64_t row) {
          for (int64_t i = 0; i < p.keys; ++i)
            std::copy_n(from.begin() + (p.key_begin + i) * row, row,
                        to.begin() + (p.arena + i) * ld + column);
        };
        const auto s = static_cast<size_t>(p.slice);
        put(c, width, shape.latent, common[s], kRope);
        put(keys, heads * kNope, 0, k[s], heads * kNope);
        put(values, heads * kValue, 0, v[s], heads * kValue);
      }
      const DeviceArray<ExpandedPiece> piece(device, pieces);
      const DeviceArray<bf16> dc(device, c), dk(device, keys), dv(device, values);
      attend_expanded(device, shape, batch, queries, piece, round, dc, dk, dv, partial, log_sum, out);
      device.synchronize();
    }
    return out.get();
  }

  // Row r of a slice by the definition.
  std::vector<double> reference(size_t slice, int64_t r) const {
    const DeviceSlice& s = slices[slice];
    const int64_t heads = shape.heads, last = s.position + r;
    std::vector<double> out;
    for (int64_t h = 0; h < heads; ++h) {
      std::vector<double> w;
      double most = -INFINITY, sum = 0;
      const int64_t row = ((s.begin + r) * heads + h) * (kNope + kRope);
      for (int64_t i = 0; i <= last; ++i) {
        double dot = 0;
        for (int64_t j = 0; j < kNope; ++j)
          dot += wide(q, row + j) * wide(k[slice], (i * heads + h) * kNope + j);
        for (int64_t j = 0; j < kRope; ++j)
          dot += wide(q, row + kNope + j) * wide(common[slice], i * kRope + j);
        w.push_back(dot * static_cast<double>(shape.scale));
        most = std::max(most, w.back());
      }
      for (double& x : w) sum += x = std::exp(x - most);
      for (int64_t j = 0; j < kValue; ++j) {
        double o = 0;
        for (int64_t i = 0; i <= last; ++i)
          o += w[static_cast<size_t>(i)] / sum * wide(v[slice], (i * heads + h) * kValue + j);
        out.push_back(o);
      }
    }
    return out;
  }

  void expect_close(const std::vector<bf16>& out, int64_t step = 1) const {
    const int64_t n = shape.heads * kValue;
    double worst = 0;
    for (size_t s = 0; s < slices.size(); ++s)
      for (int64_t r = 0; r < slices[s].count; r += step) {
        const int64_t row = slices[s].begin + r;
        const std::vector<bf16> got(out.begin() + row * n, out.begin() + (row + 1) * n);
        const double error = relative_error(got, reference(s, r));
        worst = std::max(worst, error);
        // Two roundings to bf16, of the weights and of the result, of 2^-9 at most and half of that in the mean square.
        ASSERT_LT(error, 1.0 / 256) << "slice " << s << " row " << r;
      }
    std::printf("largest error of a row %.2e\n", worst);
  }
};

TEST_F(MlaExpanded, EqualsReference) {
  const Case z(3, {{0, 300, 0, 0}, {0, 1, 0, 0}, {0, 200, 100, 0}, {0, 128, 256, 0}, {0, 77, 1000, 0}});
  z.expect_close(z.attend(device(), 1, 4096));
  const Case sharp(2, {{0, 260, 3, 0}}, 8.0f);
  sharp.expect_close(sharp.attend(device(), 1, 4096));
}

// Keys in several rounds: pieces of 128 and 256 keys, rows before and behind a piece's first key, merged.
TEST_F(MlaExpanded, MergesRounds) {
  const Case z(3, {{0, 300, 0, 0}, {0, 200, 100, 0}, {0, 77, 1000, 0}, {0, 500, 77, 0}});
  for (int64_t arena : {128, 256, 640}) {
    bool merges = false;
    z.expect_close(z.attend(device(), 1, arena, &merges), 3);
    EXPECT_TRUE(merges);
  }
}

// What a row's neighbours hold does not matter, nor what lies in other pieces.
TEST_F(MlaExpanded, SlicesStandAlone) {
  Case z(2, {{0, 200, 30, 0}, {0, 150, 0, 0}});
  const std::vector<bf16> clean = z.attend(device(), 1, 4096);
  for (auto* x : {&z.k[1], &z.common[1], &z.v[1]})
    for (bf16& e : *x) e.bits = 0x7fc0;
  for (size_t i = 200 * 2 * 192; i < z.q.size(); ++i) z.q[i].bits = 0x7fc0;
  const std::vector<bf16> got = z.attend(device(), 1, 4096);
  EXPECT_EQ(std::memcmp(got.data(), clean.data(), 200 * 2 * 128 * sizeof(bf16)), 0);
}

TEST(MlaExpandedPlan, CutsKeysIntoRounds) {
  const std::vector<DeviceSlice> slices = {
      {0, 100, 0, 0}, {100, 10, 5, 0}, {110, 300, 900, 0}, {410, 200, 0, 0}};
  const ExpandedPlan plan = plan_expanded(slices, 64, 512);
  std::vector<int64_t> next(slices.size());
  for (const ExpandedRound& round : plan.rounds) {
    int32_t tiles = 0, row = 0;
    for (int32_t i = 0; i < round.pieces; ++i) {
      const ExpandedPiece& p = plan.pieces[static_cast<size_t>(round.first_piece + i)];
      const DeviceSlice& s = slices[static_cast<size_t>(p.slice)];
      EXPECT_EQ(p.tiles_before, tiles);
      EXPECT_EQ(p.arena, row);
      EXPECT_EQ(p.key_begin, next[static_cast<size_t>(p.slice)]);
      next[static_cast<size_t>(p.slice)] += p.keys;
      EXPECT_EQ(p.key_begin % kExpandedTile, 0);
      EXPECT_GT(p.tiles, 0);
      // The first tile has a row that sees the piece's first key; the one before has none.
      EXPECT_GE(s.position + std::min((p.first_tile + 1) * 128, s.count) - 1, p.key_begin);
      EXPECT_TRUE(p.first_tile == 0 || s.position + p.first_tile * 128 - 1 < p.key_begin);
      tiles += p.tiles;
      row += static_cast<int32_t>((p.keys + 127) / 128 * 128);
    }
    EXPECT_EQ(round.tiles, tiles);
    EXPECT_EQ(round.rows, row);
    EXPECT_LE(round.rows, 512);
  }
  EXPECT_EQ(next, (std::vector<int64_t>{100, 0, 1200, 200}));
  EXPECT_TRUE(plan.merges);
}

TEST_F(MlaExpanded, GathersLatents) {
  Device& d = device();
  const ExpandedShape shape{2, 128, 1.0f};
  const MlaShape mla{2, 128, 64, 1.0f};
  const int64_t width = mla.width(), page_bytes = latent_page_bytes<bf16>(mla), offset = 256;
  const std::vector<DeviceSlice> slices = {{0, 70, 0, 0}, {70, 100, 33, 0}};
  const int64_t max_pages = 3;
  std::vector<std::vector<float>> rows;
  std::vector<std::unique_ptr<DeviceArray<std::byte>>> memory;
  std::vector<std::byte*> pages(2 * max_pages, nullptr);
  for (int64_t s = 0; s < 2; ++s) {
    rows.push_back(widen(narrow(normals(192 * width, 5 + static_cast<uint64_t>(s)))));
    for (int64_t p = 0; p < 3; ++p) {
      std::vector<bf16> tiles(static_cast<size_t>(page_bytes / 2));
      pack_tiles(rows.back().data() + p * 64 * width, 64, width, tiles.data());
      std::vector<std::byte> block(static_cast<size_t>(offset + page_bytes));
      std::memcpy(block.data() + offset, tiles.data(), static_cast<size_t>(page_bytes));
      memory.push_back(std::make_unique<DeviceArray<std::byte>>(d, block));
      pages[static_cast<size_t>(s * max_pages + p)] = *memory.back();
    }
  }
  const DeviceArray<std::byte*> table(d, pages);
  const DeviceArray<DeviceSlice> slice(d, slices);
  DeviceBatch batch;
  batch.rows = 170;
  batch.slices = 2;
  batch.max_pages = static_cast<int32_t>(max_pages);
  batch.slice = slice;
  batch.pages = table;
  const ExpandedPlan plan = plan_expanded(slices, 1, 256);
  for (const ExpandedRound& round : plan.rounds) {
    const std::vector<ExpandedPiece> pieces(plan.pieces.begin() + round.first_piece,
                                            plan.pieces.begin() + round.first_piece + round.pieces);
    const DeviceArray<ExpandedPiece> piece(d, pieces);
    const DeviceArray<bf16> c(d, round.rows * width);
    gather_latents(d, shape, batch, offset, piece, round, c);
    const std::vector<float> got = widen(c.get());
    std::vector<float> want(got.size());
    for (const ExpandedPiece& p : pieces)
      std::copy_n(rows[static_cast<size_t>(p.slice)].begin() + p.key_begin * width, p.keys * width,
                  want.begin() + p.arena * width);
    EXPECT_EQ(first_difference(got, want), -1);
  }
}

}  // namespace
}  // namespace perigee::kernels
