// Masks of constrained decoding over a vocabulary of the release's size.
#include <algorithm>
#include <set>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/random.h"
#include "bench/rig.h"
#include "policy/grammar/grammar.h"

namespace perigee::bench {
namespace {

constexpr int64_t kVocab = 163840;

// Tokens as a trained vocabulary has them: bytes, words of up to 14 letters with and without a space before, numbers of
// up to three digits, runs of punctuation as JSON and code have them, words beyond ASCII.
class MadeUpTokenizer : public policy::Tokenizer {
 public:
  MadeUpTokenizer() : Tokenizer(kVocab, static_cast<int32_t>(kVocab) - 256, specials()) {
    Random r(1);
    std::set<std::string> seen;
    const auto add = [&](const std::string& t) {
      if (tokens_.size() + 256 < kVocab && seen.insert(t).second) tokens_.push_back(t);
    };
    for (int b = 0; b < 256; ++b) add(std::string(1, static_cast<char>(b)));
    for (int n = 0; n < 1000; ++n) add(std::to_string(n));
    const std::string marks = "\"\"\"\"{}[]:,,()<>/\\.;=-_'#*+ \n\t";
    while (tokens_.size() < 6000) {
      std::string t;
      for (int64_t n = r.next_int(2, 5); n > 0; --n)
        t += marks[static_cast<size_t>(r.next_int(0, static_cast<int64_t>(marks.size()) - 1))];
      add(t);
    }
    const std::vector<std::string> syllables = {"an", "ter", "in",  "o",  "re", "con", "ta",
                                                "e",  "ly",  "ing", "er", "s",  "al",  "pro",
                                                "de", "é",   "ü",   "日", "本", "на",  "ст"};
    while (tokens_.size() + 256 < kVocab) {
      std::string t;
      for (int64_t n = r.next_int(1, 5); n > 0; --n)
        t += syllables[static_cast<size_t>(r.next_int(0, static_cast<int64_t>(syllables.size()) - 1))];
      if (r.next_int(0, 3) == 0) t[0] = static_cast<char>(t[0] & 0x80 ? t[0] : t[0] - 32);
      t += std::string(static_cast<size_t>(r.next_int(0, 2)), static_cast<char>('a' + r.next_int(0, 25)));
      add(r.next_int(0, 1) == 0 ? " " + t : t);
    }
  }
  void append_plain(std::string_view text, std::vector<int32_t>& out) const override {
    for (char c : text) out.push_back(static_cast<uint8_t>(c));
  }
  std::string token(int32_t id) const override {
    return is_special(id) ? special_name(id) : tokens_[static_cast<size_t>(id)];
  }

 private:
  static std::map<std::string, int32_t, std::less<>> specials() {
    std::map<std::string, int32_t, std::less<>> out = policy::ByteTokenizer().specials();
    for (auto& [name, id] : out) id += static_cast<int32_t>(kVocab) - 512;
    return out;
  }
  std::vector<std::string> tokens_;
};

constexpr const char* kSchema = R"({
  "type": "object",
  "properties": {
    "title": {"type": "string", "maxLength": 80},
    "kind": {"enum": ["article", "book", "thesis"]},
    "year": {"type": "integer", "minimum": 1900, "maximum": 2100},
    "authors": {"type": "array", "items": {"type": "object",
      "properties": {"name": {"type": "string"}, "email": {"type": "string", "pattern": "^[a-z.]+@[a-z]+\\.org$"}},
      "required": ["name"], "additionalProperties": false}},
    "notes": {"type": "object", "additionalProperties": {"type": "string"}}
  },
  "required": ["title", "kind", "year", "authors"],
  "additionalProperties": false})";

}  // namespace

void bench_grammar(Rig& rig) {
  const std::string name = "grammar-mask";
  if (!rig.wants(name)) return;
  const MadeUpTokenizer tokenizer;
  const double begin = now_s();
  const policy::TokenIndex index(tokenizer);
  const double index_s = now_s() - begin;
  const auto schema = nlohmann::ordered_json::parse(kSchema);
  const int32_t end = tokenizer.special(policy::special::kImEnd);
  constexpr int64_t kTokens = 160;
  double first_s = 0;
  Random r(2);
  // One text: its masks, the draws not counted.
  const auto text = [&](double* spent_s) {
    double spent = -now_s();
    auto c = policy::json_schema_constraint(index, schema, {{end}, kTokens});
    int64_t tokens = 0;
    for (; !c->complete(); ++tokens) {
      const auto bits = c->allowed();
      spent += now_s();
      std::vector<int32_t> some;
      for (size_t w = 0; w < bits.size(); ++w)
        for (uint32_t m = bits[w]; m != 0; m &= m - 1)
          some.push_back(static_cast<int32_t>(w * 32) + __builtin_ctz(m));
      PERIGEE_CHECK(!some.empty(), "no token may follow");
      const int32_t t = some[static_cast<size_t>(r.next_int(0, static_cast<int64_t>(some.size()) - 1))];
      spent -= now_s();
      c->accept(t);
    }
    *spent_s += spent + now_s();
    return tokens;
  };
  const int64_t cold = text(&first_s);
  Figure f;
  f.name = name;
  f.unit = "us/token";
  f.time = true;
  f.target = 50;
  f.note = fmt::format("{} entries indexed in {:.2f} s; a first text {:.0f} us/token", kVocab, index_s,
                       first_s * 1e6 / static_cast<double>(cold));
  std::vector<double> values;
  for (const double stop = now_s() + rig.options().seconds; now_s() < stop || values.size() < 5;) {
    double spent_s = 0;
    int64_t tokens = 0;
    while (tokens < 500) tokens += text(&spent_s);
    values.push_back(spent_s * 1e6 / static_cast<double>(tokens));
  }
  f.turns = static_cast<int>(values.size());
  f.value = median(values);
  std::sort(values.begin(), values.end());
  f.low = values[values.size() / 4];
  f.high = values[values.size() * 3 / 4];
  rig.report(f);
}

}  // namespace perigee::bench
