#include "base/blob.h"

#include <gtest/gtest.h>
#include <xxhash.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "base/random.h"

namespace perigee {
namespace {

template <class T>
void expect_round_trip(const std::vector<T>& in) {
  const std::vector<uint8_t> blob = encode_blob(in);
  std::vector<T> out = {T{}};
  ASSERT_EQ(decode_blob(blob, out), BlobStatus::kOk);
  ASSERT_EQ(out.size(), in.size());
  if (!in.empty()) {
    EXPECT_EQ(std::memcmp(out.data(), in.data(), in.size() * sizeof(T)), 0);
  }
}

TEST(Blob, RoundTripsEveryWidthAndLength) {
  Random random(7);
  for (int n : {0, 1, 2, 3, 7, 8, 33, 65, 127, 256, 1000, 65537}) {
    std::vector<int32_t> tokens;
    std::vector<float> noise;
    std::vector<uint8_t> mask;
    std::vector<uint16_t> shorts;
    std::vector<double> wide;
    for (int i = 0; i < n; ++i) {
      tokens.push_back(static_cast<int32_t>(random.next_int(-5, 163840)));
      noise.push_back(std::bit_cast<float>(random.next_u32()));
      mask.push_back(random.next_u32() & 1);
      shorts.push_back(static_cast<uint16_t>(random.next_u32()));
      wide.push_back(std::bit_cast<double>(random.next_u64()));
    }
    expect_round_trip(tokens);
    expect_round_trip(noise);
    expect_round_trip(mask);
    expect_round_trip(shorts);
    expect_round_trip(wide);
  }
}

TEST(Blob, KeepsBitsOfStrangeFloats) {
  constexpr float inf = std::numeric_limits<float>::infinity();
  expect_round_trip(std::vector<float>{-0.0f, 0.0f, inf, -inf, std::bit_cast<float>(0x7fc12345u),
                                       std::bit_cast<float>(0xff812345u), 1e-45f, -3.5f});
}

TEST(Blob, EncodesTheSameEachTime) {
  std::vector<int32_t> tokens;
  for (int i = 0; i < 300; ++i) tokens.push_back(i * i % 977);
  EXPECT_EQ(encode_blob(tokens), encode_blob(tokens));
}

TEST(Blob, LogprobsAndTokensShrink) {
  Random random(3);
  std::vector<int32_t> tokens(256);
  for (int32_t& t : tokens) t = static_cast<int32_t>(random.next_int(0, 255));
  EXPECT_LT(encode_blob(tokens).size(), 256 * 4 / 2);
  EXPECT_LT(encode_blob(std::vector<uint32_t>(256, 17)).size(), 64u);
}

// The heart of it: no single changed bit, and no cut, goes unseen.
TEST(Blob, EveryFlippedBitIsFound) {
  std::vector<int32_t> tokens;
  for (int i = 0; i < 50; ++i) tokens.push_back(i / 3);
  Random random(5);
  std::vector<float> noise;
  for (int i = 0; i < 20; ++i) noise.push_back(random.next_float());
  for (std::vector<uint8_t> blob :
       {encode_blob(tokens), encode_blob(noise), encode_blob(std::vector<int32_t>{})}) {
    for (size_t bit = 0; bit < blob.size() * 8; ++bit) {
      blob[bit / 8] ^= static_cast<uint8_t>(1 << (bit % 8));
      EXPECT_NE(check_blob(blob), BlobStatus::kOk) << "bit " << bit;
      std::vector<int32_t> out = {42};
      EXPECT_NE(decode_blob(blob, out), BlobStatus::kOk) << "bit " << bit;
      EXPECT_EQ(out, std::vector<int32_t>{42});
      blob[bit / 8] ^= static_cast<uint8_t>(1 << (bit % 8));
    }
    for (size_t size = 0; size < blob.size(); ++size)
      EXPECT_NE(check_blob(std::span(blob).first(size)), BlobStatus::kOk) << "cut to " << size;
  }
}

TEST(Blob, RefusesAnotherWidth) {
  std::vector<uint8_t> out;
  EXPECT_EQ(decode_blob(encode_blob(std::vector<int32_t>{1, 2}), out), BlobStatus::kWrongWidth);
}

// The example of docs/formats/store.md, byte for byte, with the checksum computed here from its definition.
TEST(Blob, LaysBytesOutAsDocumented) {
  const std::vector<uint8_t> blob = encode_blob(std::vector<int32_t>{72, 105, 1});
  const uint8_t expected[] = {1, 0, 4,  1,   3, 0, 0, 0, 0, 0, 0, 0, 0, 0,
                              0, 0, 72, 105, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0};
  ASSERT_EQ(blob.size(), sizeof expected);
  for (size_t i = 0; i < sizeof expected; ++i) {
    if (i < 8 || i >= 16) {
      EXPECT_EQ(blob[i], expected[i]) << "byte " << i;
    }
  }
  uint64_t seed, stored;
  std::memcpy(&seed, blob.data(), 8);
  std::memcpy(&stored, blob.data() + 8, 8);
  EXPECT_EQ(stored, XXH3_64bits_withSeed(blob.data() + 16, 12, seed));
}

// A right checksum over nonsense must not reach memory beyond the payload.
TEST(Blob, ForgedHeadersAreRefused) {
  Random random(11);
  const std::vector<uint8_t> good = encode_blob(std::vector<uint32_t>(500, 9));
  for (int trial = 0; trial < 5000; ++trial) {
    std::vector<uint8_t> blob = good;
    for (int k = 0; k < 3; ++k)
      blob[random.next_int(0, blob.size() - 1)] = static_cast<uint8_t>(random.next_u32());
    uint64_t seed;
    std::memcpy(&seed, blob.data(), 8);
    const uint64_t sum = XXH3_64bits_withSeed(blob.data() + 16, blob.size() - 16, seed);
    std::memcpy(blob.data() + 8, &sum, 8);
    std::vector<uint32_t> out;
    if (decode_blob(blob, out) == BlobStatus::kOk) {
      EXPECT_EQ(out.size(), seed >> 32);
    }
  }
}

// A later version may write what this one does not know: said as such, the checksum being right.
TEST(Blob, EachUnknownByteOfTheHeaderIsAnUnknownFormat) {
  const std::vector<uint8_t> good = encode_blob(std::vector<uint32_t>{7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7});
  for (const auto& [at, value] :
       {std::pair<size_t, uint8_t>{0, 0}, {0, 2}, {1, 2}, {2, 3}, {2, 16}, {3, 2}}) {
    std::vector<uint8_t> blob = good;
    blob[at] = value;
    uint64_t seed;
    std::memcpy(&seed, blob.data(), 8);
    const uint64_t sum = XXH3_64bits_withSeed(blob.data() + 16, blob.size() - 16, seed);
    std::memcpy(blob.data() + 8, &sum, 8);
    EXPECT_EQ(check_blob(blob), BlobStatus::kUnknownFormat) << at << ": " << int{value};
    std::vector<uint32_t> out = {1};
    EXPECT_EQ(decode_blob(std::span<const uint8_t>(blob), out), BlobStatus::kUnknownFormat);
    EXPECT_EQ(out, std::vector<uint32_t>{1});
  }
}

}  // namespace
}  // namespace perigee
