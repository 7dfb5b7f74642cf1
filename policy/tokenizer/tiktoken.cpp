#include "policy/tokenizer/tiktoken.h"

#include <unicode/regex.h>
#include <unicode/unistr.h>

#include <algorithm>
#include <charconv>
#include <queue>

#include "base/error.h"
#include "base/file.h"
#include "base/text.h"

namespace perigee::policy {
namespace {

constexpr int64_t kSpecials = 256;
constexpr int64_t kMaxTokens = 1 << 24;
constexpr size_t kMaxTextBytes = size_t{1} << 30;  // UTF-16 offsets are 32-bit

// The release's alternatives, in order. Its \s is the Unicode property White_Space (the engine it was written
// for); ICU's \s lacks U+000B and U+0085, so the property is written out.
constexpr const char* kPattern =
    R"([\p{Han}]+)"
    R"(|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?)"
    R"(|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?)"
    R"(|\p{N}{1,3})"
    R"(| ?[^\p{White_Space}\p{L}\p{N}]+[\r\n]*)"
    R"(|\p{White_Space}*[\r\n]+)"
    R"(|\p{White_Space}+(?!\P{White_Space}))"
    R"(|\p{White_Space}+)";

// Special tokens of the release by their distance from the first one (163584).
std::map<std::string, int32_t, std::less<>> release_specials(int32_t first) {
  using namespace special;
  const std::pair<std::string_view, int32_t> table[] = {{kBos, 0},
                                                        {kEos, 1},
                                                        {kImEnd, 2},
                                                        {kImUser, 3},
                                                        {kImAssistant, 4},
                                                        {kStartHeader, 6},
                                                        {kEndHeader, 7},
                                                        {kEot, 9},
                                                        {kImSystem, 10},
                                                        {kToolSectionBegin, 11},
                                                        {kToolSectionEnd, 12},
                                                        {kToolCallBegin, 13},
                                                        {kToolArgumentBegin, 14},
                                                        {kToolCallEnd, 15},
                                                        {kImMiddle, 17},
                                                        {kUnk, 254},
                                                        {kPad, 255}};
  std::map<std::string, int32_t, std::less<>> out;
  for (const auto& [name, offset] : table) out.emplace(name, first + offset);
  return out;
}

int base64_digit(char c) {
  if (c >= 'A' && c <= 'Z') return c - 'A';
  if (c >= 'a' && c <= 'z') return c - 'a' + 26;
  if (c >= '0' && c <= '9') return c - '0' + 52;
  return c == '+' ? 62 : c == '/' ? 63 : -1;
}

// Standard base64 with padding; false when text is anything else, or has bits after its last byte.
bool decode_base64(std::string_view text, std::string& out) {
  if (text.empty() || text.size() % 4 != 0) return false;
  const size_t padding = text.ends_with("==") ? 2 : text.ends_with('=') ? 1 : 0;
  uint32_t bits = 0;
  int have = 0;
  for (char c : text.substr(0, text.size() - padding)) {
    const int d = base64_digit(c);
    if (d < 0) return false;
    bits = (bits << 6) | static_cast<uint32_t>(d);
    have += 6;
    if (have >= 8) {
      have -= 8;
      out += static_cast<char>(bits >> have);
      bits &= (1u << have) - 1;
    }
  }
  return bits == 0;
}

}  // namespace

struct TiktokenTokenizer::Ranks {
  std::vector<std::string> tokens;  // by rank
  std::unordered_map<std::string_view, int32_t> index;
  size_t longest = 0;

