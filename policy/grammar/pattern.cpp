#include "policy/grammar/pattern.h"

#include <algorithm>
#include <map>
#include <set>
#include <utility>

#include "base/error.h"
#include "base/text.h"

namespace perigee::policy {
namespace {

constexpr uint32_t kLastCodePoint = 0x10FFFF;
constexpr int kMaxThompson = 20'000;
constexpr int kMaxRepeat = 1000;
constexpr int kMaxGroups = 100;  // nested
constexpr int64_t kMaxWork = 4'000'000;

struct Range {
  uint32_t low, high;
};
using Ranges = std::vector<Range>;

Ranges normal(Ranges r) {
  std::sort(r.begin(), r.end(), [](const Range& a, const Range& b) { return a.low < b.low; });
  Ranges out;
  for (const Range& x : r) {
    if (!out.empty() && x.low <= out.back().high + 1)
      out.back().high = std::max(out.back().high, x.high);
    else
      out.push_back(x);
  }
  return out;
}

Ranges inverse(const Ranges& r) {
  Ranges out;
  uint32_t next = 0;
  for (const Range& x : normal(r)) {
    if (x.low > next) out.push_back({next, x.low - 1});
    next = x.high + 1;
  }
  if (next <= kLastCodePoint) out.push_back({next, kLastCodePoint});
  return out;
}

const Ranges kDigits = {{'0', '9'}};
const Ranges kWord = {{'0', '9'}, {'A', 'Z'}, {'_', '_'}, {'a', 'z'}};
const Ranges kSpace = {{9, 13},          {' ', ' '},       {0xA0, 0xA0},     {0x1680, 0x1680},
                       {0x2000, 0x200A}, {0x2028, 0x2029}, {0x202F, 0x202F}, {0x205F, 0x205F},
                       {0x3000, 0x3000}, {0xFEFF, 0xFEFF}};
const Ranges kLineEnds = {{'\n', '\n'}, {'\r', '\r'}, {0x2028, 0x2029}};
const Ranges kAll = {{0, kLastCodePoint}};

// A nondeterministic automaton: a state consumes (ranges) or branches.
struct Nfa {
  struct State {
    Ranges ranges;
    int32_t to = -1;
    std::vector<int32_t> empty;
  };
  std::vector<State> states;
  int32_t add() {
    if (states.size() >= kMaxThompson) throw_input("pattern: it needs more than {} states", kMaxThompson);
    states.emplace_back();
    return static_cast<int32_t>(states.size()) - 1;
  }
};

struct Part {
  int32_t from, to;  // to: a state without edges yet
};

class Parser {
 public:
  Parser(std::string_view pattern, Nfa& nfa) : text_(pattern), nfa_(nfa) {}

  // The whole pattern, found anywhere unless anchored.
  Part parse() {
    if (!is_utf8(text_)) fail("it is not UTF-8");
    const Part all = alternatives(true);
    if (at_ < text_.size()) fail("an unmatched ')'");
    return all;
  }

 private:
  [[noreturn]] void fail(std::string_view what) const {
    throw_input("pattern: {} at byte {} of {}", what, at_, quote(text_));
  }
  bool more() const { return at_ < text_.size(); }
  char peek() const { return more() ? text_[at_] : '\0'; }
  bool take(std::string_view s) {
    if (!text_.substr(at_).starts_with(s)) return false;
    at_ += s.size();
    return true;
  }
  uint32_t code_point() {
    const size_t n = utf8_sequence_bytes(text_.substr(at_));
    uint32_t c = static_cast<uint8_t>(text_[at_]);
    if (n > 1) c &= 0x7Fu >> n;
    for (size_t i = 1; i < n; ++i) c = c << 6 | (static_cast<uint8_t>(text_[at_ + i]) & 0x3F);
    at_ += n;
    return c;
  }

  Part empty() {
    const int32_t s = nfa_.add();
    return {s, s};
  }
  Part one(Ranges ranges) {
    const int32_t a = nfa_.add(), b = nfa_.add();
    nfa_.states[a].ranges = std::move(ranges);
    nfa_.states[a].to = b;
    return {a, b};
  }
  void link(int32_t from, int32_t to) { nfa_.states[from].empty.push_back(to); }
  Part join(Part a, Part b) {
    link(a.to, b.from);
    return {a.from, b.to};
  }
  Part any_text() {
    const int32_t s = nfa_.add(), loop = nfa_.add();
    nfa_.states[loop].ranges = kAll;
    nfa_.states[loop].to = s;
    link(s, loop);
    const int32_t end = nfa_.add();
    link(s, end);
    return {s, end};
  }

