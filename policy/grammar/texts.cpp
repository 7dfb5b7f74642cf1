#include "policy/grammar/texts.h"

#include <array>
#include <limits>
#include <map>
#include <tuple>
#include <vector>

#include "base/error.h"

namespace perigee::policy {
namespace {

// What the steps of a character do: a character of one byte, the first byte of a longer one, its middle, its last.
struct Ops {
  Op single = Op::kPlain, first = Op::kPlain, middle = Op::kPlain, last = Op::kPlain;
};

class TextBuilder {
 public:
  TextBuilder(Automaton& a, const Ops& ops, const Node& like) : a_(a), ops_(ops), like_(like) {
    body_ = node();
  }
  int32_t body() const { return body_; }
  int32_t node() {
    Node n = like_;
    n.role = Node::Role::kNone;
    return a_.add(n);
  }
  // A node from which one byte goes on.
  int32_t link(uint16_t low, uint16_t high, int32_t to, Op op) {
    const int32_t n = node();
    a_.edge(n, low, high, to, op);
    return n;
  }
  void raw() {
    a_.edge(body_, 0x20, '"' - 1, body_, ops_.single);
    a_.edge(body_, '"' + 1, '\\' - 1, body_, ops_.single);
    a_.edge(body_, '\\' + 1, 0x7F, body_, ops_.single);
    const int32_t one = link(0x80, 0xBF, body_, ops_.last);
    const int32_t two = link(0x80, 0xBF, one, ops_.middle);
    const int32_t three = link(0x80, 0xBF, two, ops_.middle);
    a_.edge(body_, 0xC2, 0xDF, one, ops_.first);
    a_.edge(body_, 0xE0, 0xE0, link(0xA0, 0xBF, one, ops_.middle), ops_.first);
    a_.edge(body_, 0xE1, 0xEC, two, ops_.first);
    a_.edge(body_, 0xED, 0xED, link(0x80, 0x9F, one, ops_.middle), ops_.first);  // no surrogates
    a_.edge(body_, 0xEE, 0xEF, two, ops_.first);
    a_.edge(body_, 0xF0, 0xF0, link(0x90, 0xBF, two, ops_.middle), ops_.first);
    a_.edge(body_, 0xF1, 0xF3, three, ops_.first);
    a_.edge(body_, 0xF4, 0xF4, link(0x80, 0x8F, two, ops_.middle), ops_.first);
  }
  void hex(int32_t from, int32_t to, Op op) {
    a_.edge(from, '0', '9', to, op);
    a_.edge(from, 'A', 'F', to, op);
    a_.edge(from, 'a', 'f', to, op);
  }
  // Digits before `to`, of which the last completes a character.
  int32_t hexes(int count, int32_t to, Op last) {
    for (int i = 0; i < count; ++i) {
      const int32_t n = node();
      hex(n, to, i == 0 ? last : ops_.middle);
      to = n;
    }
    return to;
  }
  void all_escapes() {
    const int32_t escape = node();
    a_.edge(body_, '\\', '\\', escape, ops_.first);
    for (char c : std::string_view("\"\\/bfnrt")) a_.edge(escape, c, c, body_, ops_.last);
    const int32_t u = node();
    a_.edge(escape, 'u', 'u', u, ops_.middle);
    const int32_t three = hexes(3, body_, ops_.last), two = hexes(2, body_, ops_.last);
    for (const auto& [low, high] : {std::pair{'0', '9'}, {'a', 'c'}, {'e', 'f'}, {'A', 'C'}, {'E', 'F'}})
      a_.edge(u, low, high, three, ops_.middle);
    // A surrogate comes first of a pair.
    const int32_t low_half = node(), low_second = node();
    const int32_t pair = link('\\', '\\', link('u', 'u', low_half, ops_.middle), ops_.middle);
    for (char d : {'d', 'D'}) a_.edge(low_half, d, d, low_second, ops_.middle);
    a_.edge(low_second, 'c', 'f', two, ops_.middle);
    a_.edge(low_second, 'C', 'F', two, ops_.middle);
    const int32_t high = hexes(2, pair, ops_.middle);
    const int32_t d = node();
    for (char c : {'d', 'D'}) a_.edge(u, c, c, d, ops_.middle);
    a_.edge(d, '0', '7', two, ops_.middle);
    for (const auto& [from, to] : {std::pair{'8', '9'}, {'a', 'b'}, {'A', 'B'}})
      a_.edge(d, from, to, high, ops_.middle);
  }
  // The spelling of spell().
  void one_spelling() {
    const int32_t escape = node();
    a_.edge(body_, '\\', '\\', escape, ops_.first);
    for (char c : std::string_view("\"\\bfnrt")) a_.edge(escape, c, c, body_, ops_.last);
    const int32_t kind = node(), zero = node(), one = node();
    a_.edge(escape, 'u', 'u', link('0', '0', link('0', '0', kind, ops_.middle), ops_.middle), ops_.middle);
    a_.edge(kind, '0', '0', zero, ops_.middle);
    a_.edge(kind, '1', '1', one, ops_.middle);
    for (const auto& [low, high] : {std::pair{'0', '7'}, {'b', 'b'}, {'e', 'f'}})
      a_.edge(zero, low, high, body_, ops_.last);
    a_.edge(one, '0', '9', body_, ops_.last);
    a_.edge(one, 'a', 'f', body_, ops_.last);
  }
  TextRule close(Op op, Op open, Node::Role role) {
    a_.edge(body_, '"', '"', a_.pop(), op);
    a_.nodes[body_].role = role;
    return {a_.step('"', '"', body_, open), body_};
  }

