// What the adapters of one half of a layer keep for its backward. Private to policy.
#pragma once
#include <array>
#include <utility>

#include "base/error.h"

namespace perigee::policy {

// low [rows, rank] of each adapter: scale * (A x). T is the type of activations.
template <class T>
class LowRows {
 public:
  void clear() { count_ = 0; }
  void add(int adapter, T* rows) {
    PERIGEE_CHECK(count_ < all_.size());
    all_[count_++] = {adapter, rows};
  }
  T* of(int adapter) const {
    for (size_t i = 0; i < count_; ++i)
      if (all_[i].first == adapter) return all_[i].second;
    PERIGEE_CHECK(false, "adapter {}", adapter);
    return nullptr;
  }

 private:
  std::array<std::pair<int, T*>, 10> all_;  // the ten matrices of a `dplr` half
  size_t count_ = 0;
};

// What the adapters of the experts' matrices keep for the backward: scale * (A x) [slots, rank] of each part of the tensor
// (AdapterLayout::parts); null: not adapted.
template <class T>
using ExpertLow = std::array<T*, 2>;

}  // namespace perigee::policy