  Part alternatives(bool top) {
    const int32_t from = nfa_.add(), to = nfa_.add();
    do {
      const Part p = sequence(top);
      link(from, p.from);
      link(p.to, to);
    } while (take("|"));
    return {from, to};
  }

  // top: an alternative of the whole pattern, where anchors may stand at both ends.
  Part sequence(bool top) {
    Part all = empty();
    bool begins = false, ends = false;
    if (top && take("^")) begins = true;
    if (top && !begins) all = join(all, any_text());
    while (more() && peek() != '|' && peek() != ')') {
      if (peek() == '^') fail("^ is supported at the beginning of an alternative of the whole pattern only");
      if (peek() == '$') {
        const char next = at_ + 1 < text_.size() ? text_[at_ + 1] : '|';
        if (!top || next != '|')
          fail("$ is supported at the end of an alternative of the whole pattern only");
        ++at_;
        ends = true;
        break;
      }
      all = join(all, repeated());
    }
    if (top && !ends) all = join(all, any_text());
    return all;
  }

  Part repeated() {
    const size_t begin = at_;
    Part p = atom();
    for (int times = 0;; ++times) {
      int low = 0, high = -1;
      if (take("*")) {
      } else if (take("+")) {
        low = 1;
      } else if (take("?")) {
        high = 1;
      } else if (peek() == '{' && counts(&low, &high)) {
      } else {
        return p;
      }
      if (times > 0) fail("a quantifier after a quantifier");
      take("?");  // lazy: the same texts
      const size_t end = at_;
      if (high >= 0 && high < low) fail("{m,n} with m > n");
      // The first copy is what was just parsed; others are parsed anew, as each needs states of its own.
      bool first = true;
      const auto copy = [&] {
        if (std::exchange(first, false)) return p;
        at_ = begin;
        return atom();
      };
      Part all = empty();
      for (int i = 0; i + (high < 0) < low; ++i) all = join(all, copy());
      if (high < 0) {
        const Part body = copy();
        const int32_t before = nfa_.add(), after = nfa_.add();
        link(all.to, before);
        link(before, body.from);
        link(body.to, after);
        link(after, before);
        if (low == 0) link(before, after);
        all.to = nfa_.add();
        link(after, all.to);
      } else if (high > low) {
        const int32_t out = nfa_.add();
        for (int i = low; i < high; ++i) {
          link(all.to, out);
          all = join(all, copy());
        }
        link(all.to, out);
        all.to = out;
      }
      at_ = end;
      p = all;
    }
  }

  // {m}, {m,} or {m,n}; anything else in braces is text.
  bool counts(int* low, int* high) {
    size_t i = at_ + 1;
    const auto number = [&](int* out) {
      const size_t from = i;
      int64_t n = 0;
      while (i < text_.size() && text_[i] >= '0' && text_[i] <= '9')
        n = std::min<int64_t>(n * 10 + text_[i++] - '0', 1'000'000);
      *out = static_cast<int>(n);
      return i > from;
    };
    if (!number(low)) return false;
    *high = *low;
    if (i < text_.size() && text_[i] == ',') {
      ++i;
      if (!number(high)) *high = -1;
    }
    if (i >= text_.size() || text_[i] != '}') return false;
    at_ = i + 1;
    if (*low > kMaxRepeat || *high > kMaxRepeat) fail(fmt::format("a count over {}", kMaxRepeat));
    return true;
  }