 private:
  Automaton& a_;
  Ops ops_;
  Node like_;
  int32_t body_;
};

struct Bytes {
  uint8_t low, high;
};

// UTF-8 of the code points [low, high] as sequences of byte ranges. None of them is a surrogate or ASCII.
void utf8_sequences(uint32_t low, uint32_t high, std::vector<std::vector<Bytes>>& out) {
  if (low > high) return;
  for (uint32_t limit : {0x7FFu, 0xFFFFu})
    if (low <= limit && limit < high) {
      utf8_sequences(low, limit, out);
      utf8_sequences(limit + 1, high, out);
      return;
    }
  const int rest = high <= 0x7FF ? 1 : high <= 0xFFFF ? 2 : 3;
  for (int i = 1; i <= rest; ++i) {
    const uint32_t mask = (1u << (6 * i)) - 1;
    if ((low & ~mask) == (high & ~mask)) continue;
    if ((low & mask) != 0) {
      utf8_sequences(low, low | mask, out);
      utf8_sequences((low | mask) + 1, high, out);
      return;
    }
    if ((high & mask) != mask) {
      utf8_sequences(low, (high & ~mask) - 1, out);
      utf8_sequences(high & ~mask, high, out);
      return;
    }
  }
  std::vector<Bytes> s;
  constexpr uint8_t kFirst[] = {0, 0xC0, 0xE0, 0xF0};
  for (int i = rest; i >= 0; --i) {
    const auto part = [&](uint32_t c) {
      const uint32_t bits = c >> (6 * i);
      return static_cast<uint8_t>(i == rest ? kFirst[rest] | bits : 0x80 | (bits & 0x3F));
    };
    s.push_back({part(low), part(high)});
  }
  out.push_back(std::move(s));
}

class PatternBuilder {
 public:
  explicit PatternBuilder(Automaton& a) : a_(a) {}
  void range(int32_t from, uint32_t low, uint32_t high, int32_t to) {
    for (uint32_t c = low; c <= std::min(high, 0x7Fu); ++c) {
      if (c >= 0x20 && c != '"' && c != '\\') {
        uint32_t end = c;
        while (end < std::min(high, 0x7Fu) && end + 1 != '"' && end + 1 != '\\') ++end;
        a_.edge(from, static_cast<uint16_t>(c), static_cast<uint16_t>(end), to);
        c = end;
      } else {
        const std::string spelled = spell(std::string(1, static_cast<char>(c)));
        int32_t at = to;
        for (size_t i = spelled.size(); i-- > 1;) {
          const auto b = static_cast<uint8_t>(spelled[i]);
          at = link(b, b, at);
        }
        a_.edge(from, '\\', '\\', at);
      }
    }
    for (const auto& [first, last] : {std::pair{0x80u, 0xD7FFu}, {0xE000u, 0x10FFFFu}}) {
      std::vector<std::vector<Bytes>> sequences;
      utf8_sequences(std::max(low, first), std::min(high, last), sequences);
      for (const auto& s : sequences) {
        int32_t at = to;
        for (size_t i = s.size(); i-- > 1;) at = link(s[i].low, s[i].high, at);
        a_.edge(from, s[0].low, s[0].high, at);
      }
    }
  }

