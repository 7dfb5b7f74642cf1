// Latent attention of prompts with the keys and values of every head written out (bf16, numerics `fast`). The absorbed
// form of mla_device.h multiplies 576 + 512 columns for a key and head; written out they are 192 + 128, at the price of
// making them once for each call that needs them. The results are those of the absorbed form up to rounding, not to the bit.
//
// Keys are written out for one ROUND at a time into an arena of bounded size: pieces of the sequences, in order. A row
// attends to the pieces of its sequence one after the other; what a piece gave is merged with those before it by their
// log-sums.
//
//   plan = plan_expanded(slices, arena rows)                     (host)
//   for each round: gather_latents -> keys = c Wk, values = c Wv of every head (kernels/gemm) -> attend_expanded
#pragma once
#include <cstdint>
#include <span>
#include <vector>

#include "kernels/device/batch.h"
#include "kernels/device/device.h"

namespace perigee::kernels {

// A head's key is kNope columns of its own and kRope that all heads share; its value has kValue.
inline constexpr int64_t kExpandedNope = 128, kExpandedRope = 64, kExpandedValue = 128;
inline constexpr int64_t kExpandedTile = 128;  // rows, and keys

struct ExpandedShape {
  int64_t heads = 0, latent = 0;  // latent a multiple of 64
  float scale = 0;                // of the scores
};
// Whether this device computes it, for a model of these sizes.
bool expanded_supported(const Device& device, int64_t latent, int64_t nope, int64_t rope, int64_t value);

// Some keys of a slice's sequence, and the tiles of the slice's rows that see any of them.
struct ExpandedPiece {
  int32_t slice = 0;
  int32_t key_begin = 0, keys = 0;  // positions in the sequence; key_begin is a multiple of kExpandedTile
  int32_t arena = 0;                // where key_begin lies: a row of the arena, a multiple of kExpandedTile
  int32_t first_tile = 0, tiles = 0;
  int32_t tiles_before = 0;  // in the round
};
struct ExpandedRound {
  int32_t first_piece = 0, pieces = 0;
  int32_t rows = 0;   // of the arena, a multiple of kExpandedTile
  int32_t tiles = 0;  // of rows of the batch
};
struct ExpandedPlan {
  std::vector<ExpandedPiece> pieces;
  std::vector<ExpandedRound> rounds;
  bool merges = false;  // some row's keys are in several rounds
};
// slices: host; those with fewer rows than least_rows are left out. arena: rows, a multiple of kExpandedTile.
ExpandedPlan plan_expanded(std::span<const DeviceSlice> slices, int64_t least_rows, int64_t arena);
// Rows from which writing the keys out pays: their making costs what 171 rows save.
inline constexpr int64_t kExpandedLeastRows = 192;

// The latent rows of a round, from the pages: c [round.rows, latent + rope], zero where a piece's last tile has no keys.
// pieces: device, the round's.
void gather_latents(Device& device, const ExpandedShape& shape, const DeviceBatch& batch, int64_t page_offset,
                    const ExpandedPiece* pieces, const ExpandedRound& round, bf16* c);

// q [batch.rows, heads * (nope + rope)]; c, keys [round.rows, heads * nope] and values [round.rows, heads * value] of the
// round -> out [batch.rows, heads * value] on the rows whose last keys these are. partial [batch.rows, heads * value] and
// log_sum [batch.rows, heads] carry the others' results from round to round (null when the plan does not merge).
// All aligned to 16 bytes. ASYNC on the device's stream.
void attend_expanded(Device& device, const ExpandedShape& shape, const DeviceBatch& batch, const bf16* q,
                     const ExpandedPiece* pieces, const ExpandedRound& round, const bf16* c, const bf16* keys,
                     const bf16* values, float* partial, float* log_sum, bf16* out);

}  // namespace perigee::kernels
