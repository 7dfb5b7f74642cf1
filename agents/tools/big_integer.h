// Whole numbers of any size, for the calculator: sign and magnitude, schoolbook arithmetic.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace perigee::agents {

class BigInteger {
 public:
  BigInteger() = default;
  BigInteger(int64_t value);  // NOLINT: a number is a number
  // REQUIRES digits only, at least one.
  static BigInteger from_digits(std::string_view digits);

  bool zero() const { return limbs_.empty(); }
  bool negative() const { return negative_; }
  bool odd() const { return !limbs_.empty() && (limbs_[0] & 1) != 0; }
  size_t bits() const;  // of the magnitude; 0 for zero
  size_t limbs() const { return limbs_.size(); }
  // REQUIRES bits() <= 62.
  int64_t small() const;

  BigInteger operator-() const;
  BigInteger operator+(const BigInteger& b) const;
  BigInteger operator-(const BigInteger& b) const { return *this + -b; }
  BigInteger operator*(const BigInteger& b) const;
  bool operator==(const BigInteger&) const = default;
  // The sign of a - b.
  static int compare(const BigInteger& a, const BigInteger& b);

  // a = quotient * b + remainder, rounded towards zero: the remainder has a's sign. REQUIRES b not zero.
  struct Division;
  static Division divide(const BigInteger& a, const BigInteger& b);

  std::string text() const;

 private:
  static int compare_magnitude(const BigInteger& a, const BigInteger& b);
  void trim();
  uint32_t divide_small(uint32_t divisor);  // in place; returns the remainder of the magnitude

  std::vector<uint32_t> limbs_;  // least significant first, no zero at the end
  bool negative_ = false;        // false for zero
};

struct BigInteger::Division {
  BigInteger quotient, remainder;
};

}  // namespace perigee::agents