  Part atom() {
    if (take("(")) {
      if (take("?")) {
        if (take("=") || take("!") || take("<=") || take("<!")) fail("look-around is not supported");
        if (take("<")) {
          const size_t end = text_.find('>', at_);
          if (end == std::string_view::npos) fail("a group name without '>'");
          at_ = end + 1;
        } else if (!take(":")) {
          fail("this kind of group is not supported");
        }
      }
      if (++depth_ > kMaxGroups) fail("groups are nested too deep");
      const Part p = alternatives(false);
      --depth_;
      if (!take(")")) fail("a '(' without ')'");
      return p;
    }
    if (take("[")) return one(char_class());
    if (take(".")) return one(inverse(kLineEnds));
    if (peek() == '*' || peek() == '+' || peek() == '?') fail("a quantifier without anything before it");
    if (take("\\")) return one(escape(false));
    const uint32_t c = code_point();
    return one({{c, c}});
  }

  uint32_t hex(int digits) {
    uint32_t c = 0;
    for (int i = 0; i < digits; ++i, ++at_) {
      const char d = peek();
      const int v = d >= '0' && d <= '9'                 ? d - '0'
                    : (d | 32) >= 'a' && (d | 32) <= 'f' ? (d | 32) - 'a' + 10
                                                         : -1;
      if (v < 0) fail("a hexadecimal digit is expected");
      c = c << 4 | static_cast<uint32_t>(v);
    }
    return c;
  }

