// Text to token ids and back. Text is bytes: whatever it holds, decode(encode(text)) == text.
//
// Special tokens mark structure (turns, tool calls). Text becomes special tokens only where the caller says
// so (allow_special); by default "<|im_end|>" in a text is the ten bytes it is written with, so text cannot
// forge structure.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "policy/model/config.h"

namespace perigee::policy {

// The special tokens of the Kimi release, by name.
namespace special {
inline constexpr std::string_view kBos = "[BOS]", kEos = "[EOS]", kPad = "[PAD]", kUnk = "[UNK]",
                                  kEot = "[EOT]";
inline constexpr std::string_view kImEnd = "<|im_end|>", kImUser = "<|im_user|>",
                                  kImAssistant = "<|im_assistant|>", kImSystem = "<|im_system|>",
                                  kImMiddle = "<|im_middle|>";
inline constexpr std::string_view kStartHeader = "<|start_header_id|>", kEndHeader = "<|end_header_id|>";
inline constexpr std::string_view kToolSectionBegin = "<|tool_calls_section_begin|>",
                                  kToolSectionEnd = "<|tool_calls_section_end|>",
                                  kToolCallBegin = "<|tool_call_begin|>",
                                  kToolArgumentBegin = "<|tool_call_argument_begin|>",
                                  kToolCallEnd = "<|tool_call_end|>";
}  // namespace special

// Const after construction: any thread may use it. Ids are 0 .. vocab_size()-1: plain tokens, then special
// ones, of which some are named and the others reserved ("<|reserved_token_ID|>").
class Tokenizer {
 public:
  virtual ~Tokenizer() = default;

  // With allow_special, the names of special tokens in the text become those tokens, the longest where two
  // fit.
  std::vector<int32_t> encode(std::string_view text, bool allow_special = false) const;
  // Appends the text's plain tokens.
  virtual void append_plain(std::string_view text, std::vector<int32_t>& out) const = 0;

  // The bytes of the ids; a special token gives its name, or nothing with skip_special.
  // REQUIRES ids in range.
  std::string decode(std::span<const int32_t> ids, bool skip_special = false) const;
  // The bytes of one id, or its name. REQUIRES id in range.
  virtual std::string token(int32_t id) const = 0;

  int64_t vocab_size() const { return vocab_size_; }
  bool in_range(int64_t id) const { return id >= 0 && id < vocab_size_; }
  bool is_special(int32_t id) const { return id >= first_special_ && id < vocab_size_; }
  std::optional<int32_t> find_special(std::string_view name) const;
  // REQUIRES one of the names above.
  int32_t special(std::string_view name) const;
  const std::map<std::string, int32_t, std::less<>>& specials() const { return specials_; }  // the named ones

 protected:
  // specials: name -> id, all of them at first_special or after, and below vocab_size.
  Tokenizer(int64_t vocab_size, int32_t first_special, std::map<std::string, int32_t, std::less<>> specials);
  std::string special_name(int32_t id) const;

 private:
  int64_t vocab_size_;
  int32_t first_special_;
  std::map<std::string, int32_t, std::less<>> specials_;
  std::map<int32_t, std::string> names_;
};

// Token b is the byte b. From 256, in this order and for ever:
//   256 [BOS]  257 [EOS]  258 [PAD]  259 [UNK]  260 [EOT]
//   261 <|im_end|>  262 <|im_user|>  263 <|im_assistant|>  264 <|im_system|>  265 <|im_middle|>
//   266 <|start_header_id|>  267 <|end_header_id|>
//   268 <|tool_calls_section_begin|>  269 <|tool_calls_section_end|>
//   270 <|tool_call_begin|>  271 <|tool_call_argument_begin|>  272 <|tool_call_end|>
// The rest of the vocabulary is reserved.
class ByteTokenizer : public Tokenizer {
 public:
  static constexpr int64_t kMinVocab = 273;
  // REQUIRES vocab_size >= kMinVocab.
  explicit ByteTokenizer(int64_t vocab_size = kMinVocab);
  void append_plain(std::string_view text, std::vector<int32_t>& out) const override;
  std::string token(int32_t id) const override;
};

// The tokenizer of a model directory: tiktoken.model when it is there; otherwise bytes, for a vocabulary of
// 273 to 1023.
// ERRORS (input): what is missing, or that the configuration's bos, eos or pad is no special token.
std::unique_ptr<Tokenizer> load_tokenizer(const std::string& directory, const ModelConfig& config);

}  // namespace perigee::policy
