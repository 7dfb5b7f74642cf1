// What is accepted, what is refused and with which words, and that hostile schemas cost little.
#include <gtest/gtest.h>

#include <ctime>

#include "base/error.h"
#include "policy/grammar/grammar.h"
#include "policy/grammar/numbers.h"
#include "policy/grammar/pattern.h"
#include "tests/policy/grammar/generate.h"

namespace perigee::policy {
namespace {

using nlohmann::ordered_json;

const ByteTokenizer& tokenizer() {
  static const ByteTokenizer t;
  return t;
}
const TokenIndex& index() {
  static const TokenIndex i(tokenizer());
  return i;
}
int32_t end() {
  return tokenizer().special(special::kImEnd);
}

// Whether the text, whole, is one that the schema generates.
bool generates(const char* schema, std::string_view text) {
  auto c = json_schema_constraint(index(), ordered_json::parse(schema), {{end()}, 0});
  for (char ch : text) {
    const auto b = static_cast<int32_t>(static_cast<uint8_t>(ch));
    if (!allows(c->allowed(), b)) return false;
    c->accept(b);
  }
  return allows(c->allowed(), end());
}

std::string refusal(const ordered_json& schema) {
  try {
    json_schema_constraint(index(), schema, {{end()}, 0, "response_format"});
  } catch (const Error& e) {
    EXPECT_EQ(e.kind(), Error::Kind::kInput);
    EXPECT_EQ(std::string(e.what()).find('\n'), std::string::npos);
    return e.what();
  }
  return "";
}
std::string refusal(const char* schema) {
  return refusal(ordered_json::parse(schema));
}

TEST(GrammarSchema, Texts) {
  const char* any = R"({"type":"string"})";
  for (const char* yes :
       {R"("")", R"("a b")", R"("\u0000\n\/\"")", R"("\ud83d\ude00")", R"("é日😀")", "\"\x7f\""})
    EXPECT_TRUE(generates(any, yes)) << yes;
  for (const char* no :
       {"\"", "a", R"("\ud83d")", R"("\ude00")", R"("\ud83d\u0041")", R"("\x")", "\"\n\"", "\"\xc0\x80\"",
        "\"\xed\xa0\x80\"", "\"\xf4\x90\x80\x80\"", "\"\xff\"", R"("" )", R"( "")"})
    EXPECT_FALSE(generates(any, no)) << no;
  const char* counted = R"({"type":"string","minLength":2,"maxLength":3})";
  for (const char* yes : {R"("ab")", R"("日本語")", R"("\ud83d\ude00a")", R"("\n\n\n")"})
    EXPECT_TRUE(generates(counted, yes)) << yes;
  for (const char* no : {R"("a")", R"("abcd")", R"("\ud83d\ude00")", R"("日")"})
    EXPECT_FALSE(generates(counted, no)) << no;
  const char* pattern = R"({"type":"string","pattern":"^[a-z]*$","minLength":2,"maxLength":3})";
  EXPECT_TRUE(generates(pattern, R"("ab")"));
  EXPECT_FALSE(generates(pattern, R"("a")"));
  EXPECT_FALSE(generates(pattern, R"("abcd")"));
  EXPECT_FALSE(generates(pattern, R"("\u0061b")"));  // one spelling under a pattern
  EXPECT_TRUE(generates(R"({"type":"string","format":"date"})", R"("2026-02-28")"));
  EXPECT_FALSE(generates(R"({"type":"string","format":"date"})", R"("2026-02-30")"));
  EXPECT_TRUE(generates(R"({"type":"string","format":"date-time"})", R"("2026-11-22T05:11:00Z")"));
  EXPECT_TRUE(generates(R"({"type":"string","format":"uuid"})", R"("123e4567-e89b-12d3-a456-426614174000")"));
  EXPECT_TRUE(generates(R"({"type":"string","format":"email"})", R"("a.b@example.org")"));
  EXPECT_TRUE(generates(R"({"type":"string","format":"duration"})", R"("P3DT4H5M")"));
  EXPECT_TRUE(generates(R"({"type":"string","format":"ipv4"})", R"("255.0.10.1")"));
  EXPECT_FALSE(generates(R"({"type":"string","format":"ipv4"})", R"("256.0.0.1")"));
}

TEST(GrammarSchema, Numbers) {
  const char* any = R"({"type":"integer"})";
  for (const char* yes : {"0", "-1", "10", "999999999999999999"}) EXPECT_TRUE(generates(any, yes)) << yes;
  for (const char* no : {"-0", "01", "1.0", "1e3", "+1", "-", "", "1000000000000000000"})
    EXPECT_FALSE(generates(any, no)) << no;
  for (const auto& [low, high] :
       {std::pair<int64_t, int64_t>{-3, 7}, {0, 0}, {95, 1234}, {-1234, -95}, {-20, 105}, {999, 1000}})
    for (int64_t v = -1500; v <= 1500; ++v)
      ASSERT_EQ(
          generates(ordered_json{{"type", "integer"}, {"minimum", low}, {"maximum", high}}.dump().c_str(),
                    std::to_string(v)),
          low <= v && v <= high)
          << v;
  EXPECT_TRUE(generates(R"({"type":"integer","minimum":-9223372036854775808,"maximum":-9223372036854775808})",
                        "-9223372036854775808"));
  EXPECT_TRUE(generates(R"({"type":"integer","minimum":9223372036854775807})", "9223372036854775807"));
  EXPECT_FALSE(generates(R"({"type":"integer","exclusiveMinimum":1.5,"maximum":2.5})", "3"));
  EXPECT_TRUE(generates(R"({"type":"integer","exclusiveMinimum":1.5,"maximum":2.5})", "2"));

  const char* number = R"({"type":"number"})";
  for (const char* yes : {"0", "-0.5", "1e5", "1E+05", "2.50", "-12e-3"})
    EXPECT_TRUE(generates(number, yes)) << yes;
  for (const char* no : {".5", "1.", "1e", "1e100", "00", "Infinity", "NaN"})
    EXPECT_FALSE(generates(number, no)) << no;
  struct Case {
    const char* keywords;
    double low, high;
    bool open_low, open_high;
  };
  for (const Case& c : {Case{R"("minimum":-1.25,"maximum":10.5)", -1.25, 10.5, false, false},
                        {R"("exclusiveMinimum":0,"exclusiveMaximum":1)", 0, 1, true, true},
                        {R"("minimum":0.75,"exclusiveMaximum":0.8)", 0.75, 0.8, false, true},
                        {R"("maximum":-2.5)", -1e300, -2.5, false, false},
                        {R"("exclusiveMinimum":99.99)", 99.99, 1e300, true, false}}) {
    const std::string schema = std::string(R"({"type":"number",)") + c.keywords + "}";
    for (int i = -400; i <= 12000; i += i < 1200 ? 1 : 97)
      for (const char* format : {"{:.2f}", "{:.4f}"}) {
        const double v = i / 100.0;
        const std::string text = fmt::format(fmt::runtime(format), v);
        const bool within = (c.open_low ? v > c.low : v >= c.low) && (c.open_high ? v < c.high : v <= c.high);
        ASSERT_EQ(generates(schema.c_str(), text), within) << schema << " " << text;
      }
  }
}

TEST(GrammarSchema, Objects) {
  const char* o =
      R"({"type":"object","properties":{"a":{"type":"integer"},"b":{"type":"null"},"c":{"type":"boolean"}},
                      "required":["b"],"additionalProperties":false})";
  for (const char* yes : {R"({"b":null})", R"({"a": 1, "b": null, "c": true})", R"({"b":null,"c":false})"})
    EXPECT_TRUE(generates(o, yes)) << yes;
  for (const char* no : {"{}", R"({"a":1})", R"({"b":null,"a":1})", R"({"b":null,})", R"({"b" :null})",
                         R"({"b":  null})", R"({"b":null,"d":1})", R"({ "b":null})"})
    EXPECT_FALSE(generates(o, no)) << no;
  const char* more =
      R"({"type":"object","properties":{"a":{"type":"integer"}},"additionalProperties":{"type":"boolean"}})";
  for (const char* yes : {"{}", R"({"a":1,"x":true,"y":false})", R"({"x":true})", R"({"\n\u0001":true})"})
    EXPECT_TRUE(generates(more, yes)) << yes;
  for (const char* no :
       {R"({"x":1})", R"({"x":true,"x":true})", R"({"x":true,"a":1})", R"({"a":true})", R"({"\u0061":true})"})
    EXPECT_FALSE(generates(more, no)) << no;
  EXPECT_TRUE(generates(R"({"type":"object","properties":{}})", "{}"));
  EXPECT_FALSE(generates(R"({"type":"object","properties":{}})", R"({"a":1})"));
  EXPECT_TRUE(generates(R"({"type":"object"})", R"({"a":{"a":[1,{"a":2}]}})"));
  EXPECT_TRUE(generates(R"({"type":"object","required":["z"],"additionalProperties":{"type":"null"}})",
                        R"({"z":null,"y":null})"));
}

