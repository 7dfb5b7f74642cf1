#include "policy/tokenizer/tiktoken.h"

#include <gtest/gtest.h>

#include <ctime>

#include "base/error.h"
#include "base/random.h"
#include "tests/policy/tokenizer/trained_vocabulary.h"

namespace perigee::policy {
namespace {

const std::vector<std::string>& vocabulary() {
  static const auto v = train_vocabulary(160);
  return v;
}
int64_t vocab_size() {
  return std::ssize(vocabulary()) + 256;
}
const TiktokenTokenizer& tokenizer() {
  static const TiktokenTokenizer t(tiktoken_file(vocabulary()), "tiktoken.model", vocab_size());
  return t;
}

// Byte pair encoding as it is defined: look at all neighbours, merge the lowest rank, begin again.
std::vector<int32_t> naive_merge(const std::string& piece) {
  std::map<std::string, int32_t> ranks;
  for (size_t r = 0; r < vocabulary().size(); ++r) ranks[vocabulary()[r]] = static_cast<int32_t>(r);
  if (ranks.contains(piece)) return {ranks[piece]};
  std::vector<std::string> parts;
  for (char c : piece) parts.emplace_back(1, c);
  for (;;) {
    int32_t best = INT32_MAX;
    size_t at = 0;
    for (size_t i = 0; i + 1 < parts.size(); ++i)
      if (const auto it = ranks.find(parts[i] + parts[i + 1]); it != ranks.end() && it->second < best) {
        best = it->second;
        at = i;
      }
    if (best == INT32_MAX) break;
    parts[at] += parts[at + 1];
    parts.erase(parts.begin() + static_cast<std::ptrdiff_t>(at) + 1);
  }
  std::vector<int32_t> out;
  for (const auto& p : parts) out.push_back(ranks[p]);
  return out;
}

// Bytes from the training text, from the whole range, or long repeats.
std::string random_text(Random& random) {
  std::string out;
  const int parts = static_cast<int>(random.next_int(0, 8));
  for (int i = 0; i < parts; ++i) {
    const std::string& t = training_text();
    const size_t at = static_cast<size_t>(random.next_int(0, std::ssize(t) - 1)),
                 n = static_cast<size_t>(random.next_int(1, 20));
    switch (random.next_int(0, 3)) {
      case 0:
        out += t.substr(at, n);
        break;
      case 1:
        out += std::string(n, t[at]);
        break;
      case 2:
        for (size_t j = 0; j < n; ++j) out += static_cast<char>(random.next_u32());
        break;
      default:
        out += "<|im_end|>";
        break;
    }
  }
  return out;
}

TEST(Tiktoken, MergingEqualsTheDefinition) {
  for (uint64_t seed = 0; seed < 1500; ++seed) {
    Random random(seed);
    const std::string piece = random_text(random);
    if (piece.empty()) continue;
    std::vector<int32_t> got;
    tokenizer().merge(piece, got);
    ASSERT_EQ(got, naive_merge(piece)) << "seed " << seed;
  }
}

TEST(Tiktoken, AnyBytesComeBack) {
  for (uint64_t seed = 0; seed < 3000; ++seed) {
    Random random(seed, 1);
    const std::string text = random_text(random);
    const auto ids = tokenizer().encode(text);
    ASSERT_EQ(tokenizer().decode(ids), text) << "seed " << seed;
    for (int32_t id : ids) ASSERT_FALSE(tokenizer().is_special(id));
    ASSERT_EQ(tokenizer().decode(tokenizer().encode(text, true)), text) << "seed " << seed;
    size_t total = 0;
    for (auto piece : tokenizer().split(text)) total += piece.size();
    ASSERT_EQ(total, text.size());
  }
}

TEST(Tiktoken, ATextIsItsPiecesMergedOneByOne) {
  std::vector<int32_t> want;
  for (std::string_view piece : tokenizer().split(training_text()))
    for (int32_t id : naive_merge(std::string(piece))) want.push_back(id);
  EXPECT_EQ(tokenizer().encode(training_text()), want);
  EXPECT_LT(want.size(), training_text().size());
}

// Pieces by hand from the alternatives of the pattern.
TEST(Tiktoken, ThePatternCutsWhereTheReleaseDoes) {
  using Pieces = std::vector<std::string_view>;
  const auto split = [](std::string_view text) { return tokenizer().split(text); };
  EXPECT_EQ(split("Hello world"), (Pieces{"Hello", " world"}));
  EXPECT_EQ(split("it's WE'RE x'd"), (Pieces{"it's", " WE'RE", " x'd"}));
  EXPECT_EQ(split("1234567"), (Pieces{"123", "456", "7"}));
  EXPECT_EQ(split("helloWorld"), (Pieces{"hello", "World"}));
  EXPECT_EQ(split("HTTPServer"), (Pieces{"HTTPServer"}));
  EXPECT_EQ(split("a  b"), (Pieces{"a", " ", " b"}));
  EXPECT_EQ(split("a \n\n b"), (Pieces{"a", " \n\n", " b"}));
  EXPECT_EQ(split("end   "), (Pieces{"end", "   "}));
  EXPECT_EQ(split("x = {};\n"), (Pieces{"x", " =", " {};\n"}));
  EXPECT_EQ(split("ab你好cd"), (Pieces{"ab", "你好", "cd"}));
  EXPECT_EQ(split("你 好"), (Pieces{"你", " ", "好"}));
  EXPECT_EQ(split("3个"), (Pieces{"3", "个"}));
  EXPECT_EQ(split("😀😀a"), (Pieces{"😀😀", "a"}));
  // White space by the Unicode property: U+000B and U+0085, too.
  EXPECT_EQ(split("a\v\vb"), (Pieces{"a", "\v", "\vb"}));
  EXPECT_EQ(split("!\xC2\x85"), (Pieces{"!", "\xC2\x85"}));
  // Broken bytes stand alone.
  EXPECT_EQ(split("ab\xFF\xC3 cd"), (Pieces{"ab", "\xFF\xC3", " cd"}));
  EXPECT_EQ(split("\xED\xA0\x80x"), (Pieces{"\xED\xA0\x80", "x"}));
  EXPECT_EQ(split(""), Pieces{});
}

TEST(Tiktoken, AMegabytePieceIsNotQuadratic) {
  for (const std::string& unit : {std::string("a"), std::string("ab"), std::string(" "), std::string("\xFF"),
                                  std::string("A"), std::string("你"), std::string("."), std::string("\n")}) {
    std::string text;
    while (text.size() < (1u << 20)) text += unit;
    const std::clock_t start = std::clock();  // of the processor: the machine may be busy with others
    const auto ids = tokenizer().encode(text);
    const double seconds = static_cast<double>(std::clock() - start) / CLOCKS_PER_SEC;
    EXPECT_EQ(tokenizer().decode(ids), text);
    // A quadratic merge takes minutes; this takes about a second under a sanitizer.
    EXPECT_LT(seconds, 30) << unit;
  }
}

TEST(Tiktoken, SpecialTokensStandWhereTheReleaseHasThem) {
  const int32_t n = static_cast<int32_t>(vocabulary().size());
  const auto& t = tokenizer();
  EXPECT_EQ(t.special("[BOS]"), n);
  EXPECT_EQ(t.special("[EOS]") - n, 163585 - 163584);
  EXPECT_EQ(t.special("<|im_end|>") - n, 163586 - 163584);
  EXPECT_EQ(t.special("<|im_user|>") - n, 163587 - 163584);
  EXPECT_EQ(t.special("<|im_assistant|>") - n, 163588 - 163584);
  EXPECT_EQ(t.special("<|start_header_id|>") - n, 163590 - 163584);
  EXPECT_EQ(t.special("<|end_header_id|>") - n, 163591 - 163584);
  EXPECT_EQ(t.special("[EOT]") - n, 163593 - 163584);
  EXPECT_EQ(t.special("<|im_system|>") - n, 163594 - 163584);
  EXPECT_EQ(t.special("<|tool_calls_section_begin|>") - n, 163595 - 163584);
  EXPECT_EQ(t.special("<|tool_calls_section_end|>") - n, 163596 - 163584);
  EXPECT_EQ(t.special("<|tool_call_begin|>") - n, 163597 - 163584);
  EXPECT_EQ(t.special("<|tool_call_argument_begin|>") - n, 163598 - 163584);
  EXPECT_EQ(t.special("<|tool_call_end|>") - n, 163599 - 163584);
  EXPECT_EQ(t.special("<|im_middle|>") - n, 163601 - 163584);
  EXPECT_EQ(t.special("[UNK]") - n, 163838 - 163584);
  EXPECT_EQ(t.special("[PAD]") - n, 163839 - 163584);
  EXPECT_EQ(t.specials().size(), 17u);
  EXPECT_EQ(t.token(n + 5), "<|reserved_token_" + std::to_string(n + 5) + "|>");
  EXPECT_EQ(t.vocab_size(), n + 256);
}

std::string error_of(const std::string& file, int64_t vocab) {
  try {
    TiktokenTokenizer t(file, "tiktoken.model", vocab);
  } catch (const Error& e) {
    EXPECT_EQ(e.exit_code(), 2);
    return e.what();
  }
  return "no error";
}

TEST(Tiktoken, DamagedAndForeignFilesAreRefusedWithTheLine) {
  const std::string good = tiktoken_file(vocabulary());
  const int64_t n = std::ssize(vocabulary());
  const auto replace_line = [&](int64_t line, const std::string& text) {
    size_t at = 0;
    for (int64_t i = 1; i < line; ++i) at = good.find('\n', at) + 1;
    return good.substr(0, at) + text + good.substr(good.find('\n', at));
  };
  const struct {
    std::string file, says;
  } cases[] = {
      {"", "tiktoken.model: no tokens"},
      {replace_line(7, "garbage"), "tiktoken.model:7: \"garbage\" is not \"BASE64 RANK\""},
      {replace_line(7, "B?== 6"), "tiktoken.model:7: \"B?==\" is not base64"},
      {replace_line(7, "Bg= 6"), "tiktoken.model:7: \"Bg=\" is not base64"},
      {replace_line(7, "Bh== 6"), "tiktoken.model:7: \"Bh==\" is not base64"},  // bits after the last byte
      {replace_line(7, "Bg== six"), "tiktoken.model:7: \"six\" is not a rank"},
      {replace_line(7, "Bg== -6"), "tiktoken.model:7: \"-6\" is not a rank"},
      {replace_line(7, "Bg== 6 "), "tiktoken.model:7: \"6 \" is not a rank"},
      {replace_line(7, "Bg== 5"), "tiktoken.model:7: rank 5 stands on token 6, too"},
      {replace_line(7, "Bg== 99999"), "tiktoken.model:7: rank 99999 in a file of"},
      {replace_line(7, "BQ== 6"), "token \"\\x05\" stands twice"},
      {replace_line(7, "BgYGBgY= 6"), "no token for the byte 0x06"},
      {"{\"version\": \"1.0\"}\n", "tiktoken.model:1: "},
      {"version https://git-lfs.github.com/spec/v1\n", "tiktoken.model:1: "},
      {good.substr(0, good.size() / 2), "tiktoken.model"},
  };
  for (const auto& c : cases)
    EXPECT_NE(error_of(c.file, n + 256).find(c.says), std::string::npos)
        << c.says << " / " << error_of(c.file, n + 256);
  EXPECT_NE(error_of(good, n + 255).find("do not make the model's vocabulary"), std::string::npos);
  EXPECT_EQ(error_of(good, n + 256), "no error");
  std::string dos;
  for (char c : good) dos += c == '\n' ? std::string("\r\n") : std::string(1, c);
  EXPECT_EQ(error_of(dos, n + 256), "no error");
}

TEST(Tiktoken, RandomDamageToTheFileNeverCrashes) {
  const std::string good = tiktoken_file(train_vocabulary(10));
  int refused = 0;
  for (uint64_t seed = 0; seed < 400; ++seed) {
    Random random(seed, 2);
    std::string file = good;
    if (seed % 2 == 0) file.resize(static_cast<size_t>(random.next_int(0, std::ssize(good))));
    for (int i = 0; i < 3 && !file.empty(); ++i)
      file[static_cast<size_t>(random.next_int(0, std::ssize(file) - 1))] =
          static_cast<char>(random.next_u32());
    refused += error_of(file, 266 + 256) != "no error";
  }
  EXPECT_GT(refused, 350);
}

}  // namespace
}  // namespace perigee::policy
