// Verifiers of long contexts: what of the expected strings a response holds, and how like a text it is.
#include <algorithm>
#include <stdexcept>

#include "base/error.h"
#include "base/text.h"
#include "reward/section.h"
#include "reward/verifiers.h"

namespace perigee::reward {
namespace {

char lower(char c) {
  return c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
}
std::string lowered(std::string_view text) {
  std::string out(text);
  std::transform(out.begin(), out.end(), out.begin(), lower);
  return out;
}
bool is_digit(char c) {
  return c >= '0' && c <= '9';
}
bool is_word(char c) {
  return is_digit(c) || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '-' || c == '_';
}
// UTF-8 of U+00C0 to U+04FF: Latin with accents, Greek, Cyrillic. Not the signs of times and division. Beyond
// are quotation marks, and scripts without blanks between words.
bool is_letter(char first, char second) {
  const auto a = static_cast<unsigned char>(first), b = static_cast<unsigned char>(second);
  return a >= 0xC3 && a <= 0xD3 && b >= 0x80 && b <= 0xBF && !(a == 0xC3 && (b == 0x97 || b == 0xB7));
}
bool is_point(std::string_view text, size_t at) {
  return text[at] == '.' && at > 0 && is_digit(text[at - 1]) && at + 1 < text.size() &&
         is_digit(text[at + 1]);
}
// Whether a part of a word or a number begins at this byte, or ends before it: an expected string is not
// found inside a longer one.
bool goes_on(std::string_view text, size_t at) {
  if (at >= text.size()) return false;
  return is_word(text[at]) || is_point(text, at) ||
         (at + 1 < text.size() && is_letter(text[at], text[at + 1]));
}
bool comes_from(std::string_view text, size_t at) {
  if (at == 0) return false;
  return is_word(text[at - 1]) || is_point(text, at - 1) || (at > 1 && is_letter(text[at - 2], text[at - 1]));
}

std::vector<std::string> pieces(std::string_view text) {
  std::vector<std::string> out;
  for (size_t at = 0; at <= text.size();) {
    const size_t end = std::min(text.find(',', at), text.size());
    const std::string_view piece = trim(text.substr(at, end - at));
    if (!piece.empty()) out.emplace_back(piece);
    at = end + 1;
  }
  return out;
}

class Recall : public Verifier {
 public:
  explicit Recall(JsonReader& options)
      : section_(options, true),
        ignore_case_(options.boolean("ignore_case", true)),
        strict_(options.boolean("strict", false)),
        spare_(options.integer("spare_words", -1, int64_t{1} << 32, kSpareWords)) {
    if (strict_ && options.has("spare_words")) options.fail("spare_words", "with strict there are none");
  }

  bool judges() const override { return true; }
  Verdict verify(const RewardInput& input, const GroupContext*, Budget& budget) const override {
    std::vector<std::string> expected = pieces(ignore_case_ ? lowered(input.answer) : input.answer);
    if (expected.empty()) throw std::runtime_error("the reference answer names no strings");
    std::sort(expected.begin(), expected.end());
    expected.erase(std::unique(expected.begin(), expected.end()), expected.end());
    Verdict verdict;
    const auto section = section_.find(input, verdict.detail);
    if (!section) return verdict;
    const std::string text = ignore_case_ ? lowered(*section) : std::string(*section);
    size_t found = 0, inner = 0;  // words that strings of several words have more
    for (const std::string& e : expected) {
      budget.spend(text.size());
      if (holds(text, e))
        ++found, inner += std::max<size_t>(1, words(e, {})) - 1;
      else if (verdict.detail.empty())
        verdict.detail = "missing " + quote(e);
    }
    budget.spend(text.size());
    const size_t of = std::max(expected.size(), claims(text, expected, inner));
    if (of > expected.size() && verdict.detail.empty()) verdict.detail = "names more than was asked for";
    verdict.value = static_cast<double>(found) / static_cast<double>(of);
    return verdict;
  }

 private:
  static bool holds(const std::string& text, const std::string& part) {
    for (size_t at = text.find(part); at != text.npos; at = text.find(part, at + 1)) {
      const size_t end = at + part.size();
      if (!comes_from(text, at) && !goes_on(text, end)) return true;
    }
    return false;
  }
  // Which words are counted.
  struct Kind {
    enum class Digits : uint8_t { kAny, kSome, kNone } digits = Digits::kAny;
    size_t least_bytes = 0;
  };
  static size_t words(const std::string& text, Kind kind) {
    size_t count = 0;
    for (size_t i = 0; i < text.size();) {
      if (!goes_on(text, i) || comes_from(text, i)) {
        ++i;
        continue;
      }
      const size_t begin = i;
      bool digits = false;
      do {
        digits |= is_digit(text[i]);
        ++i;
      } while (goes_on(text, i) || (i < text.size() && is_letter(text[i - 1], text[i])));
      if (kind.digits != Kind::Digits::kAny && digits != (kind.digits == Kind::Digits::kSome)) continue;
      count += i - begin >= kind.least_bytes;
    }
    return count;
  }

