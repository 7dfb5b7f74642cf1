// Which rows a block of a grouped product works on, when only the device knows how many rows each expert has.
#pragma once
#include <cstdint>

namespace perigee::kernels {

struct ExpertTile {
  int expert = -1;  // -1: there are fewer tiles
  int begin = 0;    // first slot
  int rows = 0;     // of the expert from there, which may be more than a tile
};

// Finds the index-th tile of `height` slots, every expert's tiles counted in order. Indices must not fall from call to
// call; the cursor remembers how far it read. Called by whole warps.
class ExpertCursor {
 public:
  __device__ __forceinline__ ExpertTile find(const int32_t* offsets, int experts, int height, int64_t index) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    for (; first_ < experts; first_ += 32) {
      const int e = first_ + lane;
      const int begin = e < experts ? offsets[e] : 0, end = e < experts ? offsets[e + 1] : 0;
      const int tiles = (end - begin + height - 1) / height;
      int upto = tiles;
      for (int s = 1; s < 32; s *= 2) {
        const int left = __shfl_up_sync(0xffffffffu, upto, s);
        if (lane >= s) upto += left;
      }
      const unsigned past = __ballot_sync(0xffffffffu, before_ + upto > index);
      if (past != 0) {
        const int which = __ffs(past) - 1;
        const int skipped = __shfl_sync(0xffffffffu, upto - tiles, which);
        const int from = __shfl_sync(0xffffffffu, begin, which), to = __shfl_sync(0xffffffffu, end, which);
        ExpertTile t;
        t.expert = first_ + which;
        t.begin = from + static_cast<int>(index - before_ - skipped) * height;
        t.rows = to - t.begin;
        return t;
      }
      before_ += __shfl_sync(0xffffffffu, upto, 31);
    }
    return {};
  }

 private:
  int first_ = 0;       // a multiple of 32
  int64_t before_ = 0;  // tiles of experts below first_
};

}  // namespace perigee::kernels
