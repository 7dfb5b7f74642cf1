// Tests of device kernels: skipped, saying so, where there is no device.
#pragma once
#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <vector>

#include "kernels/device/device.h"
#include "kernels/gemm/gemm.h"

namespace perigee::kernels {

class DeviceTest : public ::testing::Test {
 protected:
  static constexpr int64_t kScratchBytes = int64_t{2} << 30;
  // One device for all tests of the program: opening one takes a second.
  static Device& device() {
    static Device d(0, kScratchBytes);
    return d;
  }
  void SetUp() override {
    if (Device::count() == 0) GTEST_SKIP() << "skipped: " << Device::why_none();
  }
};

// Device memory of a test, filled with the bits of NaN unless given values, so that what a kernel fails to write shows.
template <class T>
class DeviceArray {
 public:
  DeviceArray(Device& device, int64_t n) : device_(device), n_(n), data_(device.allocate_array<T>(n)) {
    const std::vector<uint8_t> poison(static_cast<size_t>(n) * sizeof(T), 0xff);
    device_.copy_in(data_, poison.data(), bytes());
    device_.synchronize();
  }
  DeviceArray(Device& device, const std::vector<T>& values)
      : device_(device), n_(static_cast<int64_t>(values.size())), data_(device.allocate_array<T>(n_)) {
    device_.copy_in(data_, values.data(), bytes());
    device_.synchronize();
  }
  ~DeviceArray() { device_.release(data_); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;

  T* data() const { return data_; }
  operator T*() const { return data_; }
  int64_t size() const { return n_; }
  std::vector<T> get() const {
    std::vector<T> v(static_cast<size_t>(n_));
    device_.copy_out(v.data(), data_, bytes());
    return v;
  }

 private:
  int64_t bytes() const { return n_ * static_cast<int64_t>(sizeof(T)); }
  Device& device_;
  int64_t n_;
  T* data_;
};

inline std::vector<bf16> narrow(const std::vector<float>& x) {
  std::vector<bf16> y;
  y.reserve(x.size());
  for (float v : x) y.push_back({to_bf16(v)});
  return y;
}
inline std::vector<float> widen(const std::vector<bf16>& x) {
  std::vector<float> y;
  y.reserve(x.size());
  for (bf16 v : x) y.push_back(from_bf16(v.bits));
  return y;
}

// Index of the first element whose bits differ, or -1. Sizes must agree.
inline int64_t first_difference(const std::vector<float>& a, const std::vector<float>& b) {
  EXPECT_EQ(a.size(), b.size());
  for (size_t i = 0; i < a.size() && i < b.size(); ++i)
    if (std::memcmp(&a[i], &b[i], sizeof(float)) != 0) return static_cast<int64_t>(i);
  return -1;
}

// ||a - b|| / ||b|| against a double reference; infinite when a is not finite.
template <class A>
double relative_error(const std::vector<A>& a, const std::vector<double>& b) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < b.size(); ++i) {
    double x;
    if constexpr (std::is_same_v<A, bf16>) x = from_bf16(a[i].bits);
    else x = a[i];
    difference += (x - b[i]) * (x - b[i]);
    norm += b[i] * b[i];
  }
  return std::isfinite(difference) ? std::sqrt(difference / (norm > 0 ? norm : 1)) : INFINITY;
}

}  // namespace perigee::kernels