  // How many strings the text names that could be answers. Numbers among words are told apart from what is said around
  // them, so none is spare; of words some are, for a sentence.
  size_t claims(const std::string& text, const std::vector<std::string>& expected, size_t inner) const {
    if (!strict_ && spare_ < 0) return 0;
    const auto has_digit = [](const std::string& e) { return std::any_of(e.begin(), e.end(), is_digit); };
    Kind kind;
    size_t spare = inner;
    if (!strict_ && std::all_of(expected.begin(), expected.end(), has_digit)) {
      // Half as long: the numbers of a list are none.
      const auto shortest = std::min_element(expected.begin(), expected.end(),
                                             [](const auto& a, const auto& b) { return a.size() < b.size(); });
      kind = {Kind::Digits::kSome, shortest->size() / 2 + 1};
    } else if (!strict_) {
      spare += static_cast<size_t>(spare_) + expected.size();
      if (std::none_of(expected.begin(), expected.end(), has_digit)) kind.digits = Kind::Digits::kNone;
    }
    const size_t said = words(text, kind);
    return said - std::min(said, spare);
  }

  static constexpr int64_t kSpareWords = 16;
  Section section_;
  bool ignore_case_, strict_;
  int64_t spare_;
};

// Ratcliff and Obershelp: letters in the longest common block, then of what lies before it in both, and behind.
class Blocks {
 public:
  Blocks(std::string_view a, std::string_view b, Budget& budget)
      : a_(a), b_(b), budget_(budget), lengths_(b.size() + 1) {}

  size_t matched() {
    struct Part {
      size_t a, a_end, b, b_end;
    };
    std::vector<Part> open{{0, a_.size(), 0, b_.size()}};
    size_t sum = 0;
    while (!open.empty()) {
      const Part p = open.back();
      open.pop_back();
      const auto [at_a, at_b, size] = longest(p.a, p.a_end, p.b, p.b_end);
      if (size == 0) continue;
      sum += size;
      open.push_back({p.a, at_a, p.b, at_b});
      open.push_back({at_a + size, p.a_end, at_b + size, p.b_end});
    }
    return sum;
  }

 private:
  struct Block {
    size_t a, b, size;
  };
  // The first one in a, then the first in b, of the longest.
  Block longest(size_t a, size_t a_end, size_t b, size_t b_end) {
    Block best{a, b, 0};
    std::fill(lengths_.begin() + static_cast<int64_t>(b), lengths_.begin() + static_cast<int64_t>(b_end) + 1,
              0);
    for (size_t i = a; i < a_end; ++i) {
      budget_.spend(b_end - b);
      // lengths_[j + 1]: of the common block that ends with a[i - 1] and b[j].
      for (size_t j = b_end; j-- > b;) {
        lengths_[j + 1] = a_[i] == b_[j] ? (j > b ? lengths_[j] : 0) + 1 : 0;
        const size_t size = lengths_[j + 1];
        if (size == 0 || size < best.size) continue;
        const Block found{i + 1 - size, j + 1 - size, size};
        if (size > best.size || found.a < best.a || (found.a == best.a && found.b < best.b)) best = found;
      }
    }
    return best;
  }

  std::string_view a_, b_;
  Budget& budget_;
  std::vector<size_t> lengths_;
};

class Match : public Verifier {
 public:
  explicit Match(JsonReader& options) : section_(options) {}

  bool judges() const override { return true; }
  Verdict verify(const RewardInput& input, const GroupContext*, Budget& budget) const override {
    const nlohmann::json reference = nlohmann::json::parse(input.answer, nullptr, false);
    if (!reference.is_object() || !reference.contains("prefix") || !reference.contains("text") ||
        !reference["prefix"].is_string() || !reference["text"].is_string())
      throw std::runtime_error("the reference answer is not {\"prefix\": ..., \"text\": ...}");
    const auto prefix = reference["prefix"].get<std::string>(), whole = reference["text"].get<std::string>();
    Verdict verdict;
    const auto section = section_.find(input, verdict.detail);
    if (!section) return verdict;
    if (!section->starts_with(prefix)) return {0, "does not begin with " + quote(prefix)};
    const std::string_view text = trim(whole), said = trim(section->substr(prefix.size()));
    if (said == text) return {1, {}};
    if (said.size() + text.size() == 0) return {1, {}};
    // What a much longer response holds beyond this counts as not matched; without it the time would be its length times.
    const std::string_view looked = said.substr(0, 4 * text.size() + 1024);
    const double matched = static_cast<double>(Blocks(looked, text, budget).matched());
    verdict.value = std::min(kAlmost, 2 * matched / static_cast<double>(said.size() + text.size()));
    verdict.detail = fmt::format("{:.3f} alike", verdict.value);
    return verdict;
  }

 private:
  static constexpr double kAlmost = 0.999999;  // 1 is for the text itself
  Section section_;
};

}  // namespace

std::unique_ptr<Verifier> make_recall(JsonReader& options) {
  return std::make_unique<Recall>(options);
}
std::unique_ptr<Verifier> make_match(JsonReader& options) {
  return std::make_unique<Match>(options);
}

}  // namespace perigee::reward
