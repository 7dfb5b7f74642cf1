// What masks allow, and what they do not: random walks, values that have to be accepted, and every token of a
// vocabulary against the bytes it is made of.
#include <gtest/gtest.h>

#include <algorithm>

#include "base/error.h"
#include "base/json.h"
#include "policy/grammar/grammar.h"
#include "tests/policy/grammar/generate.h"
#include "tests/policy/grammar/validator.h"

namespace perigee::policy {
namespace {

using nlohmann::ordered_json;

const ByteTokenizer& byte_tokenizer() {
  static const ByteTokenizer t;
  return t;
}
const TokenIndex& byte_index() {
  static const TokenIndex i(byte_tokenizer());
  return i;
}
const ListTokenizer& crossing() {
  static const auto t = crossing_vocabulary(3000, 5);
  return *t;
}
const TokenIndex& crossing_index() {
  static const TokenIndex i(crossing());
  return i;
}

std::vector<int32_t> allowed_tokens(GrammarConstraint& c) {
  std::vector<int32_t> out;
  const auto bits = c.allowed();
  for (size_t w = 0; w < bits.size(); ++w)
    for (uint32_t m = bits[w]; m != 0; m &= m - 1)
      out.push_back(static_cast<int32_t>(w * 32) + __builtin_ctz(m));
  return out;
}

// Draws until the end token: the text. Tokens that hold more than one byte are preferred where there are some.
std::string walk(GrammarConstraint& c, const Tokenizer& t, int32_t end, Random& r, int64_t limit) {
  std::string text;
  for (int64_t i = 0; i < limit; ++i) {
    const auto tokens = allowed_tokens(c);
    if (tokens.empty()) return "DEAD END after " + text;
    int32_t token = tokens[static_cast<size_t>(r.next_int(0, static_cast<int64_t>(tokens.size()) - 1))];
    if (allows(c.allowed(), end) && r.next_int(0, 9) < 5) token = end;
    c.accept(token);
    if (token == end) return text;
    if (t.is_special(token)) return "SPECIAL after " + text;
    text += t.token(token);
  }
  return "NO END after " + text;
}

class Grammar : public ::testing::TestWithParam<bool> {
 protected:
  const Tokenizer& tokenizer() const {
    if (GetParam()) return crossing();
    return byte_tokenizer();
  }
  const TokenIndex& index() const { return GetParam() ? crossing_index() : byte_index(); }
  int32_t end() const { return tokenizer().special(special::kImEnd); }
  ConstraintOptions options(int64_t max_tokens) const { return {{end()}, max_tokens}; }
};
INSTANTIATE_TEST_SUITE_P(Vocabularies, Grammar, ::testing::Values(false, true),
                         [](const auto& p) { return p.param ? "Crossing" : "Bytes"; });

TEST_P(Grammar, EveryWalkIsAValidValue) {
  int64_t ends_at_once = 0;
  for (uint64_t seed = 0; seed < 1500; ++seed) {
    Random r(seed, 1);
    const ordered_json schema = random_schema(r);
    SCOPED_TRACE(fmt::format("seed {} schema {}", seed, schema.dump()));
    std::unique_ptr<GrammarConstraint> first;
    try {
      first = json_schema_constraint(index(), schema, options(0));
    } catch (const Error& e) {
      FAIL() << e.what();
    }
    const int64_t least = first->min_tokens_to_finish();
    for (int n = 0; n < 3; ++n) {
      // The last walk has as many tokens as it needs and none to spare.
      const int64_t limit = n == 2 ? least : least + r.next_int(0, 120);
      auto c = json_schema_constraint(index(), schema, options(limit));
      const std::string text = walk(*c, tokenizer(), end(), r, limit);
      ASSERT_EQ(form_violation(text), "") << text;
      ASSERT_EQ(schema_violation(schema, ordered_json::parse(text)), "") << text;
      ends_at_once += n == 2;
    }
  }
  EXPECT_EQ(ends_at_once, 1500);
}

TEST_P(Grammar, EveryValueIsAccepted) {
  int accepted = 0;
  for (uint64_t seed = 0; seed < 2000; ++seed) {
    Random r(seed, 2);
    const ordered_json schema = random_schema(r);
    auto c = json_schema_constraint(index(), schema, options(0));
    for (int n = 0; n < 2; ++n) {
      const auto text = random_instance(schema, r);
      if (!text) continue;
      SCOPED_TRACE(fmt::format("seed {} schema {} text {}", seed, schema.dump(), *text));
      ASSERT_EQ(schema_violation(schema, ordered_json::parse(*text)), "");  // of the test itself
      auto copy = c->clone();
      std::string so_far;
      for (int32_t t : random_tokens(tokenizer(), *text, r)) {
        ASSERT_TRUE(allows(copy->allowed(), t)) << "after " << so_far << " not " << tokenizer().token(t);
        copy->accept(t);
        so_far += tokenizer().token(t);
      }
      ASSERT_TRUE(allows(copy->allowed(), end()));
      ++accepted;
    }
  }
  EXPECT_GT(accepted, 3000);
}

// Counts are of characters, however they are spelled, and of the bytes that tokens hold.
TEST(GrammarMasks, CharactersAreCountedHoweverSpelled) {
  std::vector<std::string> list;
  for (int b = 0; b < 256; ++b) list.emplace_back(1, static_cast<char>(b));
  for (const char* end : {"", "\"", "\",", "\"]"})
    for (const char* text : {"ab", "abc", "\\ud83d\\ude00", "\\ud83d\\ude00a", "\\ud83d\\ude00ab",
                             "\\ud83d\\ud", "\\ud83d\\ude00\\ud83d\\ude00", "\\n\\n", "\\n\\n\\n", "\\u00e9x",
                             "éé", "ééé", "😀日", "a\xC3", "ab\xC3"})
      list.push_back(std::string(text) + end);
  std::sort(list.begin() + 256, list.end());
  list.erase(std::unique(list.begin() + 256, list.end()), list.end());
  const ListTokenizer tokenizer(list);
  const TokenIndex index(tokenizer);
  const int32_t end = tokenizer.special(special::kImEnd),
                byte_end = byte_tokenizer().special(special::kImEnd);
  for (const auto& [min, max] : {std::pair{2, 2}, {0, 2}, {1, 1}, {3, 3}, {2, 1000000}, {0, 1000000}}) {
    const ordered_json schema = {{"type", "array"},
                                 {"items", {{"type", "string"}, {"minLength", min}, {"maxLength", max}}}};
    auto tokens = json_schema_constraint(index, schema, {{end}, 0});
    auto bytes = json_schema_constraint(byte_index(), schema, {{byte_end}, 0});
    for (char c : std::string("[\"")) {
      tokens->accept(c);
      bytes->accept(c);
    }
    for (int32_t t = 0; t < static_cast<int32_t>(list.size()); ++t) {
      auto copy = bytes->clone();
      bool expected = true;
      for (char c : list[static_cast<size_t>(t)]) {
        expected = expected && allows(copy->allowed(), static_cast<uint8_t>(c));
        if (expected) copy->accept(static_cast<uint8_t>(c));
      }
      EXPECT_EQ(allows(tokens->allowed(), t), expected)
          << min << " " << max << " " << list[static_cast<size_t>(t)];
    }
  }
}

// A token is allowed exactly where its bytes are, one after the other.
TEST(GrammarMasks, AreThoseOfTheBytes) {
  const int32_t end = crossing().special(special::kImEnd),
                byte_end = byte_tokenizer().special(special::kImEnd);
  int64_t compared = 0, allowed_count = 0;
  for (uint64_t seed = 0; seed < 60; ++seed) {
    Random r(seed, 3);
    const ordered_json schema = seed % 10 == 0 ? ordered_json{{"type", "object"}} : random_schema(r);
    auto tokens = json_schema_constraint(crossing_index(), schema, {{end}, 0});
    std::unique_ptr<TokenConstraint> bytes = json_schema_constraint(byte_index(), schema, {{byte_end}, 0});
    std::string text;
    for (int step = 0; step < 12; ++step) {
      const auto mask = tokens->allowed();
      std::vector<int32_t> plain;
      for (int32_t t = 0; t < crossing().vocab_size(); ++t) {
        bool expected = false;
        if (!crossing().is_special(t)) {
          auto copy = bytes->clone();
          expected = true;
          for (char ch : crossing().token(t)) {
            const auto b = static_cast<int32_t>(static_cast<uint8_t>(ch));
            if (!allows(copy->allowed(), b)) {
              expected = false;
              break;
            }
            copy->accept(b);
          }
        } else if (t == end) {
          expected = allows(bytes->allowed(), byte_end);
        }
        ASSERT_EQ(allows(mask, t), expected) << "seed " << seed << " schema " << schema.dump() << " after "
                                             << text << " token " << crossing().token(t);
        ++compared;
        allowed_count += expected;
        if (expected && t != end) plain.push_back(t);
      }
      if (plain.empty()) break;
      const int32_t t = plain[static_cast<size_t>(r.next_int(0, static_cast<int64_t>(plain.size()) - 1))];
      for (char ch : crossing().token(t)) bytes->accept(static_cast<uint8_t>(ch));
      tokens->accept(t);
      text += crossing().token(t);
    }
  }
  EXPECT_GT(compared, 1'000'000);
  EXPECT_GT(allowed_count, 20'000);
}

TEST_P(Grammar, AnyObjectHasNoKeyTwice) {
  for (uint64_t seed = 0; seed < 300; ++seed) {
    Random r(seed, 4);
    const int64_t limit = 2 + r.next_int(1, 300);
    auto c = json_object_constraint(index(), options(limit));
    const std::string text = walk(*c, tokenizer(), end(), r, limit);
    ASSERT_EQ(form_violation(text), "") << "seed " << seed << " " << text;
    ASSERT_TRUE(ordered_json::parse(text).is_object());
  }
}

TEST_P(Grammar, AKeyThatIsThereCannotEndAgain) {
  auto c = json_object_constraint(index(), options(0));
  const auto feed = [&](std::string_view text) {
    for (char ch : text) c->accept(static_cast<uint8_t>(ch));
  };
  feed(R"({"ab":{"ab":1},"a":0,"ab)");
  EXPECT_FALSE(allows(c->allowed(), '"'));
  EXPECT_TRUE(allows(c->allowed(), 'c'));
  feed("c\":2");
  EXPECT_TRUE(allows(c->allowed(), '}'));
  if (GetParam()) {
    feed(R"(,"name":1)");
    const auto token = [&](const char* text) {
      std::vector<int32_t> ids;
      tokenizer().append_plain(text, ids);
      return ids;
    };
    for (const char* text : {",\"a\"", ",\"name\""})
      if (const auto ids = token(text); ids.size() == 1) {
        EXPECT_FALSE(allows(c->allowed(), ids[0])) << text;
      }
  }
}

TEST(GrammarMasks, ACloneGoesOnAlone) {
  const ordered_json schema = {{"type", "array"}, {"items", {{"type", "object"}}}};
  for (uint64_t seed = 0; seed < 40; ++seed) {
    Random r(seed, 6);
    auto c = json_schema_constraint(crossing_index(), schema, {{crossing().special(special::kImEnd)}, 0});
    for (int i = 0; i < 10; ++i) {
      const auto tokens = allowed_tokens(*c);
      const int32_t t = tokens[static_cast<size_t>(r.next_int(0, static_cast<int64_t>(tokens.size()) - 1))];
      if (crossing().is_special(t)) break;
      c->accept(t);
    }
    const auto before = allowed_tokens(*c);
    auto copy = c->clone();
    const auto bits = copy->allowed();
    for (int32_t t = 0; t < crossing().vocab_size(); ++t)
      ASSERT_EQ(allows(bits, t), std::binary_search(before.begin(), before.end(), t)) << seed;
    if (!crossing().is_special(before[0])) copy->accept(before[0]);
    EXPECT_EQ(allowed_tokens(*c), before);
  }
}

// A machine that has met too many states starts anew; nothing of that shows.
TEST(GrammarMasks, LongTextsStayExact) {
  Random r(9, 9);
  const ordered_json schema = ordered_json::parse(
      R"({"type":"array","items":{"type":"object","additionalProperties":{"type":"string","maxLength":40}}})");
  std::string text = "[";
  for (int i = 0; i < 300; ++i)
    text += fmt::format("{}{{\"k{}\": \"v{}\", \"long key {}\":\"{}\"}}", i == 0 ? "" : ",", i, i, i * 7,
                        std::string(static_cast<size_t>(i % 40), 'x'));
  text += "]";
  auto c = json_schema_constraint(crossing_index(), schema, {{crossing().special(special::kImEnd)}, 0});
  for (int32_t t : random_tokens(crossing(), text, r)) {
    ASSERT_TRUE(allows(c->allowed(), t));
    c->accept(t);
  }
  EXPECT_TRUE(c->complete());
}

}  // namespace
}  // namespace perigee::policy
