// Schemas that hold together, of any keywords at random: what is generated satisfies each of them, as a validator that
// knows nothing of merging sees it. What cannot be merged is refused, so nothing is said of those.
#include <gtest/gtest.h>

#include "base/error.h"
#include "policy/grammar/grammar.h"
#include "tests/policy/grammar/generate.h"
#include "tests/policy/grammar/validator.h"

namespace perigee::policy {
namespace {

using nlohmann::ordered_json;

class AnySchema {
 public:
  // Most of its schemas are about the same type, so that they have something to agree on.
  explicit AnySchema(Random& r) : r_(r), topic_(r.next_int(0, 4)) {}

  ordered_json make(int depth) {
    if (chance(6)) return chance(70);
    ordered_json s = ordered_json::object();
    const int64_t kind = chance(80) ? topic_ : r_.next_int(0, 6);
    if (chance(50)) s["type"] = chance(80) ? ordered_json(kTypes[kind]) : ordered_json{kTypes[kind], kTypes[r_.next_int(0, 6)]};
    if (kind == 0) objects(s, depth);
    if (kind == 1) arrays(s, depth);
    if (kind == 2) lengths(s, "minLength", "maxLength");
    if (kind == 3 || kind == 4) numbers(s);
    if (chance(10)) s["enum"] = values();
    if (chance(5)) s["const"] = value(1);
    if (depth > 0 && chance(12)) s["$ref"] = "#/$defs/" + std::string(1, static_cast<char>('x' + r_.next_int(0, 1)));
    for (const char* key : {"allOf", "anyOf", "oneOf"})
      if (depth > 0 && chance(12)) {
        s[key] = ordered_json::array();
        for (int64_t n = r_.next_int(1, 3); n > 0; --n) s[key].push_back(make(depth - 1));
      }
    return s;
  }

 private:
  static constexpr const char* kTypes[] = {"object", "array", "string", "integer", "number", "boolean", "null"};

  bool chance(int percent) { return r_.next_int(0, 99) < percent; }
  const char* name() {
    static constexpr const char* names[] = {"a", "b", "c"};
    return names[r_.next_int(0, 2)];
  }
  ordered_json value(int depth) {
    switch (r_.next_int(0, depth > 0 ? 8 : 6)) {
      case 0: return nullptr;
      case 1: return chance(50);
      case 2: return r_.next_int(-2, 4);
      case 3: return static_cast<double>(r_.next_int(-4, 8)) / 2;
      case 4: return "a";
      case 5: return "bc";
      case 6: return "";
      case 7: return ordered_json{{name(), value(0)}, {"d", value(0)}};
      default: return ordered_json::array({value(0), value(0)});
    }
  }
  ordered_json values() {
    ordered_json list = ordered_json::array();
    for (int64_t n = r_.next_int(1, 4); n > 0; --n) list.push_back(value(1));
    return list;
  }
  void lengths(ordered_json& s, const char* low, const char* high) {
    if (chance(40)) s[low] = r_.next_int(0, 2);
    if (chance(40)) s[high] = r_.next_int(1, 4);
  }
  void numbers(ordered_json& s) {
    for (const char* key : {"minimum", "exclusiveMinimum"})
      if (chance(35)) s[key] = static_cast<double>(r_.next_int(-5, 3)) / (chance(50) ? 1 : 2);
    for (const char* key : {"maximum", "exclusiveMaximum"})
      if (chance(35)) s[key] = r_.next_int(1, 8);
  }
  void arrays(ordered_json& s, int depth) {
    lengths(s, "minItems", "maxItems");
    if (depth > 0 && chance(50)) s["items"] = make(depth - 1);
    if (depth > 0 && chance(35)) {
      s["prefixItems"] = ordered_json::array();
      for (int64_t n = r_.next_int(0, 2); n > 0; --n) s["prefixItems"].push_back(make(depth - 1));
    }
  }
  void objects(ordered_json& s, int depth) {
    if (depth > 0 && chance(60)) {
      s["properties"] = ordered_json::object();
      for (int64_t n = r_.next_int(1, 3); n > 0; --n) s["properties"][name()] = make(depth - 1);
    }
    if (chance(40)) s["required"] = ordered_json::array({name()});
    if (chance(40)) s["additionalProperties"] = depth > 0 && chance(40) ? make(depth - 1) : ordered_json(chance(50));
  }

  Random& r_;
  int64_t topic_;
};

TEST(GrammarMerge, WhatIsGeneratedSatisfiesEverySchemaThatHolds) {
  static const ByteTokenizer tokenizer;
  static const TokenIndex index(tokenizer);
  const int32_t end = tokenizer.special(special::kImEnd);
  int accepted = 0, texts = 0;
  for (uint64_t seed = 0; seed < 12'000; ++seed) {
    Random r(seed, 5);
    AnySchema any(r);
    ordered_json schema = any.make(2);
    if (!schema.is_object()) continue;
    // Two at least that hold together.
    const char* const together[] = {"allOf", "anyOf", "oneOf", "$ref"};
    const char* const key = together[r.next_int(0, 3)];
    if (std::string_view(key) == "$ref")
      schema[key] = "#/$defs/x";
    else
      schema[key] = ordered_json::array({any.make(2), any.make(1)});
    schema["$defs"] = {{"x", any.make(1)}, {"y", any.make(1)}};
    std::unique_ptr<GrammarConstraint> first;
    try {
      first = json_schema_constraint(index, schema, {{end}, 0});
    } catch (const Error& e) {
      ASSERT_EQ(e.kind(), Error::Kind::kInput) << schema;
      continue;
    }
    ++accepted;
    const int64_t limit = first->min_tokens_to_finish() + 40;
    for (int n = 0; n < 3; ++n) {
      auto c = json_schema_constraint(index, schema, {{end}, limit});
      std::string text;
      for (;;) {
        std::vector<int32_t> allowed;
        const auto bits = c->allowed();
        for (int32_t t = 0; t < tokenizer.vocab_size(); ++t)
          if (allows(bits, t)) allowed.push_back(t);
        ASSERT_FALSE(allowed.empty()) << "seed " << seed << " schema " << schema << " after " << text;
        const int32_t t = allowed[static_cast<size_t>(r.next_int(0, std::ssize(allowed) - 1))];
        if (t == end) break;
        c->accept(t);
        text += tokenizer.token(t);
      }
      ++texts;
      ASSERT_EQ(form_violation(text), "") << "seed " << seed << " schema " << schema << " text " << text;
      ASSERT_EQ(schema_violation(schema, ordered_json::parse(text)), "")
          << "seed " << seed << " schema " << schema << " text " << text;
    }
  }
  std::printf("%d of schemas accepted\n", accepted);
  EXPECT_GT(accepted, 1000);
  EXPECT_EQ(texts, 3 * accepted);
}

}  // namespace
}  // namespace perigee::policy
