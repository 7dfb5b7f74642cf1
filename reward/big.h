// Non-negative integers of any size, as much of them as comparing rationals takes.
#pragma once
#include <algorithm>
#include <cstdint>
#include <string_view>
#include <vector>

namespace perigee::reward {

class Big {
 public:
  Big() = default;
  explicit Big(std::string_view decimal_digits) {  // REQUIRES only '0'..'9'
    for (size_t end = decimal_digits.size(); end > 0;) {
      const size_t begin = end > 9 ? end - 9 : 0;
      uint32_t limb = 0;
      for (size_t i = begin; i < end; ++i) limb = limb * 10 + static_cast<uint32_t>(decimal_digits[i] - '0');
      limbs_.push_back(limb);
      end = begin;
    }
    shrink();
  }
  bool zero() const { return limbs_.empty(); }

  int64_t decimal_digits() const {
    if (zero()) return 0;
    int64_t n = 9 * static_cast<int64_t>(limbs_.size() - 1);
    for (uint32_t top = limbs_.back(); top > 0; top /= 10) ++n;
    return n;
  }

  friend Big operator*(const Big& a, const Big& b) {
    Big r;
    r.limbs_.assign(a.limbs_.size() + b.limbs_.size(), 0);
    for (size_t i = 0; i < a.limbs_.size(); ++i) {
      uint64_t carry = 0;
      for (size_t j = 0; j < b.limbs_.size() || carry > 0; ++j) {
        const uint64_t product = j < b.limbs_.size() ? static_cast<uint64_t>(a.limbs_[i]) * b.limbs_[j] : 0;
        const uint64_t sum = r.limbs_[i + j] + product + carry;
        r.limbs_[i + j] = static_cast<uint32_t>(sum % kBase);
        carry = sum / kBase;
      }
    }
    r.shrink();
    return r;
  }
  friend Big operator+(const Big& a, const Big& b) {
    Big r;
    uint32_t carry = 0;
    for (size_t i = 0; i < std::max(a.limbs_.size(), b.limbs_.size()) || carry > 0; ++i) {
      const uint32_t sum = a.limb(i) + b.limb(i) + carry;
      r.limbs_.push_back(sum % kBase);
      carry = sum / kBase;
    }
    return r;
  }
  // |a - b|
  friend Big difference(const Big& a, const Big& b) {
    if (compare(a, b) < 0) return difference(b, a);
    Big r;
    int64_t borrow = 0;
    for (size_t i = 0; i < a.limbs_.size(); ++i) {
      int64_t d = static_cast<int64_t>(a.limbs_[i]) - b.limb(i) - borrow;
      borrow = d < 0;
      if (d < 0) d += kBase;
      r.limbs_.push_back(static_cast<uint32_t>(d));
    }
    r.shrink();
    return r;
  }
  friend int compare(const Big& a, const Big& b) {
    if (a.limbs_.size() != b.limbs_.size()) return a.limbs_.size() < b.limbs_.size() ? -1 : 1;
    for (size_t i = a.limbs_.size(); i-- > 0;)
      if (a.limbs_[i] != b.limbs_[i]) return a.limbs_[i] < b.limbs_[i] ? -1 : 1;
    return 0;
  }
  static Big power_of_10(int64_t exponent) {
    Big r;
    r.limbs_.assign(static_cast<size_t>(exponent / 9), 0);
    uint32_t top = 1;
    for (int64_t i = 0; i < exponent % 9; ++i) top *= 10;
    r.limbs_.push_back(top);
    return r;
  }

 private:
  static constexpr uint32_t kBase = 1'000'000'000;
  uint32_t limb(size_t i) const { return i < limbs_.size() ? limbs_[i] : 0; }
  void shrink() {
    while (!limbs_.empty() && limbs_.back() == 0) limbs_.pop_back();
  }
  std::vector<uint32_t> limbs_;  // least significant first, the last not 0
};

}  // namespace perigee::reward
