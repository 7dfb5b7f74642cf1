#include "agents/tools/schema.h"

#include <gtest/gtest.h>

#include <chrono>
#include <random>

#include "base/error.h"

namespace perigee::agents {
namespace {

using Json = nlohmann::json;
using OrderedJson = nlohmann::ordered_json;

std::string check(const char* schema, const char* value) {
  return ArgumentSchema(OrderedJson::parse(schema), "tool t").check(Json::parse(value));
}

std::string refusal(const char* schema) {
  try {
    ArgumentSchema(OrderedJson::parse(schema), "tool t");
  } catch (const Error& e) {
    EXPECT_EQ(e.kind(), Error::Kind::kInput);
    return e.what();
  }
  return "";
}

TEST(ArgumentSchema, JudgesEachKeyword) {
  struct Case {
    const char *schema, *good, *bad, *sentence;
  };
  const Case cases[] = {
      {R"({"type":"string"})", R"("a")", "1", "arguments: a text is expected, not the number 1"},
      {R"({"type":"integer"})", "1.0", "1.5", "arguments: a whole number is expected, not the number 1.5"},
      {R"({"type":"integer"})", "-3", "true", "arguments: a whole number is expected, not true"},
      {R"({"type":"number"})", "1", "null", "arguments: a number is expected, not null"},
      {R"({"type":["string","null"]})", "null", "[]", "arguments: null or a text is expected, not a list"},
      {R"({"enum":["a","b",3]})", "3.0", R"("c")", R"(arguments: one of "a", "b", 3 is expected, not "c")"},
      {R"({"const":{"a":1}})", R"({"a":1})", R"({"a":2})", R"(arguments: {"a":1} is expected, not {"a":2})"},
      {R"({"enum":["a","b"],"const":"b"})", R"("b")", R"("a")", R"(arguments: "b" is expected, not "a")"},
      {R"({"minimum":2})", "2", "1", "arguments: at least 2 is expected, not 1"},
      {R"({"maximum":2.5})", "2", "3", "arguments: at most 2.5 is expected, not 3"},
      {R"({"exclusiveMinimum":0})", "0.1", "0", "arguments: more than 0 is expected, not 0"},
      {R"({"exclusiveMaximum":1})", "0.9", "1", "arguments: less than 1 is expected, not 1"},
      {R"({"minLength":2})", R"("äö")", R"("ä")", "arguments: at least 2 characters are expected, not 1"},
      {R"({"maxLength":2})", R"("äö")", R"("abc")", "arguments: at most 2 characters are expected, not 3"},
      {R"({"pattern":"^a+$"})", R"("aa")", R"("ab")", R"(arguments: "ab" does not match the pattern "^a+$")"},
      {R"({"minItems":1})", "[1]", "[]", "arguments: at least 1 elements are expected, not 0"},
      {R"({"maxItems":1})", "[1]", "[1,2]", "arguments: at most 1 elements are expected, not 2"},
      {R"({"items":{"type":"string"}})", R"(["a"])", R"(["a",1])",
       "arguments[1]: a text is expected, not the number 1"},
      {R"({"required":["a"]})", R"({"a":1})", "{}", R"(arguments: "a" is missing)"},
      {R"({"properties":{"expression":{"type":"string"}},"additionalProperties":false})",
       R"({"expression":""})", R"({"expresion":""})",
       R"(arguments: "expresion" is not known here; did you mean expression?)"},
      {R"({"properties":{"a":{}},"additionalProperties":{"type":"number"}})", R"({"a":"x","b":2})",
       R"({"b":"x"})", "b: a number is expected, not a text"},
      {R"({"properties":{"a":{"properties":{"b":{"items":{"maximum":1}}}}}})", R"({"a":{"b":[1]}})",
       R"({"a":{"b":[1,2]}})", "a.b[1]: at most 1 is expected, not 2"},
      {R"({"anyOf":[{"type":"string"},{"minimum":3}]})", "4", "2",
       "arguments: none of the allowed forms fits: (1) arguments: a text is expected, not the number 2; (2) "
       "arguments: "
       "at least 3 is expected, not 2"},
      {R"({"allOf":[{"type":"number"},{"minimum":3}],"maximum":5})", "4", "2",
       "arguments: at least 3 is expected, not 2"},
      {R"({"allOf":[{"properties":{"a":{"type":"null"}}},{"required":["a"]}]})", R"({"a":null})",
       R"({"b":null})", R"(arguments: "a" is missing)"},
      {R"({"oneOf":[{"type":"integer"},{"minimum":3}]})", "2", "4",
       "arguments: exactly one of the forms may fit, and 2 do"},
      {R"({"oneOf":[{"type":"string"},{"minimum":3}]})", "3", "2",
       "arguments: none of the allowed forms fits: (1) arguments: a text is expected, not the number 2; (2) "
       "arguments: at least 3 is expected, not 2"},
      {R"({"oneOf":[{"type":"string"}]})", R"("a")", "2", "arguments: a text is expected, not the number 2"},
      {R"({"prefixItems":[{"type":"string"},{"type":"number"}],"items":false})", R"(["a",1])", R"([1])",
       "arguments[0]: a text is expected, not the number 1"},
      {R"({"prefixItems":[{"type":"string"}],"items":{"type":"number"}})", R"(["a",1,2])", R"(["a",1,"b"])",
       "arguments[2]: a number is expected, not a text"},
      {R"({"$ref":"#/$defs/n","$defs":{"n":{"type":"number"}}})", "1", "[]",
       "arguments: a number is expected, not a list"},
      {R"({"properties":{"next":{"$ref":"#"},"v":{"type":"number"}},"required":["v"]})",
       R"({"v":1,"next":{"v":2}})", R"({"v":1,"next":{}})", R"(next: "v" is missing)"},
      {R"({"items":false})", "[]", "[1]", "arguments[0]: no value is allowed here"},
      {R"({"maximum":9007199254740992})", "9007199254740992", "9007199254740993",
       "arguments: at most 9007199254740992 is expected, not 9007199254740993"},
      // Keywords for other types say nothing about this value.
      {R"({"minimum":5,"minLength":3,"required":["a"],"minItems":2,"type":["boolean","number"]})", "true",
       "3", "arguments: at least 5 is expected, not 3"},
  };
  for (const Case& c : cases) {
    EXPECT_EQ(check(c.schema, c.good), "") << c.schema << " " << c.good;
    EXPECT_EQ(check(c.schema, c.bad), c.sentence) << c.schema << " " << c.bad;
  }
}

TEST(ArgumentSchema, RefusesWhatItDoesNotKnowByNameAndPath) {
  EXPECT_EQ(refusal(R"({"properties":{"a":{"format":"date"}}})")
                .find("tool t: #/properties/a/format: this keyword is "
                      "not supported"),
            0u);
  const char* others[] = {R"({"not":{}})",       R"({"if":{}})",
                          R"({"multipleOf":2})", R"({"allOf":[{"items":{"contains":{}}}]})",
                          R"({"$id":"x"})",      R"({"uniqueItems":true})"};
  for (const char* schema : others)
    EXPECT_NE(refusal(schema).find("not supported"), std::string::npos) << schema;
  const char* wrong[] = {R"({"type":"text"})",
                         R"({"type":[]})",
                         R"({"enum":[]})",
                         R"({"required":"a"})",
                         R"({"minLength":-1})",
                         R"({"minLength":3,"maxLength":2})",
                         R"x({"pattern":"(?=a)"})x",
                         R"x({"pattern":"("})x",
                         R"({"$ref":"#/$defs/none"})",
                         R"({"$ref":"#"})",
                         R"({"anyOf":[{"$ref":"#/$defs/a"}],"$defs":{"a":{"anyOf":[{"$ref":"#"}]}}})",
                         R"({"items":3})",
                         R"({"oneOf":[]})",
                         R"({"prefixItems":{}})",
                         R"({"allOf":[{"$ref":"#"}]})",
                         R"({"properties":{"a":{"$defs":{"b":{}}}}})",
                         R"([])"};
  for (const char* schema : wrong) EXPECT_NE(refusal(schema), "") << schema;
  std::string deep = "{}";
  for (int i = 0; i < 70; ++i) deep = R"({"items":)" + deep + "}";
  EXPECT_NE(refusal(deep.c_str()).find("deeper"), std::string::npos);
}

TEST(ArgumentSchema, AlternativesBelowAlternativesTakeLinearTime) {
  // Each level tries both forms of the level below: 2^60 ways without remembering.
  const ArgumentSchema schema(OrderedJson::parse(R"({"$ref":"#/$defs/a","$defs":{"a":{"anyOf":[
        {"type":"object","properties":{"n":{"$ref":"#/$defs/a"}},"required":["n","x"]},
        {"type":"object","properties":{"n":{"$ref":"#/$defs/a"}},"required":["n"]},
        {"type":"number"}]}}})"),
                              "tool t");
  std::string good = "1", bad = "\"x\"";
  for (int i = 0; i < 60; ++i) {
    good = R"({"n":)" + good + "}";
    bad = R"({"n":)" + bad + "}";
  }
  const auto start = std::chrono::steady_clock::now();
  EXPECT_EQ(schema.check(Json::parse(good)), "");
  EXPECT_NE(schema.check(Json::parse(bad)), "");
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(60));
}

