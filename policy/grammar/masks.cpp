#include "policy/grammar/masks.h"

#include <algorithm>
#include <bit>
#include <limits>

#include "base/error.h"
#include "policy/grammar/texts.h"

namespace perigee::policy {
namespace {

constexpr size_t kMaxHeldBytes = size_t{32} << 20;  // of the masks of one automaton
constexpr size_t kMaxCounted = 256;                 // masks of counted text

// Bits where the list would be longer than they are.
void pack(const TokenIndex& index, LocalMask& mask) {
  if (mask.tokens.size() < index.mask_words()) return;
  mask.bits.assign(index.mask_words(), 0);
  for (int32_t t : mask.tokens) mask.bits[t / 32] |= 1u << (t % 32);
  mask.tokens.clear();
  mask.tokens.shrink_to_fit();
}

// An automaton of one string: `make` gives the rule of the text and its body, that stands after the quote.
template <class Make>
Automaton one_text(const Make& make, int32_t* body) {
  Automaton a;
  a.final = a.add({});
  const TextRule rule = make(a);
  a.root = a.call(rule.entry, a.final);
  *body = rule.body;
  a.finish();
  return a;
}

// Characters that begin in the text, up to its closing quote or the end. The text is well formed as far as it goes.
int32_t count_characters(std::string_view text) {
  int32_t n = 0;
  bool pair = false;  // the escape that follows is the second half of a character
  for (size_t i = 0; i < text.size() && text[i] != '"';) {
    if (text[i] != '\\') {
      n += (static_cast<uint8_t>(text[i]) & 0xC0) != 0x80;
      ++i;
      continue;
    }
    n += !pair;
    const bool unicode = i + 1 < text.size() && text[i + 1] == 'u';
    pair = !pair && unicode && i + 3 < text.size() && (text[i + 2] | 32) == 'd' &&
           std::string_view("89abAB").find(text[i + 3]) != std::string_view::npos;
    i += unicode ? 6 : 2;
  }
  return n;
}

}  // namespace

void build_tail(const TokenIndex& index, std::vector<Leaving> leaving, LocalMask& mask) {
  if (leaving.empty()) return;
  const auto rest = [&](const Leaving& l) { return index.bytes(l.token).substr(static_cast<size_t>(l.at)); };
  std::sort(leaving.begin(), leaving.end(), [&](const Leaving& a, const Leaving& b) {
    const int c = rest(a).compare(rest(b));
    return c != 0 ? c < 0 : a.token < b.token;
  });
  mask.tail.emplace_back();
  std::vector<int32_t> path = {0};
  std::string_view last;
  const auto close = [&](size_t depth) {
    while (path.size() > depth + 1) {
      mask.tail[path.back()].skip = static_cast<int32_t>(mask.tail.size());
      path.pop_back();
    }
  };
  for (const Leaving& l : leaving) {
    const std::string_view b = rest(l);
    const auto common =
        static_cast<size_t>(std::mismatch(last.begin(), last.end(), b.begin(), b.end()).first - last.begin());
    close(common);
    const auto here = static_cast<int32_t>(mask.tail_tokens.size());
    for (size_t i = common; i < b.size(); ++i) {
      path.push_back(static_cast<int32_t>(mask.tail.size()));
      mask.tail.push_back({0, here, here, static_cast<uint16_t>(i + 1), static_cast<uint8_t>(b[i])});
    }
    mask.tail_tokens.push_back(l.token);
    mask.tail[path.back()].last_token = here + 1;
    last = b;
  }
  close(0);
  mask.tail[0].skip = static_cast<int32_t>(mask.tail.size());
}

LocalMask walk_local_mask(const TokenIndex& index, const Automaton& automaton, int32_t node, int32_t counter,
                          int depth) {
  LocalMask mask;
  std::vector<Leaving> leaving;
  Machine machine(automaton, depth);
  const auto& tree = index.tree();
  std::vector<int32_t> states(static_cast<size_t>(index.longest_bytes()) + 1);
  states[0] = machine.start(node, counter);
  if (states[0] == Machine::kDead) return mask;
  const int64_t from = machine.distance(states[0]);
  for (size_t i = 1; i < tree.size();) {
    const TokenIndex::Node& n = tree[i];
    const int32_t s = machine.step(states[n.depth - 1u], n.byte);
    if (s == Machine::kDead) {
      i = static_cast<size_t>(n.skip);
      continue;
    }
    states[n.depth] = s;
    for (int32_t t = n.token; t >= 0; t = index.next_same(t)) {
      const int64_t by = machine.distance(s) - from;
      if (by <= 0)
        mask.tokens.push_back(t);
      else
        mask.rising.push_back({t, static_cast<int32_t>(std::min<int64_t>(by, INT32_MAX))});
    }
    if (machine.escaped(s))
      for (auto j = i + 1; j < static_cast<size_t>(n.skip); ++j)
        for (int32_t t = tree[j].token; t >= 0; t = index.next_same(t)) leaving.push_back({t, n.depth});
    ++i;
  }
  build_tail(index, std::move(leaving), mask);
  pack(index, mask);
  return mask;
}

std::shared_ptr<const LocalMask> TextMasks::free_text() {
  const std::lock_guard lock(mutex_);
  free_locked();
  return free_;
}

const LocalMask& TextMasks::free_locked() {
  if (free_) return *free_;
  int32_t body = -1;
  const Automaton a = one_text([](Automaton& x) { return free_text_rule(x); }, &body);
  LocalMask mask = walk_local_mask(index_, a, body, 0, 0);
  const auto inside = [&](int32_t t) {
    const int32_t n = count_characters(index_.bytes(t));
    most_characters_ = std::max(most_characters_, n);
    return n;
  };
  for (int32_t t : mask.tokens) inside_.push_back({t, inside(t)});
  for (size_t w = 0; w < mask.bits.size(); ++w)
    for (uint32_t m = mask.bits[w]; m != 0; m &= m - 1) {
      const auto t = static_cast<int32_t>(w * 32 + static_cast<size_t>(std::countr_zero(m)));
      inside_.push_back({t, inside(t)});
    }
  for (const auto& r : mask.rising) rising_.push_back({r, inside(r.token)});
  for (int32_t t : mask.tail_tokens) {
    const std::string_view b = index_.bytes(t);
    size_t at = 0;
    while (b[at] != '"') at += b[at] == '\\' ? 2 : 1;
    leaving_.push_back({{t, static_cast<int32_t>(at) + 1}, inside(t)});
  }
  std::stable_sort(inside_.begin(), inside_.end(),
                   [](const Counted& x, const Counted& y) { return x.characters < y.characters; });
  free_ = std::make_shared<const LocalMask>(std::move(mask));
  return *free_;
}

std::shared_ptr<const LocalMask> TextMasks::key_text() {
  const std::lock_guard lock(mutex_);
  if (!key_) {
    int32_t body = -1;
    const Automaton a = one_text([](Automaton& x) { return key_text_rule(x); }, &body);
    key_ = std::make_shared<const LocalMask>(walk_local_mask(index_, a, body, 0, 0));
  }
  return key_;
}

std::shared_ptr<const LocalMask> TextMasks::counted_text(int32_t room, int32_t missing) {
  const std::lock_guard lock(mutex_);
  free_locked();
  if (room >= most_characters_ && missing <= 0) return free_;
  room = std::min(room, most_characters_);
  missing = std::min(missing, most_characters_ + 1);
  if (const auto it = counted_.find({room, missing}); it != counted_.end()) return it->second;
  auto mask = std::make_shared<LocalMask>();
  // A token that holds the closing quote needs `missing` characters before it; the others need room only.
  const auto ends = [&](int32_t t) {
    const std::string_view b = index_.bytes(t);
    for (size_t i = 0; i < b.size(); i += b[i] == '\\' ? 2 : 1)
      if (b[i] == '"') return true;
    return false;
  };
  const auto fits = [&](int32_t t, int32_t characters) {
    return characters <= room && (characters >= missing || !ends(t));
  };
  for (const Counted& c : inside_) {
    if (c.characters > room) break;
    if (fits(c.token, c.characters)) mask->tokens.push_back(c.token);
  }
  for (const CountedRising& r : rising_)
    if (fits(r.rising.token, r.characters)) mask->rising.push_back(r.rising);
  std::vector<Leaving> leaving;
  for (const CountedLeaving& l : leaving_)
    if (l.characters <= room && l.characters >= missing) leaving.push_back(l.leaving);
  build_tail(index_, std::move(leaving), *mask);
  pack(index_, *mask);
  if (counted_.size() >= kMaxCounted) counted_.clear();
  return counted_[{room, missing}] = std::move(mask);
}

std::shared_ptr<const LocalMask> NodeMasks::get(const Config& config, int depth) {
  const Node& n = automaton_.nodes[config.node];
  switch (n.role) {
    case Node::Role::kNone:
      break;
    case Node::Role::kFreeText:
      return texts_.free_text();
    case Node::Role::kKeyText:
      return texts_.key_text();
    case Node::Role::kCountedText: {
      const bool unbounded = n.max == std::numeric_limits<int32_t>::max();
      return texts_.counted_text(unbounded ? n.max : n.max - config.counter, n.min - config.counter);
    }
  }
  // The depth matters where a token could open more levels than are left for it and for what must follow.
  const int left = kMaxDepth - depth;
  const int shown_depth = n.reach <= left || index_.most_openings() + automaton_.tallest <= left ? 0 : depth;
  const std::tuple key(config.node, n.counted ? config.counter : 0, shown_depth);
  const std::lock_guard lock(mutex_);
  if (const auto it = masks_.find(key); it != masks_.end()) return it->second;
  auto mask = std::make_shared<const LocalMask>(
      walk_local_mask(index_, automaton_, config.node, std::get<1>(key), shown_depth));
  if (held_bytes_ + mask->bytes() > kMaxHeldBytes) {
    masks_.clear();
    held_bytes_ = 0;
  }
  held_bytes_ += mask->bytes() + 64;
  masks_.emplace(key, mask);
  return mask;
}

}  // namespace perigee::policy
