#include "policy/tokenizer/tokenizer.h"

#include <gtest/gtest.h>

#include "base/error.h"
#include "base/file.h"
#include "base/random.h"
#include "tests/base/temp_directory.h"
#include "tests/policy/tokenizer/trained_vocabulary.h"

namespace perigee::policy {
namespace {

TEST(ByteTokenizer, AnyBytesComeBack) {
  const ByteTokenizer t;
  for (uint64_t seed = 0; seed < 500; ++seed) {
    Random random(seed);
    std::string text;
    for (int64_t n = random.next_int(0, 100); n > 0; --n) text += static_cast<char>(random.next_u32());
    const auto ids = t.encode(text);
    ASSERT_EQ(ids.size(), text.size());
    ASSERT_EQ(t.decode(ids), text) << "seed " << seed;
  }
}

// The order is part of every checkpoint trained with it.
TEST(ByteTokenizer, SpecialTokensKeepTheirIds) {
  const ByteTokenizer t(320);
  const char* names[] = {"[BOS]",
                         "[EOS]",
                         "[PAD]",
                         "[UNK]",
                         "[EOT]",
                         "<|im_end|>",
                         "<|im_user|>",
                         "<|im_assistant|>",
                         "<|im_system|>",
                         "<|im_middle|>",
                         "<|start_header_id|>",
                         "<|end_header_id|>",
                         "<|tool_calls_section_begin|>",
                         "<|tool_calls_section_end|>",
                         "<|tool_call_begin|>",
                         "<|tool_call_argument_begin|>",
                         "<|tool_call_end|>"};
  int32_t id = 256;
  for (const char* name : names) {
    EXPECT_EQ(t.special(name), id);
    EXPECT_EQ(t.token(id), name);
    EXPECT_TRUE(t.is_special(id));
    ++id;
  }
  EXPECT_FALSE(t.is_special(255));
  EXPECT_TRUE(t.is_special(319)) << "the rest is reserved";
  EXPECT_EQ(t.token(319), "<|reserved_token_319|>");
  EXPECT_EQ(t.vocab_size(), 320);
  EXPECT_FALSE(t.in_range(320));
  EXPECT_FALSE(t.in_range(-1));
  EXPECT_THROW(t.token(320), std::logic_error);
  EXPECT_EQ(t.find_special("<|nothing|>"), std::nullopt);
  EXPECT_THROW(t.special("<|nothing|>"), std::logic_error);
}

TEST(Tokenizer, TextBecomesSpecialOnlyWhenAllowed) {
  const ByteTokenizer t;
  const std::string text = "a<|im_end|>[EOS]<|im_en";
  EXPECT_EQ(t.encode(text).size(), text.size());
  const auto ids = t.encode(text, true);
  EXPECT_EQ(ids.size(), 1 + 2 + std::string("<|im_en").size());
  EXPECT_EQ(ids[1], t.special("<|im_end|>"));
  EXPECT_EQ(ids[2], t.special("[EOS]"));
  EXPECT_EQ(t.decode(ids), text);
  EXPECT_EQ(t.decode(ids, true), "a<|im_en");
}

std::string load_error(const std::string& directory, int64_t vocab, int32_t bos) {
  ModelConfig c;
  c.vocab_size = vocab;
  c.bos_id = c.eos_id = c.pad_id = bos;
  try {
    load_tokenizer(directory, c);
  } catch (const Error& e) {
    return e.what();
  }
  return "no error";
}

TEST(Tokenizer, TheDirectoryDecidesWhichIsLoaded) {
  const TempDirectory dir;
  EXPECT_EQ(load_error(dir.path(), 300, 256), "no error");
  EXPECT_EQ(load_error(dir.path(), 273, 272), "no error");
  EXPECT_NE(load_error(dir.path(), 272, 256).find("too small for the byte-level tokenizer"),
            std::string::npos);
  EXPECT_NE(load_error(dir.path(), 163840, 163584).find("tiktoken.model is missing"), std::string::npos);
  EXPECT_NE(load_error(dir.path(), 300, 1).find("bos_token_id 1 is not a special token of the byte-level"),
            std::string::npos);
  const auto vocabulary = train_vocabulary(20);
  write_file_atomic(dir / "tiktoken.model", tiktoken_file(vocabulary));
  const auto n = std::ssize(vocabulary);
  EXPECT_EQ(load_error(dir.path(), n + 256, static_cast<int32_t>(n)), "no error");
  EXPECT_NE(load_error(dir.path(), 300, 256).find("do not make the model's vocabulary of 300"),
            std::string::npos);
}

}  // namespace
}  // namespace perigee::policy
