// The sizes of softmax attention, on the CPU and on the device.
#pragma once
#include <cstdint>

namespace perigee::kernels {

// heads % kv_heads == 0: query head h reads the keys and values of head h / (heads / kv_heads).
struct AttentionShape {
  int64_t heads = 0, kv_heads = 0;
  int64_t dim = 0;  // of a head: of its query, its key and its value
  float scale = 0;  // dim^-1/2
  int64_t group() const { return heads / kv_heads; }
  int64_t q_width() const { return heads * dim; }
  // A token's row in a page: its keys [kv_heads, dim], then its values [kv_heads, dim].
  int64_t kv_width() const { return 2 * kv_heads * dim; }
};

}  // namespace perigee::kernels
