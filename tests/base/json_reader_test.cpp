#include <gtest/gtest.h>

#include <limits>

#include "base/error.h"
#include "base/json.h"

namespace perigee {
namespace {

using nlohmann::json;

// What reading says is wrong, or "".
template <class Read>
std::string refusal(const std::string& text, const Read& read, std::string_view prefix = "") {
  const json value = json::parse(text);
  try {
    JsonReader reader(value, "a.json", prefix);
    read(reader);
  } catch (const Error& e) {
    EXPECT_EQ(e.kind(), Error::Kind::kInput);
    return e.what();
  }
  return "";
}

TEST(JsonReader, ReadsWhatIsThere) {
  const json value = json::parse(
      R"({"n": -5, "x": 0.5, "whole": 3, "yes": true, "no": false, "text": "é", "list": [1, -2], "empty": [], "null": null})");
  JsonReader reader(value, "a.json");
  EXPECT_EQ(reader.integer("n", -5, 10), -5);
  EXPECT_EQ(reader.integer("n", -10, -5), -5);
  EXPECT_EQ(reader.integer("n", -10, 10, 7), -5);
  EXPECT_EQ(reader.integer("none", 0, 1, 7), 7)
      << "what stands in for an absent key need not be in the range";
  EXPECT_EQ(reader.number("x", 0.5, 1), 0.5);
  EXPECT_EQ(reader.number("x", 0, 0.5), 0.5);
  EXPECT_EQ(reader.number("whole", 0, 5), 3.0);
  EXPECT_EQ(reader.number("none", 0, 1, 2.5), 2.5);
  EXPECT_EQ(reader.number("x", 0, 1, 2.5), 0.5);
  EXPECT_TRUE(reader.boolean("yes"));
  EXPECT_FALSE(reader.boolean("no", true));
  EXPECT_TRUE(reader.boolean("none", true));
  EXPECT_TRUE(reader.is_true("yes"));
  EXPECT_FALSE(reader.is_true("no"));
  EXPECT_FALSE(reader.is_true("none"));
  EXPECT_EQ(reader.string("text"), "é");
  EXPECT_EQ(reader.string("text", "else"), "é");
  EXPECT_EQ(reader.string("none", "else"), "else");
  EXPECT_EQ(reader.integers("list", -2, 1), (std::vector<int64_t>{1, -2}));
  EXPECT_TRUE(reader.integers("empty", 0, 0).empty());
  EXPECT_TRUE(reader.has("n"));
  EXPECT_FALSE(reader.has("null"));
  EXPECT_FALSE(reader.has("none"));
  EXPECT_NE(reader.find("null"), nullptr);
  EXPECT_EQ(reader.find("none"), nullptr);
  reader.finish();
}

TEST(JsonReader, EachErrorIsOneLineThatSaysWhereAndWhat) {
  using Read = std::function<void(JsonReader&)>;
  const Read small = [](JsonReader& r) { r.integer("k", -2, 9); };
  const Read number = [](JsonReader& r) { r.number("k", 0, 1); };
  const Read text = [](JsonReader& r) { r.string("k"); };
  const Read flag = [](JsonReader& r) { r.boolean("k"); };
  const Read list = [](JsonReader& r) { r.integers("k", 0, 9); };
  const struct {
    const char* value;
    Read read;
    const char* says;
  } cases[] = {
      {"{}", small, "a.json: k: missing"},
      {R"({"k": 10})", small, "a.json: k: 10 is out of range [-2, 9]"},
      {R"({"k": -3})", small, "a.json: k: -3 is out of range [-2, 9]"},
      {R"({"k": 1.0})", small, "a.json: k: a whole number is expected, not 1.0"},
      {R"({"k": null})", small, "a.json: k: a whole number is expected, not null"},
      {R"({"k": 18446744073709551615})", small, "a.json: k: 18446744073709551615 is out of range [-2, 9]"},
      {R"({"k": 1.5})", number, "a.json: k: 1.5 is out of range [0, 1]"},
      {R"({"k": -0.5})", number, "a.json: k: -0.5 is out of range [0, 1]"},
      {R"({"k": "1"})", number, "a.json: k: a number is expected, not \"1\""},
      {R"({"k": 1})", text, "a.json: k: a text in quotes is expected, not 1"},
      {R"({"k": 0})", flag, "a.json: k: true or false is expected, not 0"},
      {R"({"k": 0})", [](JsonReader& r) { r.is_true("k"); }, "a.json: k: true or false is expected, not 0"},
      {R"({"k": 1})", list, "a.json: k: a list of whole numbers is expected, not 1"},
      {R"({"k": [1, 2.5]})", list, "a.json: k: a list of whole numbers is expected; it holds 2.5"},
      {R"({"k": [1, 10]})", list, "a.json: k: 10 is out of range [0, 9]"},
      {R"({"k": [-1]})", list, "a.json: k: -1 is out of range [0, 9]"},
      {R"({"k": [18446744073709551615]})", list, "a.json: k: 18446744073709551615 is out of range [0, 9]"},
      {"[]", [](JsonReader&) {}, "a.json: an object is expected, not a list"},
  };
  for (const auto& c : cases) EXPECT_EQ(refusal(c.value, c.read), c.says) << c.value;
  EXPECT_EQ(refusal("{}", small, "model.mixer"), "a.json: model.mixer.k: missing");
  EXPECT_EQ(refusal("3", small, "model"), "a.json: model: an object is expected, not a whole number");
}

TEST(JsonReader, NumbersAreFinite) {
  const json value = {{"k", std::numeric_limits<double>::infinity()}, {"n", std::nan("")}};
  JsonReader reader(value, "a.json");
  constexpr double kAny = std::numeric_limits<double>::infinity();
  EXPECT_THROW(reader.number("k", -kAny, kAny), Error);
  EXPECT_THROW(reader.number("n", -kAny, kAny), Error);
}

TEST(JsonReader, WhatNobodyReadIsRefused) {
  const std::string text = R"({"steps": 1, "stesp": 2, "note": 3})";
  const auto read = [](JsonReader& r) {
    r.integer("steps", 0, 9);
    r.ignore("note");
    r.finish();
  };
  EXPECT_EQ(refusal(text, read), "a.json: stesp: unknown key; did you mean steps?");
  EXPECT_EQ(refusal(text, read, "train"), "a.json: train.stesp: unknown key; did you mean steps?");
  EXPECT_EQ(refusal(R"({"steps": 1, "note": 3})", read), "");
  EXPECT_EQ(refusal(R"({"zzzzzz": 1})", [](JsonReader& r) { r.finish(); }), "a.json: zzzzzz: unknown key");
  // A key that was only looked for is not one that was read.
  EXPECT_EQ(refusal(R"({"k": 1})",
                    [](JsonReader& r) {
                      EXPECT_TRUE(r.has("k"));
                      r.finish();
                    }),
            "a.json: k: unknown key");
}

TEST(JsonReader, AStrangeKeyStaysOnItsLine) {
  const auto read = [](JsonReader& r) { r.finish(); };
  EXPECT_EQ(refusal(R"({"lr\nall is well\u001b[2J": 1})", read, "learn"),
            R"(a.json: learn."lr\x0aall is well\x1b[2J": unknown key)");
}

TEST(Json, ValuesInMessagesAreShortAndWhole) {
  EXPECT_EQ(json_brief(json::parse(R"({"a": [1, "x"]})")), R"({"a":[1,"x"]})");
  EXPECT_EQ(json_brief(json(std::string(58, 'x'))), "\"" + std::string(58, 'x') + "\"");
  EXPECT_EQ(json_brief(json(std::string(59, 'x'))), "\"" + std::string(59, 'x') + "...");
  EXPECT_EQ(json_brief(json("aéé"), 3), "\"a...") << "a letter is not cut";
  EXPECT_EQ(json_brief(json("aéé"), 4), "\"aé...");
  EXPECT_NE(json_brief(json("\xff")), "");
  const std::pair<json, const char*> types[] = {
      {nullptr, "null"}, {true, "true or false"}, {1, "a whole number"},     {-1, "a whole number"},
      {1.5, "a number"}, {"x", "a text"},         {json::array(), "a list"}, {json::object(), "an object"}};
  for (const auto& [value, name] : types) EXPECT_EQ(json_type_name(value), name);
}

}  // namespace
}  // namespace perigee
