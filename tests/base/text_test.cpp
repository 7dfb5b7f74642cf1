#include "base/text.h"

#include <gtest/gtest.h>

namespace perigee {
namespace {

TEST(Text, EditDistanceCountsEditsAndSwaps) {
  EXPECT_EQ(edit_distance("", ""), 0);
  EXPECT_EQ(edit_distance("abc", ""), 3);
  EXPECT_EQ(edit_distance("kitten", "sitting"), 3);
  EXPECT_EQ(edit_distance("trian", "train"), 1);
  EXPECT_EQ(edit_distance("Max-Lag", "max_lag"), 0);
  EXPECT_EQ(edit_distance("ab", "ba"), 1);
}

TEST(Text, NearestFindsSlipsAndNothingElse) {
  const std::vector<std::string> names = {"train.lr", "train.steps", "sample.temperature", "run.dir"};
  EXPECT_EQ(nearest("train.lrr", names), "train.lr");
  EXPECT_EQ(nearest("trian.steps", names), "train.steps");
  EXPECT_EQ(nearest("temperature", names), "sample.temperature");
  EXPECT_EQ(nearest("train.temperature", names), "sample.temperature");
  EXPECT_EQ(nearest("something.else", names), "");
  EXPECT_EQ(nearest("", names), "");
  EXPECT_EQ(nearest(std::string(100000, 'a'), names), "");
  EXPECT_EQ(did_you_mean("run.dri", names), "; did you mean run.dir?");
  EXPECT_EQ(did_you_mean("qqqqqq", names), "");
}

TEST(Text, JoinPutsTheSeparatorBetween) {
  EXPECT_EQ(join(std::vector<std::string>{}, ", "), "");
  EXPECT_EQ(join(std::vector<std::string>{"a"}, ", "), "a");
  EXPECT_EQ(join(std::vector<std::string>{"a", "", "b"}, ", "), "a, , b");
}

TEST(Text, BytesAreReadable) {
  EXPECT_EQ(human_bytes(0), "0 B");
  EXPECT_EQ(human_bytes(1023), "1023 B");
  EXPECT_EQ(human_bytes(1024), "1 KiB");
  EXPECT_EQ(human_bytes(1536), "1.5 KiB");
  EXPECT_EQ(human_bytes((1u << 20) - 1), "1 MiB");
  EXPECT_EQ(human_bytes(98245363456), "91.5 GiB");
  EXPECT_EQ(human_bytes(UINT64_MAX), "16 EiB");
}

TEST(Text, Utf8IsJudgedAsTheStandardSays) {
  for (const char* good :
       {"", "a", "\xC3\xA9", "\xE4\xBD\xA0", "\xF0\x9F\x98\x80", "\xEF\xBF\xBF", "\xF4\x8F\xBF\xBF"})
    EXPECT_TRUE(is_utf8(good)) << good;
  for (const char* bad : {"\x80", "\xC0\x80", "\xC1\xBF", "\xE0\x9F\xBF", "\xED\xA0\x80", "\xF0\x8F\xBF\xBF",
                          "\xF4\x90\x80\x80", "\xF5\x80\x80\x80", "\xE4\xBD", "\xC3", "\xFF",
                          "a\xE4\xBD"
                          "b"})
    EXPECT_FALSE(is_utf8(bad)) << bad;
}

TEST(Text, QuotedTextIsOneHarmlessLine) {
  EXPECT_EQ(quote("a\nb\x1b[31m\xFF"), "\"a\\x0ab\\x1b[31m\\xff\"");
  EXPECT_EQ(quote("say \"hi\""), "\"say \\\"hi\\\"\"");
  EXPECT_EQ(quote(std::string(100, 'x'), 5), "\"xxxxx\"...");
}

}  // namespace
}  // namespace perigee
