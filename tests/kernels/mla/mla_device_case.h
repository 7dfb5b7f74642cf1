// Packed batches on the device for the tests of attention.
#pragma once
#include <vector>

#include "kernels/device/batch.h"
#include "tests/kernels/device_fixture.h"
#include "tests/kernels/mla/case.h"

namespace perigee::testing {

// Which rows of a sequence of `length` tokens a batch has.
struct Part {
  int64_t length, position, count;
};

// Several sequences of one shape and the rows of them that one call takes.
class PackedCase {
 public:
  PackedCase(const kernels::MlaShape& shape, const std::vector<Part>& parts, uint64_t seed) : shape_(shape) {
    for (const Part& p : parts) {
      sequences_.emplace_back(shape, p.length, seed + 10 * sequences_.size());
      const Sequence& s = sequences_.back();
      slices_.push_back({rows_, p.count, p.position});
      device_slices_.push_back(
          {static_cast<int32_t>(rows_), static_cast<int32_t>(p.count), static_cast<int32_t>(p.position), 0});
      q_.insert(q_.end(), s.q.begin() + p.position * s.q_row(),
                s.q.begin() + (p.position + p.count) * s.q_row());
      c_.insert(c_.end(), s.c.begin() + p.position * shape.width(),
                s.c.begin() + (p.position + p.count) * shape.width());
      rows_ += p.count;
      max_count_ = std::max(max_count_, p.count);
      max_pages_ = std::max(max_pages_, (p.length + kernels::kLatentPage - 1) / kernels::kLatentPage);
    }
    for (Sequence& s : sequences_) s.lay_out();  // pages point into vectors that have moved
    device_slices_.push_back({0, 0, 0, 0});      // padding
  }

  const kernels::MlaShape& shape() const { return shape_; }
  int64_t rows() const { return rows_; }
  int64_t slice_count() const { return static_cast<int64_t>(device_slices_.size()); }
  const Floats& q() const { return q_; }
  const Floats& c() const { return c_; }
  const std::vector<Sequence>& sequences() const { return sequences_; }
  const std::vector<kernels::Slice>& slices() const { return slices_; }
  const std::vector<kernels::DeviceSlice>& device_slices() const { return device_slices_; }
  std::vector<kernels::MlaSlice> cpu_slices() const {
    std::vector<kernels::MlaSlice> v;
    for (size_t i = 0; i < slices_.size(); ++i) v.push_back({slices_[i], sequences_[i].pages.data()});
    return v;
  }
  kernels::DeviceBatch batch(const kernels::DeviceSlice* slices) const {
    kernels::DeviceBatch b;
    b.rows = static_cast<int32_t>(rows_);
    b.slices = static_cast<int32_t>(device_slices_.size());
    b.max_count = static_cast<int32_t>(max_count_);
    b.max_pages = static_cast<int32_t>(max_pages_);
    b.slice = slices;
    return b;
  }
  int64_t max_pages() const { return max_pages_; }

 private:
  kernels::MlaShape shape_;
  std::vector<Sequence> sequences_;
  std::vector<kernels::Slice> slices_;
  std::vector<kernels::DeviceSlice> device_slices_;
  Floats q_, c_;
  int64_t rows_ = 0, max_count_ = 0, max_pages_ = 0;
};

}  // namespace perigee::testing