  static std::unique_ptr<Ranks> parse(std::string_view bytes, std::string_view where);
};

std::unique_ptr<TiktokenTokenizer::Ranks> TiktokenTokenizer::Ranks::parse(std::string_view bytes,
                                                                          std::string_view where) {
  std::vector<std::pair<std::string, int64_t>> lines;  // token, rank
  int64_t line_number = 0;
  const auto fail = [&](std::string_view what) {
    throw_input("{}:{}: {}; this is not the tiktoken.model of the release, or it is damaged", where,
                line_number, what);
  };
  for (size_t at = 0; at < bytes.size();) {
    const size_t end = std::min(bytes.find('\n', at), bytes.size());
    std::string_view line = bytes.substr(at, end - at);
    at = end + 1;
    ++line_number;
    if (line.ends_with('\r')) line.remove_suffix(1);
    if (line.empty()) continue;
    const size_t space = line.find(' ');
    if (space == std::string_view::npos) fail(fmt::format("{} is not \"BASE64 RANK\"", quote(line)));
    std::string token;
    if (!decode_base64(line.substr(0, space), token))
      fail(fmt::format("{} is not base64", quote(line.substr(0, space))));
    const std::string_view digits = line.substr(space + 1);
    int64_t rank = -1;
    const auto [stop, error] = std::from_chars(digits.data(), digits.data() + digits.size(), rank);
    if (error != std::errc() || stop != digits.data() + digits.size() || rank < 0 || rank >= kMaxTokens)
      fail(fmt::format("{} is not a rank", quote(digits)));
    lines.emplace_back(std::move(token), rank);
  }
  if (lines.empty()) throw_input("{}: no tokens: the file is empty", where);

  auto out = std::make_unique<Ranks>();
  out->tokens.resize(lines.size());
  std::vector<int64_t> line_of(lines.size(), 0);
  line_number = 0;
  for (auto& [token, rank] : lines) {
    ++line_number;
    if (rank >= std::ssize(lines))
      fail(fmt::format("rank {} in a file of {} tokens: ranks must run from 0 without a gap", rank,
                       lines.size()));
    const size_t r = static_cast<size_t>(rank);
    if (line_of[r] != 0) fail(fmt::format("rank {} stands on token {}, too", rank, line_of[r]));
    line_of[r] = line_number;
    out->tokens[r] = std::move(token);
  }
  for (size_t r = 0; r < out->tokens.size(); ++r) {
    const std::string& token = out->tokens[r];
    line_number = line_of[r];
    if (!out->index.emplace(token, static_cast<int32_t>(r)).second)
      fail(fmt::format("token {} stands twice", quote(token)));
    out->longest = std::max(out->longest, token.size());
  }
  for (int b = 0; b < 256; ++b)
    if (!out->index.contains(std::string(1, static_cast<char>(b))))
      throw_input(
          "{}: no token for the byte 0x{:02x}: text with it could not be encoded; the file is damaged", where,
          b);
  return out;
}

struct TiktokenTokenizer::Pattern {
  std::unique_ptr<icu::RegexPattern> regex;
  Pattern() {
    UErrorCode status = U_ZERO_ERROR;
    UParseError at{};
    regex.reset(icu::RegexPattern::compile(icu::UnicodeString::fromUTF8(kPattern), 0, at, status));
    if (U_FAILURE(status))
      throw_environment("ICU {} cannot compile the tokenizer's pattern: {} at {}; install a newer libicu",
                        U_ICU_VERSION, u_errorName(status), at.offset);
  }
};

TiktokenTokenizer::TiktokenTokenizer(const std::string& path, int64_t vocab_size)
    : TiktokenTokenizer(std::string_view(read_file(path, uint64_t{1} << 30)), path, vocab_size) {}

TiktokenTokenizer::TiktokenTokenizer(std::string_view bytes, std::string_view where, int64_t vocab_size)
    : TiktokenTokenizer(Ranks::parse(bytes, where), where, vocab_size) {}

TiktokenTokenizer::TiktokenTokenizer(std::unique_ptr<Ranks> ranks, std::string_view where, int64_t vocab_size)
    : Tokenizer(std::ssize(ranks->tokens) + kSpecials, static_cast<int32_t>(ranks->tokens.size()),
                release_specials(static_cast<int32_t>(ranks->tokens.size()))),
      ranks_(std::move(ranks)),
      pattern_(std::make_unique<Pattern>()) {
  if (this->vocab_size() != vocab_size)
    throw_input(
        "{}: {} tokens and {} special ones do not make the model's vocabulary of {}; the file belongs to "
        "another model or is cut short",
        where, this->vocab_size() - kSpecials, kSpecials, vocab_size);
}

TiktokenTokenizer::~TiktokenTokenizer() = default;

std::string TiktokenTokenizer::token(int32_t id) const {
  PERIGEE_CHECK(in_range(id), "token {} of {}", id, vocab_size());
  return is_special(id) ? special_name(id) : ranks_->tokens[static_cast<size_t>(id)];
}

int32_t TiktokenTokenizer::rank_of(std::string_view bytes) const {
  if (bytes.size() > ranks_->longest) return -1;
  const auto it = ranks_->index.find(bytes);
  return it == ranks_->index.end() ? -1 : it->second;
}

void TiktokenTokenizer::append_plain(std::string_view text, std::vector<int32_t>& out) const {
  for (std::string_view piece : split(text)) merge(piece, out);
}

std::vector<std::string_view> TiktokenTokenizer::split(std::string_view text) const {
  std::vector<std::string_view> out;
  for (size_t at = 0; at < text.size();) {
    size_t end = at;
    for (size_t n; (n = utf8_sequence_bytes(text.substr(end))) > 0;) end += n;
    if (end > at) split_utf8(text.substr(at, end - at), out);
    at = end;
    while (end < text.size() && utf8_sequence_bytes(text.substr(end)) == 0) ++end;
    if (end > at) out.push_back(text.substr(at, end - at));
    at = end;
  }
  return out;
}

void TiktokenTokenizer::split_utf8(std::string_view text, std::vector<std::string_view>& out) const {
  if (text.size() > kMaxTextBytes)
    throw_input("a text of {} is too long to tokenize at once", human_bytes(text.size()));
  const icu::UnicodeString wide =
      icu::UnicodeString::fromUTF8(icu::StringPiece(text.data(), static_cast<int32_t>(text.size())));
  UErrorCode status = U_ZERO_ERROR;
  const std::unique_ptr<icu::RegexMatcher> matcher(pattern_->regex->matcher(wide, status));
  if (U_SUCCESS(status)) matcher->setStackLimit(0, status);
  // Matches follow one another; byte offsets are counted along. A unit below 0x800 has 1 or 2 bytes, a
  // surrogate half of the 4 of its pair.
  int32_t unit = 0;
  size_t at = 0;
  const auto take = [&](int32_t end) {
    const size_t begin = at;
    for (; unit < end; ++unit) {
      const char16_t c = wide.charAt(unit);
      at += c < 0x80 ? 1 : c < 0x800 || (c >= 0xD800 && c <= 0xDFFF) ? 2 : 3;
    }
    if (at > begin) out.push_back(text.substr(begin, at - begin));
  };
  while (U_SUCCESS(status) && matcher->find(status)) {
    take(matcher->start(status));  // the alternatives cover every character; were one missed, it is a piece
    take(matcher->end(status));
  }
  if (U_FAILURE(status)) throw_environment("the tokenizer's pattern failed: {}", u_errorName(status));
  take(wide.length());
}

void TiktokenTokenizer::merge(std::string_view piece, std::vector<int32_t>& out) const {
  if (piece.empty()) return;
  if (const int32_t whole = rank_of(piece); whole >= 0) {
    out.push_back(whole);
    return;
  }
  PERIGEE_CHECK(piece.size() < kMaxTextBytes, "a piece of {} bytes", piece.size());
  // Parts are named by their first byte; next[b] is the first byte of the part after, alive while b begins a
  // part.
  const uint32_t n = static_cast<uint32_t>(piece.size());
  std::vector<uint32_t> next(n + 1), previous(n + 1);
  std::vector<bool> alive(n + 1, true);
  for (uint32_t b = 0; b <= n; ++b) {
    next[b] = b + 1;
    previous[b] = b - 1;
  }
  // A pair of neighbours [begin, end) by rank, then from the left. It is stale when begin is no longer a part
  // or its neighbour has grown; end tells.
  struct Pair {
    int32_t rank;
    uint32_t begin, end;
    bool operator>(const Pair& o) const { return std::pair(rank, begin) > std::pair(o.rank, o.begin); }
  };
  std::priority_queue<Pair, std::vector<Pair>, std::greater<>> pairs;
  const auto consider = [&](uint32_t begin) {
    const uint32_t middle = next[begin];
    if (middle >= n) return;
    const uint32_t end = next[middle];
    const int32_t rank = rank_of(piece.substr(begin, end - begin));
    if (rank >= 0) pairs.push({rank, begin, end});
  };
  for (uint32_t b = 0; b + 1 < n; ++b) consider(b);
  while (!pairs.empty()) {
    const Pair p = pairs.top();
    pairs.pop();
    if (!alive[p.begin]) continue;
    const uint32_t middle = next[p.begin];
    if (middle >= n || next[middle] != p.end) continue;
    alive[middle] = false;
    next[p.begin] = p.end;
    if (p.end < n) previous[p.end] = p.begin;
    consider(p.begin);
    if (p.begin > 0) consider(previous[p.begin]);
  }
  for (uint32_t b = 0; b < n; b = next[b]) {
    const int32_t rank = rank_of(piece.substr(b, next[b] - b));
    PERIGEE_CHECK(rank >= 0, "part [{}, {}) of a piece is no token", b, next[b]);
    out.push_back(rank);
  }
}

}  // namespace perigee::policy