TEST(GrammarSchema, ArraysAndChoices) {
  const char* a =
      R"({"type":"array","prefixItems":[{"type":"integer"},{"type":"string"}],"items":{"type":"null"},"minItems":1,"maxItems":4})";
  for (const char* yes : {"[1]", R"([1, "a"])", R"([1,"a",null,null])"})
    EXPECT_TRUE(generates(a, yes)) << yes;
  for (const char* no : {"[]", R"(["a"])", R"([1,"a",null,null,null])", "[1,]", "[1 ]"})
    EXPECT_FALSE(generates(a, no)) << no;
  const char* tree = R"({"$defs":{"t":{"type":"array","items":{"$ref":"#/$defs/t"}}},"$ref":"#/$defs/t"})";
  EXPECT_TRUE(generates(tree, "[[],[[]]]"));
  EXPECT_TRUE(generates(tree, std::string(64, '[') + std::string(64, ']')));
  EXPECT_FALSE(generates(tree, std::string(65, '[')));
  const char* any_of = R"({"anyOf":[{"type":"object","properties":{"a":{"type":"integer"}},"required":["a"]},
                                    {"type":"object","properties":{"a":{"type":"string"},"b":{"type":"null"}},"required":["a","b"]}]})";
  EXPECT_TRUE(generates(any_of, R"({"a":1})"));
  EXPECT_TRUE(generates(any_of, R"({"a":"x","b":null})"));
  EXPECT_FALSE(generates(any_of, R"({"a":"x"})"));
  EXPECT_FALSE(generates(any_of, R"({"a":1,"b":null})"));
  EXPECT_TRUE(generates(R"({"type":["integer","null"],"minimum":3})", "null"));
  EXPECT_FALSE(generates(R"({"type":["integer","null"],"minimum":3})", "2"));
  EXPECT_TRUE(generates(R"({"enum":["a","ab",1,null,{"k":[1,"x"]}]})", R"({"k": [1,"x"]})"));
  EXPECT_TRUE(generates(R"({"enum":["a","ab",1,null]})", R"("ab")"));
  EXPECT_FALSE(generates(R"({"enum":["a","ab",1,null]})", R"("b")"));
  EXPECT_TRUE(generates(R"({"type":"integer","enum":["a",5]})", "5"));
  EXPECT_FALSE(generates(R"({"type":"integer","enum":["a",5]})", "\"a\""));
  EXPECT_TRUE(generates(
      R"({"type":"object","anyOf":[{"required":["a"]},{"required":["b"]}],"properties":{"a":{"type":"null"},"b":{"type":"null"}}})",
      R"({"b":null})"));
  EXPECT_FALSE(generates(
      R"({"type":"object","anyOf":[{"required":["a"]},{"required":["b"]}],"properties":{"a":{"type":"null"},"b":{"type":"null"}}})",
      "{}"));
  EXPECT_TRUE(generates(R"({"allOf":[{"type":"integer","minimum":1},{"maximum":2}]})", "2"));
  EXPECT_FALSE(generates(R"({"allOf":[{"type":"integer","minimum":1},{"maximum":2}]})", "3"));
  EXPECT_TRUE(generates(R"({"allOf":[{"prefixItems":[{"type":"null"}],"items":{"type":"integer"}},{"minItems":2}]})", "[null,3]"));
  EXPECT_TRUE(generates(R"({"prefixItems":[{"type":"string"}],"allOf":[{"type":"array","items":{}}],"maxItems":1})", R"(["a"])"));
  EXPECT_TRUE(generates(R"({"oneOf":[{"type":"string"},{"type":"integer"}]})", "3"));
  // The same values whatever the order of their keys.
  const char* both = R"({"allOf":[{"enum":[{"a":1,"b":2},{"c":3}]},{"enum":[{"b":2,"a":1}]}]})";
  EXPECT_TRUE(generates(both, R"({"a":1,"b":2})"));
  EXPECT_FALSE(generates(both, R"({"c":3})"));
  // Ways into which no text fits to the end are not begun: no code point is a surrogate, five are more than three.
  EXPECT_FALSE(generates(R"({"type":"string","pattern":"^(a{5}|b)$","maxLength":3})", R"("a)"));
  EXPECT_TRUE(generates(R"({"type":"string","pattern":"^(a{5}|b)$","maxLength":3})", R"("b")"));
}

