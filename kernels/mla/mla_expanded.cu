// Prompts with the keys of every head written out: the plan, the latents' way out of the pages, the launch.
#include <algorithm>

#include "kernels/gemm/tensor_map.h"
#include "kernels/mla/mla_expanded_attend.cuh"
#include "kernels/mla/shape.h"

namespace perigee::kernels {
namespace {

// A warp per row of the arena.
__global__ void __launch_bounds__(256)
    gather(const ExpandedPiece* pieces, int count, int rows, const std::byte* const* pages,
           int64_t page_offset, int max_pages, int row_pieces, bf16* c) {
  constexpr int kTileBytes = 8192;
  const int row = static_cast<int>(blockIdx.x) * 8 + static_cast<int>(threadIdx.x / 32),
            lane = static_cast<int>(threadIdx.x % 32);
  if (row >= rows) return;
  int low = 0, high = count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (pieces[middle].arena <= row ? low : high) = middle;
  }
  const ExpandedPiece piece = pieces[low];
  const int at = row - piece.arena, position = piece.key_begin + at;
  uint4* const to = reinterpret_cast<uint4*>(c) + static_cast<int64_t>(row) * row_pieces;
  if (at >= piece.keys) {
    for (int i = lane; i < row_pieces; i += 32) to[i] = uint4{0, 0, 0, 0};
    return;
  }
  const std::byte* const page =
      pages[static_cast<int64_t>(piece.slice) * max_pages + position / kLatentPage] + page_offset;
  const int r = position % static_cast<int>(kLatentPage);
  for (int i = lane; i < row_pieces; i += 32)
    to[i] = *reinterpret_cast<const uint4*>(page + i / 8 * kTileBytes + r * 128 + ((i % 8) ^ (r % 8)) * 16);
}

}  // namespace

bool expanded_supported(const Device& device, int64_t latent, int64_t nope, int64_t rope, int64_t value) {
  return device.info().capability == 90 && latent % 64 == 0 && nope == kExpandedNope &&
         rope == kExpandedRope && value == kExpandedValue;
}

ExpandedPlan plan_expanded(std::span<const DeviceSlice> slices, int64_t least_rows, int64_t arena) {
  PERIGEE_CHECK(arena > 0 && arena % kExpandedTile == 0);
  ExpandedPlan plan;
  ExpandedRound round;
  const auto close = [&] {
    if (round.pieces > 0) plan.rounds.push_back(round);
    round = {static_cast<int32_t>(plan.pieces.size()), 0, 0, 0};
  };
  for (size_t i = 0; i < slices.size(); ++i) {
    const DeviceSlice& s = slices[i];
    if (s.count < least_rows || s.count == 0) continue;
    const int64_t keys = int64_t{s.position} + s.count, tiles = (s.count + kExpandedTile - 1) / kExpandedTile;
    for (int64_t begin = 0; begin < keys;) {
      // What fits whole begins no piece at a round's end.
      if (round.rows == arena || (begin == 0 && keys <= arena && round.rows + keys > arena)) close();
      const int64_t count = std::min(keys - begin, arena - round.rows);
      ExpandedPiece p;
      p.slice = static_cast<int32_t>(i);
      p.key_begin = static_cast<int32_t>(begin);
      p.keys = static_cast<int32_t>(count);
      p.arena = round.rows;
      p.first_tile = static_cast<int32_t>(std::max<int64_t>(0, begin - s.position) / kExpandedTile);
      p.tiles = static_cast<int32_t>(tiles - p.first_tile);
      p.tiles_before = round.tiles;
      plan.pieces.push_back(p);
      round.pieces += 1;
      round.tiles += p.tiles;
      round.rows += static_cast<int32_t>((count + kExpandedTile - 1) / kExpandedTile * kExpandedTile);
      plan.merges = plan.merges || count < keys;
      begin += count;
    }
  }
  close();
  return plan;
}

void gather_latents(Device& device, const ExpandedShape& shape, const DeviceBatch& batch, int64_t page_offset,
                    const ExpandedPiece* pieces, const ExpandedRound& round, bf16* c) {
  gather<<<blocks_for(round.rows, 8), 256, 0, device.stream()>>>(
      pieces, round.pieces, round.rows, batch.pages, page_offset, batch.max_pages,
      static_cast<int>((shape.latent + kExpandedRope) / 8), c);
  PERIGEE_LAUNCHED();
}

void attend_expanded(Device& device, const ExpandedShape& shape, const DeviceBatch& batch, const bf16* q,
                     const ExpandedPiece* pieces, const ExpandedRound& round, const bf16* c, const bf16* keys,
                     const bf16* values, float* partial, float* log_sum, bf16* out) {
  using namespace expanded;
  PERIGEE_CHECK(shape.heads > 0 && shape.latent % 64 == 0 && round.tiles > 0);
  constexpr int kTile = static_cast<int>(kExpandedTile);
  const int64_t chunks = shape.latent / 64;
  Args a{};
  a.q = describe_chunks(q, batch.rows, 3 * shape.heads, kTile, 3);
  a.keys = describe_chunks(keys, round.rows, 2 * shape.heads, kTile, 2);
  a.shared_keys = describe_chunks(c, round.rows, chunks + 1, kTile, 1);
  a.values = describe_chunks(values, round.rows, 2 * shape.heads, kTile, 2);
  a.pieces = pieces;
  a.slices = batch.slice;
  a.piece_count = round.pieces;
  a.heads = static_cast<int>(shape.heads);
  a.shared_chunk = static_cast<int>(chunks);
  a.scale2 = shape.scale * 1.44269504088896341f;
  a.partial = partial;
  a.log_sum = log_sum;
  a.out = out;
  allow_shared_memory(attend, kSharedBytes);
  attend<<<dim3(static_cast<unsigned>(round.tiles), static_cast<unsigned>(shape.heads)), kThreads,
           kSharedBytes, device.stream()>>>(a);
  PERIGEE_LAUNCHED();
}

}  // namespace perigee::kernels
