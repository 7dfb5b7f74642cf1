#include "agents/tools/big_integer.h"

#include <algorithm>
#include <bit>

#include "base/error.h"

namespace perigee::agents {
namespace {

constexpr uint32_t kGroup = 1000000000;  // nine decimal digits: the largest power of ten in a limb
constexpr int kGroupDigits = 9;

}  // namespace

BigInteger::BigInteger(int64_t value) : negative_(value < 0) {
  uint64_t magnitude = value < 0 ? ~static_cast<uint64_t>(value) + 1 : static_cast<uint64_t>(value);
  for (; magnitude != 0; magnitude >>= 32) limbs_.push_back(static_cast<uint32_t>(magnitude));
}

void BigInteger::trim() {
  while (!limbs_.empty() && limbs_.back() == 0) limbs_.pop_back();
  if (limbs_.empty()) negative_ = false;
}

BigInteger BigInteger::from_digits(std::string_view digits) {
  BigInteger value;
  size_t i = 0;
  while (i < digits.size()) {
    const size_t count = std::min<size_t>(kGroupDigits, digits.size() - i);
    uint64_t carry = 0, scale = 1;
    for (size_t k = 0; k < count; ++k) {
      carry = carry * 10 + static_cast<uint64_t>(digits[i + k] - '0');
      scale *= 10;
    }
    for (uint32_t& limb : value.limbs_) {
      carry += limb * scale;
      limb = static_cast<uint32_t>(carry);
      carry >>= 32;
    }
    if (carry != 0) value.limbs_.push_back(static_cast<uint32_t>(carry));
    i += count;
  }
  return value;
}

size_t BigInteger::bits() const {
  return limbs_.empty() ? 0 : 32 * limbs_.size() - static_cast<size_t>(std::countl_zero(limbs_.back()));
}

int64_t BigInteger::small() const {
  PERIGEE_CHECK(bits() <= 62, "{} bits", bits());
  int64_t value = 0;
  for (size_t i = limbs_.size(); i-- > 0;) value = (value << 32) | limbs_[i];
  return negative_ ? -value : value;
}

BigInteger BigInteger::operator-() const {
  BigInteger out = *this;
  out.negative_ = !negative_ && !zero();
  return out;
}

int BigInteger::compare_magnitude(const BigInteger& a, const BigInteger& b) {
  if (a.limbs_.size() != b.limbs_.size()) return a.limbs_.size() < b.limbs_.size() ? -1 : 1;
  for (size_t i = a.limbs_.size(); i-- > 0;)
    if (a.limbs_[i] != b.limbs_[i]) return a.limbs_[i] < b.limbs_[i] ? -1 : 1;
  return 0;
}

int BigInteger::compare(const BigInteger& a, const BigInteger& b) {
  if (a.negative_ != b.negative_) return a.negative_ ? -1 : 1;
  return a.negative_ ? -compare_magnitude(a, b) : compare_magnitude(a, b);
}

BigInteger BigInteger::operator+(const BigInteger& b) const {
  const BigInteger* large = this;
  const BigInteger* small = &b;
  if (compare_magnitude(*large, *small) < 0) std::swap(large, small);
  BigInteger out = *large;
  const bool subtract = negative_ != b.negative_;
  int64_t carry = 0;
  for (size_t i = 0; i < out.limbs_.size(); ++i) {
    const int64_t other = i < small->limbs_.size() ? small->limbs_[i] : 0;
    const int64_t sum = int64_t{out.limbs_[i]} + (subtract ? -other : other) + carry;
    out.limbs_[i] = static_cast<uint32_t>(sum);
    carry = sum >> 32;  // -1, 0 or 1
  }
  if (carry != 0) out.limbs_.push_back(static_cast<uint32_t>(carry));
  out.trim();
  return out;
}

BigInteger BigInteger::operator*(const BigInteger& b) const {
  BigInteger out;
  out.limbs_.assign(limbs_.size() + b.limbs_.size(), 0);
  for (size_t i = 0; i < limbs_.size(); ++i) {
    uint64_t carry = 0;
    for (size_t j = 0; j < b.limbs_.size(); ++j) {
      carry += uint64_t{limbs_[i]} * b.limbs_[j] + out.limbs_[i + j];
      out.limbs_[i + j] = static_cast<uint32_t>(carry);
      carry >>= 32;
    }
    out.limbs_[i + b.limbs_.size()] = static_cast<uint32_t>(carry);
  }
  out.negative_ = negative_ != b.negative_;
  out.trim();
  return out;
}

uint32_t BigInteger::divide_small(uint32_t divisor) {
  uint64_t rest = 0;
  for (size_t i = limbs_.size(); i-- > 0;) {
    rest = (rest << 32) | limbs_[i];
    limbs_[i] = static_cast<uint32_t>(rest / divisor);
    rest %= divisor;
  }
  trim();
  return static_cast<uint32_t>(rest);
}

// Long division of a normalised divisor (top bit set): each digit of the quotient is estimated from the leading limbs,
// is then at most two too large, and corrected (Knuth, volume 2, 4.3.1, algorithm D).
BigInteger::Division BigInteger::divide(const BigInteger& a, const BigInteger& b) {
  PERIGEE_CHECK(!b.zero());
  Division out;
  if (compare_magnitude(a, b) < 0) {
    out.remainder = a;
    return out;
  }
  if (b.limbs_.size() == 1) {
    out.quotient = a;
    out.remainder = BigInteger(int64_t{out.quotient.divide_small(b.limbs_[0])});
  } else {
    const int shift = std::countl_zero(b.limbs_.back());
    const auto shifted = [shift](const std::vector<uint32_t>& in) {
      std::vector<uint32_t> up(in.size() + 1, 0);
      for (size_t i = 0; i < in.size(); ++i) {
        const uint64_t wide = uint64_t{in[i]} << shift;
        up[i] |= static_cast<uint32_t>(wide);
        up[i + 1] = static_cast<uint32_t>(wide >> 32);
      }
      return up;
    };
    std::vector<uint32_t> u = shifted(a.limbs_);
    std::vector<uint32_t> v = shifted(b.limbs_);
    v.pop_back();
    const size_t n = v.size(), m = u.size() - n;
    out.quotient.limbs_.assign(m, 0);
    for (size_t j = m; j-- > 0;) {
      const uint64_t top = (uint64_t{u[j + n]} << 32) | u[j + n - 1];
      uint64_t digit = top / v[n - 1], rest = top % v[n - 1];
      while (digit >> 32 != 0 || digit * v[n - 2] > ((rest << 32) | u[j + n - 2])) {
        --digit;
        rest += v[n - 1];
        if (rest >> 32 != 0) break;
      }
      int64_t borrow = 0;
      uint64_t carry = 0;
      for (size_t i = 0; i < n; ++i) {
        carry += digit * v[i];
        const int64_t d = int64_t{u[i + j]} - static_cast<uint32_t>(carry) + borrow;
        u[i + j] = static_cast<uint32_t>(d);
        borrow = d >> 32;
        carry >>= 32;
      }
      const int64_t d = int64_t{u[j + n]} - static_cast<int64_t>(carry) + borrow;
      u[j + n] = static_cast<uint32_t>(d);
      if (d < 0) {  // one too large
        --digit;
        uint64_t back = 0;
        for (size_t i = 0; i < n; ++i) {
          back += uint64_t{u[i + j]} + v[i];
          u[i + j] = static_cast<uint32_t>(back);
          back >>= 32;
        }
        u[j + n] += static_cast<uint32_t>(back);
      }
      out.quotient.limbs_[j] = static_cast<uint32_t>(digit);
    }
    out.remainder.limbs_.assign(n, 0);
    for (size_t i = 0; i < n; ++i) {
      const uint64_t wide = (uint64_t{i + 1 < u.size() ? u[i + 1] : 0} << 32) | u[i];
      out.remainder.limbs_[i] = static_cast<uint32_t>(wide >> shift);
    }
  }
  out.quotient.negative_ = a.negative_ != b.negative_;
  out.remainder.negative_ = a.negative_;
  out.quotient.trim();
  out.remainder.trim();
  return out;
}

std::string BigInteger::text() const {
  if (zero()) return "0";
  std::string digits;
  BigInteger rest = *this;
  while (!rest.zero()) {
    uint32_t group = rest.divide_small(kGroup);
    for (int i = 0; i < kGroupDigits && (group != 0 || !rest.zero()); ++i, group /= 10)
      digits += static_cast<char>('0' + group % 10);
  }
  if (negative_) digits += '-';
  std::reverse(digits.begin(), digits.end());
  return digits;
}

}  // namespace perigee::agents
