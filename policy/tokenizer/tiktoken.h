// The tokenizer of the release: tiktoken.model, a line "BASE64 RANK" per token, then 256 special tokens.
//
// Text is cut into pieces by a pattern (tiktoken.cpp), and each piece is merged by rank: of all neighbouring
// pairs whose concatenation is a token, the one of the lowest rank, leftmost first, until none is left; a
// piece that is itself a token is that token. Time is O(n log n) in the length of a piece.
//
// Bytes that are not UTF-8 cannot be matched by the pattern: the text is cut around each run of them, the
// well-formed stretches are split as if each stood alone, and the run is merged as a piece of its own.
#pragma once
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "policy/tokenizer/tokenizer.h"

namespace perigee::policy {

class TiktokenTokenizer : public Tokenizer {
 public:
  // vocab_size: of the model's configuration; must be the file's tokens + 256.
  // ERRORS (input), "PATH:LINE: what": not base64, not a rank, a token or rank twice, ranks with gaps, a
  // missing single byte, a file of another vocabulary.
  TiktokenTokenizer(const std::string& path, int64_t vocab_size);
  // bytes: the file's contents; where: its name in messages.
  TiktokenTokenizer(std::string_view bytes, std::string_view where, int64_t vocab_size);
  ~TiktokenTokenizer() override;

  void append_plain(std::string_view text, std::vector<int32_t>& out) const override;
  std::string token(int32_t id) const override;

  // The pieces that text is cut into; together they are the text.
  std::vector<std::string_view> split(std::string_view text) const;
  // The tokens of one piece.
  void merge(std::string_view piece, std::vector<int32_t>& out) const;

 private:
  struct Ranks;
  struct Pattern;
  TiktokenTokenizer(std::unique_ptr<Ranks> ranks, std::string_view where, int64_t vocab_size);
  void split_utf8(std::string_view text, std::vector<std::string_view>& out) const;
  int32_t rank_of(std::string_view bytes) const;  // -1 when it is no token

  std::unique_ptr<const Ranks> ranks_;
  std::unique_ptr<const Pattern> pattern_;
};

}  // namespace perigee::policy