  Ranges escape(bool in_class) {
    if (!more()) fail("a '\\' at the end");
    const char c = peek();
    ++at_;
    switch (c) {
      case 'd':
        return kDigits;
      case 'D':
        return inverse(kDigits);
      case 'w':
        return kWord;
      case 'W':
        return inverse(kWord);
      case 's':
        return kSpace;
      case 'S':
        return inverse(kSpace);
      case 't':
        return {{'\t', '\t'}};
      case 'n':
        return {{'\n', '\n'}};
      case 'r':
        return {{'\r', '\r'}};
      case 'f':
        return {{'\f', '\f'}};
      case 'v':
        return {{'\v', '\v'}};
      case 'x': {
        const uint32_t h = hex(2);
        return {{h, h}};
      }
      case 'u': {
        uint32_t h = 0;
        if (take("{")) {
          const size_t end = text_.find('}', at_);
          if (end == std::string_view::npos || end == at_ || end - at_ > 6)
            fail("\\u{...} of one to six digits is expected");
          h = hex(static_cast<int>(end - at_));
          ++at_;
        } else {
          h = hex(4);
          if (h >= 0xD800 && h < 0xDC00 && take("\\u")) {
            const uint32_t low = hex(4);
            if (low < 0xDC00 || low > 0xDFFF) fail("half of a surrogate pair");
            h = 0x10000 + ((h - 0xD800) << 10) + (low - 0xDC00);
          }
        }
        if (h > kLastCodePoint || (h >= 0xD800 && h <= 0xDFFF)) fail("no code point");
        return {{h, h}};
      }
      case '0':
        if (peek() < '0' || peek() > '9') return {{0, 0}};
        fail("octal escapes are not supported");
      case 'b':
        if (in_class) return {{'\b', '\b'}};
        [[fallthrough]];
      case 'B':
        fail("word boundaries are not supported");
      case 'p':
      case 'P':
        fail("\\p is not supported");
      case 'k':
        fail("back-references are not supported");
      default:
        if (c >= '1' && c <= '9') fail("back-references are not supported");
        if ((c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || static_cast<uint8_t>(c) >= 0x80)
          fail(fmt::format("the escape \\{} is not known", quote(std::string_view(&c, 1))));
        return {{static_cast<uint8_t>(c), static_cast<uint8_t>(c)}};
    }
  }

  Ranges char_class() {
    const bool negated = take("^");
    Ranges out;
    while (!take("]")) {
      if (!more()) fail("a '[' without ']'");
      const auto item = [&]() -> Ranges {
        if (take("\\")) return escape(true);
        const uint32_t c = code_point();
        return {{c, c}};
      };
      const Ranges first = item();
      const bool range = peek() == '-' && at_ + 1 < text_.size() && text_[at_ + 1] != ']';
      if (!range) {
        out.insert(out.end(), first.begin(), first.end());
        continue;
      }
      ++at_;
      const Ranges last = item();
      if (first.size() != 1 || first[0].low != first[0].high || last.size() != 1 ||
          last[0].low != last[0].high)
        fail("a range between classes");
      if (first[0].low > last[0].low) fail("a range that runs backwards");
      out.push_back({first[0].low, last[0].low});
    }
    return negated ? inverse(out) : normal(out);
  }

  std::string_view text_;
  Nfa& nfa_;
  size_t at_ = 0;
  int depth_ = 0;
};

using Set = std::vector<int32_t>;

void close_over(const Nfa& nfa, Set& set) {
  std::set<int32_t> seen(set.begin(), set.end());
  Set work = set;
  while (!work.empty()) {
    const int32_t s = work.back();
    work.pop_back();
    for (int32_t to : nfa.states[s].empty)
      if (seen.insert(to).second) work.push_back(to);
  }
  set.assign(seen.begin(), seen.end());
}

// Drops the edges into states from which nothing is accepted.
void prune(Dfa& dfa) {
  std::vector<std::vector<int32_t>> before(dfa.states.size());
  std::vector<char> live(dfa.states.size(), 0);
  Set work;
  for (size_t i = 0; i < dfa.states.size(); ++i) {
    for (const auto& e : dfa.states[i].edges) before[e.to].push_back(static_cast<int32_t>(i));
    if (dfa.states[i].accepts) {
      live[i] = 1;
      work.push_back(static_cast<int32_t>(i));
    }
  }
  while (!work.empty()) {
    const int32_t s = work.back();
    work.pop_back();
    for (int32_t b : before[s])
      if (!live[b]) {
        live[b] = 1;
        work.push_back(b);
      }
  }
  for (auto& s : dfa.states) std::erase_if(s.edges, [&](const Dfa::Edge& e) { return !live[e.to]; });
}

}  // namespace

Dfa compile_pattern(std::string_view pattern) {
  constexpr size_t kMaxPatternBytes = 4096;
  if (pattern.size() > kMaxPatternBytes) throw_input("pattern: longer than {} bytes", kMaxPatternBytes);
  Nfa nfa;
  const Part all = Parser(pattern, nfa).parse();
  Dfa dfa;
  std::map<Set, int32_t> ids;
  std::vector<Set> sets;
  const auto state = [&](Set set) {
    close_over(nfa, set);
    const auto [it, added] = ids.emplace(set, static_cast<int32_t>(sets.size()));
    if (added) {
      if (sets.size() >= static_cast<size_t>(kMaxPatternStates))
        throw_input("pattern: {} needs more than {} states", quote(pattern), kMaxPatternStates);
      dfa.states.emplace_back();
      dfa.states.back().accepts = std::binary_search(set.begin(), set.end(), all.to);
      sets.push_back(std::move(set));
    }
    return it->second;
  };
  state({all.from});
  int64_t looked_at = 0;
  for (size_t i = 0; i < sets.size(); ++i) {
    // Between two neighbouring bounds all code points go to the same set.
    std::set<uint32_t> bounds;
    for (int32_t s : sets[i])
      for (const Range& r : nfa.states[s].ranges) {
        bounds.insert(r.low);
        bounds.insert(r.high + 1);
      }
    for (auto it = bounds.begin(); it != bounds.end() && std::next(it) != bounds.end(); ++it) {
      const uint32_t low = *it, high = *std::next(it) - 1;
      Set to;
      for (int32_t s : sets[i]) looked_at += 1 + static_cast<int64_t>(nfa.states[s].ranges.size());
      if (looked_at > kMaxWork) throw_input("pattern: {} takes too long to compile", quote(pattern));
      for (int32_t s : sets[i])
        for (const Range& r : nfa.states[s].ranges)
          if (r.low <= low && high <= r.high) to.push_back(nfa.states[s].to);
      if (to.empty()) continue;
      const int32_t target = state(std::move(to));
      auto& edges = dfa.states[i].edges;
      if (!edges.empty() && edges.back().to == target && edges.back().high + 1 == low)
        edges.back().high = high;
      else
        edges.push_back({low, high, target});
    }
  }
  prune(dfa);
  return dfa;
}

bool Dfa::matches(std::u32string_view text) const {
  int32_t at = 0;
  for (char32_t c : text) {
    const auto& edges = states[at].edges;
    const auto e =
        std::find_if(edges.begin(), edges.end(), [&](const Edge& x) { return x.low <= c && c <= x.high; });
    if (e == edges.end()) return false;
    at = e->to;
  }
  return states[at].accepts;
}

}  // namespace perigee::policy
