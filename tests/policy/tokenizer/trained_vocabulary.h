// A vocabulary for tests: 256 bytes, then merges trained on a text that has letters of several scripts,
// digits, code and spaces; and the file it would be stored in.
#pragma once
#include <algorithm>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace perigee::policy {

inline std::string base64(std::string_view bytes) {
  static const char* digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string out;
  for (size_t i = 0; i < bytes.size(); i += 3) {
    unsigned v = 0;
    for (size_t j = 0; j < 3; ++j)
      v = v << 8 | (i + j < bytes.size() ? static_cast<unsigned char>(bytes[i + j]) : 0u);
    for (size_t j = 0; j < 4; ++j) out += i + j <= bytes.size() ? digits[v >> (18 - 6 * j) & 63] : '=';
  }
  return out;
}

inline const std::string& training_text() {
  static const std::string text =
      "The quick brown fox jumps over the lazy dog. The dog doesn't mind; it's lazy, they'll say, and WE'RE "
      "sure.\n"
      "for (int i = 0; i < 1000; ++i) { sum += values[i] * 3.14159; }\n\n\n    return sum;\n"
      "Die Straße ist naß, über den Fluß führt eine Brücke. Été à la plage, garçon.\n"
      "\xE4\xBD\xA0\xE5\xA5\xBD\xEF\xBC\x8C\xE4\xB8\x96\xE7\x95\x8C\xE3\x80\x82 "
      "\xD0\x9F\xD1\x80\xD0\xB8\xD0\xB2\xD0\xB5\xD1\x82 "
      "\xD0\xBC\xD0\xB8\xD1\x80 12345 67 8 aaaaaaaa aaaa aaaaaaaaaaaaaaaa ababababab "
      "\xF0\x9F\x98\x80\xF0\x9F\x98\x80!?!? ... \t\t x\r\n\r\n";
  return text;
}

// Merges of the most frequent pair, ties to the smallest bytes: 256 + merges tokens (fewer if the text runs
// out).
inline std::vector<std::string> train_vocabulary(int merges) {
  std::vector<std::string> vocabulary;
  for (int b = 0; b < 256; ++b) vocabulary.emplace_back(1, static_cast<char>(b));
  std::vector<std::string> parts;
  for (char c : training_text()) parts.emplace_back(1, c);
  for (int m = 0; m < merges; ++m) {
    std::map<std::string, int> counts;
    for (size_t i = 0; i + 1 < parts.size(); ++i)
      if (parts[i].size() + parts[i + 1].size() <= 12) ++counts[parts[i] + parts[i + 1]];
    std::string best;
    int most = 1;
    for (const auto& [pair, count] : counts)
      if (count > most && std::find(vocabulary.begin(), vocabulary.end(), pair) == vocabulary.end()) {
        best = pair;
        most = count;
      }
    if (best.empty()) break;
    vocabulary.push_back(best);
    std::vector<std::string> merged;
    for (size_t i = 0; i < parts.size(); ++i)
      if (i + 1 < parts.size() && parts[i] + parts[i + 1] == best) {
        merged.push_back(best);
        ++i;
      } else {
        merged.push_back(parts[i]);
      }
    parts = merged;
  }
  return vocabulary;
}

inline std::string tiktoken_file(const std::vector<std::string>& vocabulary) {
  std::string out;
  for (size_t r = 0; r < vocabulary.size(); ++r)
    out += base64(vocabulary[r]) + " " + std::to_string(r) + "\n";
  return out;
}

}  // namespace perigee::policy