TEST(GrammarSchema, WhatIsNotSupportedIsNamedWithItsPlace) {
  const std::pair<const char*, const char*> cases[] = {
      {R"({"type":"object","properties":{"a/b":{"type":"array","uniqueItems":true}}})",
       "response_format: #/properties/a~1b/uniqueItems: this keyword is not supported"},
      {R"({"type":"object","patternProperties":{}})",
       "response_format: #/patternProperties: this keyword is not supported"},
      {R"({"type":"object","minProperties":1})", "#/minProperties"},
      {R"({"not":{}})", "#/not: this keyword is not supported"},
      {R"({"if":{}})", "#/if"},
      {R"({"type":"number","multipleOf":2})", "#/multipleOf"},
      {R"({"type":"strin"})", "#/type: \"\\\"strin\\\"\" is no type"},
      {R"({"$ref":"http://x/y"})", "only references into this schema"},
      {R"({"$ref":"#/$defs/none"})", "leads nowhere"},
      {R"({"$ref":"#"})", "nothing in between"},
      {R"({"$defs":{"a":{"anyOf":[{"$ref":"#/$defs/a"},{"type":"null"}]}},"$ref":"#/$defs/a"})",
       "nothing in between"},
      {R"({"type":"object","properties":{"a":{"$ref":"#"}},"required":["a"]})", "no text satisfies it"},
      {R"({"type":"string","minLength":4,"maxLength":3})", "#: at least 4 characters, and at most 3"},
      {R"x({"type":"string","pattern":"(?=a)"})x", "look-around is not supported"},
      {R"({"type":"string","pattern":"\\bx"})", "word boundaries are not supported"},
      {R"({"type":"string","pattern":"(a)\\1"})", "back-references are not supported"},
      {R"({"type":"string","pattern":"a^"})", "^ is supported at the beginning"},
      {R"({"type":"string","pattern":"["})", "a '[' without ']'"},
      {R"({"type":"string","format":"iri"})", "#/format: the format"},
      {R"({"type":"integer","minimum":5,"maximum":4})", "no integer is within the bounds"},
      {R"({"type":"integer","minimum":"x"})", "#/minimum: a number is expected"},
      {R"({"type":"array","minItems":-1})", "#/minItems: a whole number from 0"},
      {R"({"type":"array","items":[{}]})", "#/items: a schema is expected"},
      {R"({"enum":[]})", "#/enum: a list that is not empty"},
      {R"({"type":"string","enum":[1]})", "none of its values is of its type"},
      {R"({"oneOf":[{"type":"integer"},{"type":"number"}]})", "#/oneOf: schemas 0 and 1 may both hold"},
      {R"({"oneOf":[{"properties":{"a":{}}},{"type":"string"}]})", "may both hold"},
      {R"({"type":"object","properties":{},"required":["a"],"additionalProperties":false})",
       "#/required: \"a\" is not among"},
      {R"({"allOf":[{"properties":{"a":{}},"additionalProperties":false},{"properties":{"b":{}}}]})",
       "differ in additionalProperties"},
      {R"({"anyOf":[{"pattern":"a"}],"pattern":"b"})", "differ in pattern"},
      // `items` is of all items in the one and of those after the prefix in the other.
      {R"({"type":"array","prefixItems":[{"type":"string"}],"allOf":[{"items":{"type":"integer"}}]})", "differ in items"},
      {R"({"type":"array","items":false,"anyOf":[{"prefixItems":[{"type":"string"}]}]})", "differ in items"},
      {R"({"oneOf":[{"const":{"a":1,"b":[2]}},{"const":{"b":[2.0],"a":1}}]})", "may both hold"},
      {R"([])", "response_format: #: a schema is expected"},
      {R"("x")", "a schema is expected"},
      {R"(false)", "no text satisfies it"},
      {R"({"type":"object","properties":{"a":3}})", "#/properties/a: a schema is expected"},
  };
  for (const auto& [schema, words] : cases) {
    const std::string line = refusal(schema);
    EXPECT_TRUE(line.starts_with("response_format: #")) << schema << " -> " << line;
    EXPECT_NE(line.find(words), std::string::npos) << schema << " -> " << line;
  }
  EXPECT_NE(refusal(ordered_json{{"const", "\xff"}}).find("not UTF-8"), std::string::npos);
  EXPECT_EQ(
      refusal(
          R"({"type":"integer","title":"t","description":"d","default":1,"examples":[1],"$comment":"c","$schema":"s"})"),
      "");
}

TEST(GrammarSchema, HostileSchemasAreRefusedOrFast) {
  std::map<std::string, ordered_json> schemas;
  ordered_json deep = {{"type", "null"}};
  for (int i = 0; i < 2000; ++i) deep = {{"type", "array"}, {"items", deep}};
  schemas["deep"] = deep;
  ordered_json needs = {{"type", "null"}};
  for (int i = 0; i < 70; ++i) needs = {{"type", "array"}, {"items", needs}, {"minItems", 1}};
  schemas["needs depth"] = needs;
  ordered_json big = {{"enum", ordered_json::array()}};
  for (int i = 0; i < 20000; ++i) big["enum"].push_back(fmt::format("value {}", i * 7919));
  schemas["huge enum"] = big;
  schemas["larger than allowed"] = {{"const", std::string(2 << 20, 'x')}};
  ordered_json doubling = {{"$defs", ordered_json::object()}, {"$ref", "#/$defs/d0"}};
  for (int i = 0; i < 40; ++i)
    doubling["$defs"][fmt::format("d{}", i)] = {
        {"anyOf",
         {{{"$ref", fmt::format("#/$defs/d{}", i + 1)}}, {{"$ref", fmt::format("#/$defs/d{}", i + 1)}}}}};
  doubling["$defs"]["d40"] = {{"type", "string"}};
  schemas["doubling"] = doubling;
  ordered_json nested = doubling;
  for (int i = 0; i < 40; ++i) {
    auto& d = nested["$defs"][fmt::format("d{}", i)];
    for (auto& b : d["anyOf"]) b = {{"type", "array"}, {"items", b}, {"minItems", 1}, {"maxItems", 1}};
  }
  schemas["ambiguous"] = nested;
  ordered_json every = doubling;
  for (int i = 0; i < 40; ++i) {
    auto& d = every["$defs"][fmt::format("d{}", i)];
    d = {{"allOf",
          {{{"$ref", fmt::format("#/$defs/d{}", i + 1)}}, {{"$ref", fmt::format("#/$defs/d{}", i + 1)}}}}};
  }
  schemas["merging"] = every;
  schemas["long"] = {{"type", "string"}, {"minLength", 1000000000}, {"maxLength", 2000000000}};
  schemas["many items"] = {{"type", "array"}, {"minItems", 1000000000}};
  ordered_json wide = {{"type", "object"}, {"properties", ordered_json::object()}};
  for (int i = 0; i < 1000; ++i)
    wide["properties"][fmt::format("property number {}", i)] = {
        {"type", "number"}, {"minimum", 0.5}, {"maximum", 99.5}};
  schemas["wide"] = wide;
  for (const char* p :
       {"(a*)*b", "(a|aa)+$", "(.*)(.*)(.*)(.*)x{100}", "a{1000}{1000}", "((a{100}){100}){100}",
        "[^x]*x.{200}", "(x+x+)+y", "(((((((((((((((((((((a?)?)?)?)?)?)?)?)?)?)?)?)?)?)?)?)?)?)?)?)?)?"})
    schemas[std::string("pattern ") + p] = {{"type", "string"}, {"pattern", p}};
  std::string pipes;
  for (int i = 0; i < 500; ++i) pipes += fmt::format("{}w{}.*", i == 0 ? "" : "|", i);
  schemas["pattern of many"] = {{"type", "string"}, {"pattern", pipes}};
  for (const auto& [name, schema] : schemas) {
    SCOPED_TRACE(name);
    const std::clock_t begin = std::clock();  // of the processor: the machine may be busy with others
    std::unique_ptr<GrammarConstraint> c;
    std::string line;
    try {
      c = json_schema_constraint(index(), schema, {{end()}, 400});
      for (int i = 0; i < 200 && !c->complete(); ++i) {
        const auto bits = c->allowed();
        int32_t token = 0;
        while (token < 256 && !allows(bits, token)) ++token;
        ASSERT_LT(token, 256);
        c->accept(token);
      }
    } catch (const Error& e) {
      line = e.what();
    }
    const double s = static_cast<double>(std::clock() - begin) / CLOCKS_PER_SEC;
    EXPECT_LT(s, 30) << line;  // 0.2 s on an idle machine; a sanitizer on a loaded one takes fifty times as long
    RecordProperty(name, fmt::format("{:.3f} s {}", s, line.substr(0, 120)));
  }
}

TEST(GrammarPattern, MatchesWhatItSays) {
  const auto matches = [](const char* p, const char32_t* text) { return compile_pattern(p).matches(text); };
  EXPECT_TRUE(matches("b", U"abc"));
  EXPECT_FALSE(matches("^b", U"abc"));
  EXPECT_TRUE(matches("^a|c$", U"abd"));
  EXPECT_TRUE(matches("^a|c$", U"xc"));
  EXPECT_FALSE(matches("^a|c$", U"xcx"));
  EXPECT_TRUE(matches("^(ab){2,3}$", U"ababab"));
  EXPECT_FALSE(matches("^(ab){2,3}$", U"ab"));
  EXPECT_TRUE(matches("^a{2,}$", U"aaaa"));
  EXPECT_TRUE(matches("^x{,3}$", U"x{,3}"));  // not a count: text
  EXPECT_TRUE(matches("^[\\w.-]+$", U"a.b-c_9"));
  EXPECT_TRUE(matches("^[^\\d]$", U"日"));
  EXPECT_FALSE(matches("^.$", U"\n"));
  EXPECT_TRUE(matches("^\\u{1F600}\\x41\\u00e9$", U"😀Aé"));
  EXPECT_TRUE(matches("^\\ud83d\\ude00$", U"😀"));
  EXPECT_TRUE(matches("^a+?b*?$", U"aab"));
  EXPECT_TRUE(matches("", U""));
  EXPECT_TRUE(matches("^(?:a|(?<n>b))+$", U"abba"));
}

TEST(GrammarNumbers, DecimalsAreExact) {
  EXPECT_EQ(decimal(0.1)->fraction, "1");
  EXPECT_EQ(decimal(120)->whole, "120");
  EXPECT_EQ(decimal(0)->whole, "0");
  EXPECT_FALSE(decimal(1e15).has_value());
  EXPECT_FALSE(decimal(0.1 + 0.2).has_value());
}

}  // namespace
}  // namespace perigee::policy