 private:
  int32_t link(uint8_t low, uint8_t high, int32_t to) {
    const auto [it, added] = links_.emplace(std::tuple(low, high, to), -1);
    if (added) it->second = a_.step(low, high, to);
    return it->second;
  }
  Automaton& a_;
  std::map<std::tuple<uint8_t, uint8_t, int32_t>, int32_t> links_;
};

}  // namespace

TextRule free_text_rule(Automaton& a) {
  TextBuilder b(a, {}, {});
  b.raw();
  b.all_escapes();
  return b.close(Op::kPlain, Op::kPlain, Node::Role::kFreeText);
}

TextRule counted_text_rule(Automaton& a, int32_t min, int32_t max) {
  PERIGEE_CHECK(0 <= min && min <= max, "{} to {}", min, max);
  Node like;
  like.counted = true;
  like.min = min;
  like.max = max;
  TextBuilder b(a, {Op::kRoomBump, Op::kRoom, Op::kStay, Op::kBump}, like);
  b.raw();
  b.all_escapes();
  return b.close(Op::kEnough, Op::kPlain, Node::Role::kCountedText);
}

TextRule key_text_rule(Automaton& a) {
  Node like;
  like.in_key = true;
  TextBuilder b(a, {Op::kKeyByte, Op::kKeyByte, Op::kKeyByte, Op::kKeyByte}, like);
  b.raw();
  b.one_spelling();
  return b.close(Op::kKeyEnd, Op::kKeyStart, Node::Role::kKeyText);
}

int32_t pattern_text_rule(Automaton& a, const Dfa& pattern, int32_t min, int32_t max) {
  // Characters are counted up to where the count no longer matters.
  const bool bounded = max != std::numeric_limits<int32_t>::max();
  const int64_t counts = int64_t{bounded ? max : min} + 1;
  if (counts * static_cast<int64_t>(pattern.states.size()) > kMaxNodes)
    throw_input("the pattern with its lengths needs more than {} states", kMaxNodes);
  std::map<std::pair<int32_t, int32_t>, int32_t> nodes;
  std::vector<std::pair<int32_t, int32_t>> work;
  const auto node = [&](int32_t state, int32_t count) {
    const auto [it, added] = nodes.emplace(std::pair(state, count), -1);
    if (added) {
      it->second = a.add({});
      work.emplace_back(state, count);
    }
    return it->second;
  };
  const int32_t entry = a.step('"', '"', node(0, 0));
  PatternBuilder builder(a);
  while (!work.empty()) {
    const auto [state, count] = work.back();
    work.pop_back();
    const int32_t from = nodes.at({state, count});
    if (pattern.states[state].accepts && count >= min) a.edge(from, '"', '"', a.pop());
    if (bounded && count == max) continue;
    for (const Dfa::Edge& e : pattern.states[state].edges)
      builder.range(from, e.low, e.high,
                    node(e.to, static_cast<int32_t>(std::min<int64_t>(count + 1, counts - 1))));
  }
  return entry;
}

std::string spell(std::string_view text) {
  std::string out;
  for (char c : text) {
    constexpr std::string_view kNamed = "\"\\\b\f\n\r\t", kNames = "\"\\bfnrt";
    if (const size_t i = kNamed.find(c); i != std::string_view::npos) {
      out += '\\';
      out += kNames[i];
    } else if (static_cast<uint8_t>(c) < 0x20) {
      out += fmt::format("\\u{:04x}", static_cast<uint8_t>(c));
    } else {
      out += c;
    }
  }
  return out;
}

}  // namespace perigee::policy