// Random values against random schemas: no crash, and a value made by the schema's own rules is never refused.
TEST(ArgumentSchema, RandomSchemasAndValuesNeverThrow) {
  const unsigned seed = 99;
  std::mt19937 random(seed);
  const auto pick = [&](int n) { return static_cast<int>(random() % static_cast<unsigned>(n)); };
  const std::function<OrderedJson(int)> any = [&](int depth) -> OrderedJson {
    switch (pick(depth > 3 ? 5 : 7)) {
      case 0:
        return nullptr;
      case 1:
        return pick(2) == 0;
      case 2:
        return pick(20) - 10;
      case 3:
        return pick(100) / 7.0;
      case 4:
        return std::string(static_cast<size_t>(pick(5)), static_cast<char>('a' + pick(3)));
      case 5: {
        OrderedJson list = OrderedJson::array();
        for (int i = pick(4); i > 0; --i) list.push_back(any(depth + 1));
        return list;
      }
      default: {
        OrderedJson object = OrderedJson::object();
        for (int i = pick(4); i > 0; --i)
          object[std::string(1, static_cast<char>('a' + pick(4)))] = any(depth + 1);
        return object;
      }
    }
  };
  const std::vector<std::string> keywords = {"type",      "properties", "required", "additionalProperties",
                                             "items",     "enum",       "const",    "minimum",
                                             "maximum",   "minLength",  "anyOf",    "$ref",
                                             "pattern",   "minItems",   "$defs",    "maxItems",
                                             "maxLength", "title"};
  const std::function<OrderedJson(int)> schema = [&](int depth) -> OrderedJson {
    OrderedJson s = OrderedJson::object();
    for (int i = pick(4); i > 0; --i) {
      const std::string& k = keywords[static_cast<size_t>(pick(static_cast<int>(keywords.size())))];
      const int way = pick(10);
      if (way == 0)
        s[k] = any(0);  // wrong more often than not
      else if (k == "type")
        s[k] = std::vector<std::string>{"object", "array", "number", "string"}[static_cast<size_t>(pick(4))];
      else if (k == "properties" && depth < 4)
        s[k] = OrderedJson{{"a", schema(depth + 1)}, {"b", schema(depth + 1)}};
      else if (k == "anyOf" && depth < 4)
        s[k] = OrderedJson::array({schema(depth + 1), schema(depth + 1)});
      else if ((k == "items" || k == "additionalProperties") && depth < 4)
        s[k] = schema(depth + 1);
      else if (k == "required")
        s[k] = OrderedJson::array({"a"});
      else if (k == "enum")
        s[k] = OrderedJson::array({any(2), any(2)});
      else if (k == "$ref")
        s[k] = "#";
      else if (k == "pattern")
        s[k] = "a|b+";
      else if (k.starts_with("m"))
        s[k] = pick(4);
    }
    return s;
  };
  int compiled = 0, accepted = 0;
  for (int i = 0; i < 3000; ++i) {
    const OrderedJson s = schema(0);
    try {
      const ArgumentSchema a(s, "t");
      ++compiled;
      for (int k = 0; k < 10; ++k) accepted += a.check(Json(any(0))).empty();
    } catch (const Error&) {
    } catch (const std::exception& e) {
      FAIL() << "seed " << seed << ", " << s.dump() << ": " << e.what();
    }
  }
  EXPECT_GT(compiled, 500);
  EXPECT_GT(accepted, 500);
}

}  // namespace
}  // namespace perigee::agents
