#include "base/hash.h"

#include <gtest/gtest.h>

namespace perigee {
namespace {

// Published values of XXH3-128 with seed 0 (canonical order, as xxhsum prints).
TEST(Hash, EqualsPublishedValues) {
  EXPECT_EQ(hash_hex(""), "99aa06d3014798d86001c324468d497f");
  EXPECT_EQ(hash_hex("a"), "a96faf705af16834e6c632b61e964e1f");
  EXPECT_EQ(hash_hex("abc"), "06b05ab6733a618578af5f94892f3950");
}

TEST(Hasher, CutAnywhereEqualsWhole) {
  std::string text;
  for (int i = 0; i < 3000; ++i) text += static_cast<char>(i * 131 + i / 7);
  for (size_t cut : {0u, 1u, 16u, 255u, 256u, 257u, 1024u, 2999u, 3000u}) {
    Hasher hasher;
    hasher.update(text.data(), cut);
    hasher.update(std::string_view(text).substr(cut));
    EXPECT_EQ(hasher.digest(), hash128(text)) << "cut at " << cut;
  }
}

TEST(Hash, EveryBitMatters) {
  std::string text(40, 'x');
  const Hash128 before = hash128(text);
  for (size_t bit = 0; bit < text.size() * 8; ++bit) {
    text[bit / 8] ^= static_cast<char>(1 << (bit % 8));
    EXPECT_NE(hash128(text), before) << "bit " << bit;
    text[bit / 8] ^= static_cast<char>(1 << (bit % 8));
  }
}

}  // namespace
}  // namespace perigee
