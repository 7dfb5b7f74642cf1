#include "agents/tools/sql_functions.h"

#include <sqlite3.h>
#include <string.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_set>

namespace perigee::agents {
namespace {

bool is_null(sqlite3_value* v) {
  return sqlite3_value_type(v) == SQLITE_NULL;
}
std::string_view blob_of(sqlite3_value* v) {
  const auto* bytes = static_cast<const char*>(sqlite3_value_blob(v));
  return {bytes == nullptr ? "" : bytes, static_cast<size_t>(sqlite3_value_bytes(v))};
}
std::string_view text_of(sqlite3_value* v) {
  const auto* bytes = reinterpret_cast<const char*>(sqlite3_value_text(v));
  return {bytes == nullptr ? "" : bytes, static_cast<size_t>(sqlite3_value_bytes(v))};
}
bool continues(char c) {
  return (static_cast<unsigned char>(c) & 0xC0) == 0x80;
}

// memmem takes linear time, whatever the texts.
size_t place_of(std::string_view text, std::string_view word, size_t from) {
  const void* at = memmem(text.data() + from, text.size() - from, word.data(), word.size());
  return at == nullptr ? std::string_view::npos
                       : static_cast<size_t>(static_cast<const char*>(at) - text.data());
}

void answer(sqlite3_context* context, std::string_view text) {
  sqlite3_result_text64(context, text.data(), text.size(), SQLITE_TRANSIENT, SQLITE_UTF8);
}

void instr(sqlite3_context* context, int, sqlite3_value** v) {
  if (is_null(v[0]) || is_null(v[1])) return;
  const bool blobs = sqlite3_value_type(v[0]) == SQLITE_BLOB && sqlite3_value_type(v[1]) == SQLITE_BLOB;
  const std::string_view text = blobs ? blob_of(v[0]) : text_of(v[0]);
  const std::string_view word = blobs ? blob_of(v[1]) : text_of(v[1]);
  size_t at = 0;
  if (!word.empty()) {
    // In a text a match begins where a character does.
    if (!blobs && continues(word[0]))
      at = text.starts_with(word) ? 0 : std::string_view::npos;
    else
      at = place_of(text, word, 0);
  }
  if (at == std::string_view::npos) return sqlite3_result_int64(context, 0);
  if (!blobs && at > 0)
    at -= static_cast<size_t>(
        std::count_if(text.begin() + 1, text.begin() + static_cast<std::ptrdiff_t>(at) + 1, continues));
  sqlite3_result_int64(context, static_cast<sqlite3_int64>(at) + 1);
}

void replace(sqlite3_context* context, int, sqlite3_value** v) {
  if (is_null(v[0]) || is_null(v[1])) return;
  const std::string_view text = text_of(v[0]), word = text_of(v[1]);
  if (word.empty() || word[0] == '\0') return sqlite3_result_value(context, v[0]);
  if (is_null(v[2])) return;
  const std::string_view with = text_of(v[2]);
  const auto most =
      static_cast<size_t>(sqlite3_limit(sqlite3_context_db_handle(context), SQLITE_LIMIT_LENGTH, -1));
  std::string out;
  for (size_t begin = 0;;) {
    const size_t at = place_of(text, word, begin);
    out += text.substr(begin, at == std::string_view::npos ? at : at - begin);
    if (at == std::string_view::npos) break;
    out += with;
    if (out.size() > most) return sqlite3_result_error_toobig(context);
    begin = at + word.size();
  }
  answer(context, out);
}

// The characters of a text: a byte of C0 or more with what continues it, or one byte.
class Characters {
 public:
  explicit Characters(std::string_view text) {
    for (size_t i = 0; i < text.size();) {
      size_t n = 1;
      if (static_cast<unsigned char>(text[i]) >= 0xC0)
        while (i + n < text.size() && continues(text[i + n])) ++n;
      if (n <= kMost) set_.insert(key(text.substr(i, n)));
      i += n;
    }
  }
  // Bytes of the one that text begins with or ends with; 0: it is none of them.
  size_t first(std::string_view text) const {
    for (size_t n = 1; n <= std::min(kMost, text.size()); ++n)
      if (set_.contains(key(text.substr(0, n)))) return n;
    return 0;
  }
  size_t last(std::string_view text) const {
    for (size_t n = 1; n <= std::min(kMost, text.size()); ++n)
      if (set_.contains(key(text.substr(text.size() - n)))) return n;
    return 0;
  }

 private:
  static constexpr size_t kMost = 4;
  static uint64_t key(std::string_view c) {
    uint64_t k = c.size();
    for (const char byte : c) k = k << 8 | static_cast<unsigned char>(byte);
    return k;
  }
  std::unordered_set<uint64_t> set_;
};

template <bool kLeft, bool kRight>
void trim(sqlite3_context* context, int count, sqlite3_value** v) {
  if (is_null(v[0]) || (count > 1 && is_null(v[1]))) return;
  std::string_view text = text_of(v[0]);
  const Characters characters(count > 1 ? text_of(v[1]) : std::string_view(" "));
  if (kLeft)
    for (size_t n; (n = characters.first(text)) > 0;) text.remove_prefix(n);
  if (kRight)
    for (size_t n; (n = characters.last(text)) > 0;) text.remove_suffix(n);
  answer(context, text);
}

}  // namespace

void use_linear_functions(sqlite3* db) {
  const auto add = [db](const char* name, int count, auto f) {
    sqlite3_create_function_v2(db, name, count, SQLITE_UTF8 | SQLITE_DETERMINISTIC | SQLITE_INNOCUOUS,
                               nullptr, f, nullptr, nullptr, nullptr);
  };
  add("instr", 2, &instr);
  add("replace", 3, &replace);
  for (const int count : {1, 2}) {
    add("trim", count, &trim<true, true>);
    add("ltrim", count, &trim<true, false>);
    add("rtrim", count, &trim<false, true>);
  }
}

}  // namespace perigee::agents
