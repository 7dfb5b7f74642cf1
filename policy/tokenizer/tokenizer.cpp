#include "policy/tokenizer/tokenizer.h"

#include "base/error.h"
#include "base/file.h"
#include "policy/tokenizer/tiktoken.h"

namespace perigee::policy {
namespace {

constexpr int64_t kLargestByteVocab = 1023;

std::map<std::string, int32_t, std::less<>> byte_specials() {
  using namespace special;
  const std::string_view order[] = {kBos,
                                    kEos,
                                    kPad,
                                    kUnk,
                                    kEot,
                                    kImEnd,
                                    kImUser,
                                    kImAssistant,
                                    kImSystem,
                                    kImMiddle,
                                    kStartHeader,
                                    kEndHeader,
                                    kToolSectionBegin,
                                    kToolSectionEnd,
                                    kToolCallBegin,
                                    kToolArgumentBegin,
                                    kToolCallEnd};
  static_assert(256 + std::size(order) == ByteTokenizer::kMinVocab);
  std::map<std::string, int32_t, std::less<>> out;
  int32_t id = 256;
  for (std::string_view name : order) out.emplace(name, id++);
  return out;
}

}  // namespace

Tokenizer::Tokenizer(int64_t vocab_size, int32_t first_special,
                     std::map<std::string, int32_t, std::less<>> specials)
    : vocab_size_(vocab_size), first_special_(first_special), specials_(std::move(specials)) {
  for (const auto& [name, id] : specials_) {
    PERIGEE_CHECK(is_special(id), "{} = {} of {}", name, id, vocab_size);
    names_.emplace(id, name);
  }
}

std::vector<int32_t> Tokenizer::encode(std::string_view text, bool allow_special) const {
  std::vector<int32_t> out;
  size_t plain = 0;
  for (size_t at = 0; allow_special && at < text.size();) {
    if (text[at] != '<' && text[at] != '[') {
      ++at;
      continue;
    }
    std::string_view best;
    int32_t best_id = 0;
    for (const auto& [name, id] : specials_)
      if (name.size() > best.size() && text.substr(at).starts_with(name)) {
        best = name;
        best_id = id;
      }
    if (best.empty()) {
      ++at;
      continue;
    }
    append_plain(text.substr(plain, at - plain), out);
    out.push_back(best_id);
    at += best.size();
    plain = at;
  }
  append_plain(text.substr(plain), out);
  return out;
}

std::string Tokenizer::decode(std::span<const int32_t> ids, bool skip_special) const {
  std::string out;
  for (int32_t id : ids)
    if (!skip_special || !is_special(id)) out += token(id);
  return out;
}

std::optional<int32_t> Tokenizer::find_special(std::string_view name) const {
  const auto it = specials_.find(name);
  return it == specials_.end() ? std::nullopt : std::optional(it->second);
}

int32_t Tokenizer::special(std::string_view name) const {
  const auto id = find_special(name);
  PERIGEE_CHECK(id.has_value(), "no special token {}", name);
  return *id;
}

std::string Tokenizer::special_name(int32_t id) const {
  const auto it = names_.find(id);
  return it == names_.end() ? fmt::format("<|reserved_token_{}|>", id) : it->second;
}

ByteTokenizer::ByteTokenizer(int64_t vocab_size) : Tokenizer(vocab_size, 256, byte_specials()) {}

void ByteTokenizer::append_plain(std::string_view text, std::vector<int32_t>& out) const {
  out.reserve(out.size() + text.size());
  for (char c : text) out.push_back(static_cast<unsigned char>(c));
}

std::string ByteTokenizer::token(int32_t id) const {
  PERIGEE_CHECK(in_range(id), "token {} of {}", id, vocab_size());
  return is_special(id) ? special_name(id) : std::string(1, static_cast<char>(id));
}

std::unique_ptr<Tokenizer> load_tokenizer(const std::string& directory, const ModelConfig& config) {
  const std::string model = directory + "/tiktoken.model";
  std::unique_ptr<Tokenizer> out;
  if (file_exists(model)) {
    out = std::make_unique<TiktokenTokenizer>(model, config.vocab_size);
  } else if (config.vocab_size >= ByteTokenizer::kMinVocab && config.vocab_size <= kLargestByteVocab) {
    out = std::make_unique<ByteTokenizer>(config.vocab_size);
  } else if (config.vocab_size < ByteTokenizer::kMinVocab) {
    throw_input("{}: vocab_size {} is too small for the byte-level tokenizer, which needs {}", directory,
                config.vocab_size, ByteTokenizer::kMinVocab);
  } else {
    throw_input("{}: tiktoken.model is missing: a vocabulary of {} needs the release's tokenizer file ({})",
                directory, config.vocab_size,
                file_exists(directory + "/tokenizer.json") ? "tokenizer.json is not read"
                                                           : "copy it beside config.json");
  }
  const std::pair<const char*, int32_t> ids[] = {
      {"bos_token_id", config.bos_id}, {"eos_token_id", config.eos_id}, {"pad_token_id", config.pad_id}};
  for (const auto& [key, id] : ids)
    if (!out->is_special(id))
      throw_input("{}: {} {} is not a special token of the {} tokenizer", directory, key, id,
                  file_exists(model) ? "tiktoken.model" : "byte-level");
  return out;
}

}  // namespace perigee::policy
