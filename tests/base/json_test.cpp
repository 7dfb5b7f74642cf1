// JSON that nobody trusts: in time proportional to its length, within bounds, and no key lost or taken twice.
#include "base/json.h"

#include <gtest/gtest.h>
#include <time.h>

#include <random>

#include "base/error.h"

namespace perigee {
namespace {

using nlohmann::json;

std::string refusal(std::string_view text, const JsonOptions& options = {}) {
  try {
    parse_json(text, "file.json", options);
  } catch (const Error& e) {
    EXPECT_EQ(e.kind(), Error::Kind::kInput);
    return e.what();
  }
  return "taken";
}

// What this thread has computed so far.
double thread_seconds() {
  timespec t{};
  EXPECT_EQ(::clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t), 0);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

std::string list_of(const std::string& element, size_t bytes) {
  std::string out = "[" + element;
  while (out.size() + element.size() + 2 < bytes) out.append(",").append(element);
  return out + "]";
}

// The library's own callback looks at every member of a list after each object in it: a list of a megabyte would take
// more than a minute, and the quotient below would be near 16. Time is this thread's own, which waiting does not add to.
TEST(Json, LongListsTakeTimeInProportion) {
  const auto seconds = [](const std::string& text) {
    double best = 1e9;
    for (int i = 0; i < 3; ++i) {
      const double start = thread_seconds();
      EXPECT_GT(parse_json(text, "list").size(), 1000u);
      best = std::min(best, thread_seconds() - start);
    }
    return best;
  };
  for (const char* element : {"{}", "[]", R"({"a":[1,{"b":2}]})", "1"}) {
    const double quarter = seconds(list_of(element, 256 << 10)), whole = seconds(list_of(element, 1 << 20));
    EXPECT_LT(whole, 10 * quarter) << element;
  }
}

TEST(Json, DepthAndNumberOfValuesAreBounded) {
  const auto nested = [](int depth) { return std::string(depth, '[') + std::string(depth, ']'); };
  EXPECT_EQ(refusal(nested(64)), "taken");
  EXPECT_EQ(refusal(nested(65)), "file.json: nested deeper than 64 levels");
  EXPECT_EQ(refusal(std::string(1'000'000, '[')), "file.json: nested deeper than 64 levels");
  EXPECT_EQ(refusal(R"({"a":{"b":{}}})", {.max_depth = 2}), "file.json: nested deeper than 2 levels");
  EXPECT_EQ(refusal(R"([[1],{"b":2}])", {.max_depth = 2}), "taken");
  EXPECT_EQ(refusal("[1,2,3]", {.max_values = 4}), "taken");
  EXPECT_EQ(refusal("[1,2,3,4]", {.max_values = 4}), "file.json: it holds more than 4 values");
}

TEST(Json, KeysThatStandTwiceAndBrokenTextsAreRefused) {
  EXPECT_EQ(refusal(R"({"a":1,"b":{"a":2},"c":[{"a":1},{"a":2}]})"), "taken");
  EXPECT_EQ(refusal(R"({"x":[{"a":1,"b":2,"a":3}]})"), "file.json: the key \"a\" stands twice in one object");
  for (const char* text :
       {"", "[1,]", "{\"a\"}", "[1] 2", "nul", "1e999", "\"\\ud800\"", "\"\xff\"", "// c\n1"})
    EXPECT_TRUE(refusal(text).starts_with("file.json: not JSON: ")) << text << " " << refusal(text);
  EXPECT_NE(refusal("{\n \"a\": x}").find("line 2, column 7"), std::string::npos) << refusal("{\n \"a\": x}");
  EXPECT_EQ(parse_json("// c\n[1 /* d */]", "x", {.comments = true}), json({1}));
}

TEST(Json, AgreesWithTheLibraryOnRandomTexts) {
  std::mt19937 random(3);
  const std::string pieces[] = {"{",     "}", "[",      "]",    ",",    ":", "\"a\"",
                                "\"b\"", "1", "-2.5e3", "true", "null", " "};
  int taken = 0;
  for (int round = 0; round < 20'000; ++round) {
    std::string text = round % 2 ? "{\"a\":" : "[";
    for (unsigned n = random() % 8; n > 0; --n) text += pieces[random() % std::size(pieces)];
    text += round % 2 ? "}" : "]";
    const json plain = json::parse(text, nullptr, false);
    const std::string mine = refusal(text);
    if (mine == "taken") {
      ++taken;
      EXPECT_EQ(parse_json(text, "x"), plain) << text;
    } else if (mine.find("stands twice") == std::string::npos) {
      EXPECT_TRUE(plain.is_discarded()) << text << " " << mine;
    }
  }
  EXPECT_GT(taken, 200);
}

TEST(Json, OrderedKeepsTheOrderOfTheKeysAskedFor) {
  const std::string text =
      R"({"z":[1,{"y":2,"b":{"q":[],"a":{}}}],"skip":{"deep":[{"x":1}],"a":[]},"a":{"k":null}})";
  EXPECT_EQ(parse_json_ordered(text, "x", {"z", "a"}, 10).dump(),
            R"({"z":[1,{"y":2,"b":{"q":[],"a":{}}}],"a":{"k":null}})");
  EXPECT_EQ(parse_json_ordered(text, "x", {}, 10).dump(), "{}");
  EXPECT_THROW(parse_json_ordered(R"({"a":{"x":1,"y":2,"z":3}})", "x", {"a"}, 2), Error);
  EXPECT_EQ(parse_json_ordered(R"({"b":{"x":1,"y":2,"z":3},"a":1})", "x", {"a"}, 2).dump(), R"({"a":1})");
}

}  // namespace
}  // namespace perigee
