// The filter language: what it means over a store, and what it says of mistakes.
#include "storage/filter.h"

#include <gtest/gtest.h>

#include "base/error.h"
#include "base/random.h"
#include "storage/store.h"
#include "tests/storage/fixture.h"

namespace perigee {
namespace {

std::string refusal(std::string_view text) {
  try {
    storage::parse_filter(text);
  } catch (const Error& e) {
    return e.what();
  }
  return "accepted";
}

TEST(Filter, MistakesAreShownAtTheirPlace) {
  const std::pair<const char*, const char*> cases[] = {
      {"rewrd > 1", "did you mean reward? at ^: ^rewrd > 1"},
      {"reward > abc", "a number is expected at ^: reward > ^abc"},
      {"reward >", "a value is expected at ^: reward >^"},
      {"reward ~ 1", "at ^: reward ^~ 1"},
      {"reward 5", "a comparison is expected (= != < <= > >=) at ^: reward ^5"},
      {"finish = lenght", "at ^: finish = ^lenght"},
      {"finish < stop", "at ^: finish ^< stop"},
      {"reward > 1 tokens < 2", "and, or or the end is expected at ^: reward > 1 ^tokens < 2"},
      {"(reward > 1", "and, or or ) is expected at ^: (reward > 1^"},
      {"prompt ~ \"7 + 5", "a quote is opened and not closed at ^: prompt ~ ^\"7 + 5"},
      {"not", "a field is expected"},
      {"reward > nan", "a number is expected"},
      {"reward > 1e999", "a number is expected"},
      {"; drop table episodes", "a field is expected"},
      {"component. > 1", "a field is expected"},
  };
  for (const auto& [text, needle] : cases)
    EXPECT_NE(refusal(text).find(needle), std::string::npos) << text << ": " << refusal(text);
  EXPECT_NE(refusal(std::string(200, '(') + "reward > 1").find("fewer nested"), std::string::npos);
  EXPECT_NE(refusal(std::string(5000, ' ')).find("4096"), std::string::npos);
  std::string many = "step = 1";
  for (int i = 0; i < 100; ++i) many += " or step = 1";
  EXPECT_NE(refusal(many).find("comparisons"), std::string::npos);
}

TEST(Filter, TextOfTheUserNeverBecomesSql) {
  const storage::FilterSql sql =
      storage::parse_filter("prompt ~ \"' OR 1=1 --\" and tool = 'x\"; DROP TABLE runs'");
  EXPECT_EQ(sql.sql.find("1=1"), std::string::npos);
  EXPECT_EQ(sql.sql.find("DROP"), std::string::npos);
  EXPECT_EQ(sql.values.size(), 2u);
}

// Whatever bytes: accepted or one line.
TEST(Filter, RandomTexts) {
  Random random(11);
  const char* const words[] = {"reward",  "tokens", "prompt", "finish", "and",         "or",  "not", "(",
                               ")",       ">",      "=",      "~",      "!=",          "0.5", "-1",  "stop",
                               "\"a b\"", "'",      "\x01",   "\xff",   "component.x", " "};
  int accepted = 0;
  for (int i = 0; i < 20000; ++i) {
    std::string text;
    for (int64_t n = random.next_int(0, 12); n > 0; --n)
      text += std::string(words[random.next_int(0, std::size(words) - 1)]) + " ";
    const std::string said = refusal(text);
    accepted += said == "accepted";
    EXPECT_EQ(said.find('\n'), std::string::npos) << text;
  }
  EXPECT_GT(accepted, 50);
}

}  // namespace
}  // namespace perigee
