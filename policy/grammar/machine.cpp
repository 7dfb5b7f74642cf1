#include "policy/grammar/machine.h"

#include <algorithm>

#include "base/error.h"

namespace perigee::policy {

Machine::Machine(const Automaton& automaton, int depth) : automaton_(automaton), depth_(depth) {
  frames_.push_back({-1, -1, -1, depth, 0});
  texts_.emplace_back(-1, 0);
}

int32_t Machine::start(int32_t node, int32_t counter) {
  Building b;
  enter(node, counter, 0, b);
  return intern(b);
}

int32_t Machine::after(int32_t frame) {
  Building b;
  const Frame f = frames_[frame];
  if (f.parent < 0)
    b.escaped = true;
  else
    enter(f.to, 0, f.parent, b);
  return intern(b);
}

int32_t Machine::compute(int32_t state, uint8_t byte) {
  const int32_t to = target(state, byte);
  states_[state].next[byte] = to;
  return to;
}

int32_t Machine::target(int32_t state, uint16_t symbol) {
  Building b;
  // By index: entering may add frames and texts, never states.
  for (const Config& c : states_[state].configs) {
    const Node& n = automaton_.nodes[c.node];
    for (const Edge& e : n.edges) {
      if (symbol < e.low || symbol > e.high) continue;
      int32_t counter = 0, frame_id = c.frame;
      switch (e.op) {
        case Op::kPlain:
          break;
        case Op::kStay:
          counter = c.counter;
          break;
        case Op::kRoom:
          if (c.counter >= n.max) continue;
          counter = c.counter;
          break;
        case Op::kRoomBump:
          if (c.counter >= n.max) continue;
          counter = c.counter + 1;
          break;
        case Op::kBump:
          counter = c.counter + 1;
          break;
        case Op::kEnough:
          if (c.counter < n.min) continue;
          break;
        case Op::kKeyStart:
          counter = 0;
          break;
        case Op::kKeyByte:
          if (key_set(c.frame) >= 0) counter = longer_text(c.counter, static_cast<uint8_t>(symbol));
          break;
        case Op::kKeyEnd: {
          const int32_t set = key_set(c.frame);
          if (set < 0) break;
          std::vector<int32_t> texts = sets_[set];
          const auto at = std::lower_bound(texts.begin(), texts.end(), c.counter);
          if (at != texts.end() && *at == c.counter) continue;
          texts.insert(at, c.counter);
          const Frame key = frames_[c.frame], object = frames_[key.parent];
          const int32_t parent = frame(object.to, object.parent, add_set(std::move(texts)), object.depth);
          frame_id = frame(key.to, parent, key.keys, key.depth);
          break;
        }
      }
      // Counters of unbounded texts stop where they no longer matter.
      const Node& to = automaton_.nodes[e.to];
      if (to.counted && to.max == std::numeric_limits<int32_t>::max()) counter = std::min(counter, to.min);
      enter(e.to, counter, frame_id, b);
    }
  }
  return intern(b);
}

void Machine::enter(int32_t node, int32_t counter, int32_t frame_id, Building& out) {
  const Node& n = automaton_.nodes[node];
  const int depth = frames_[frame_id].depth;
  if (n.distance >= kNever || depth + n.height > kMaxDepth) return;
  if ((n.kind == Node::Kind::kSplit || n.kind == Node::Kind::kCall) && !out.pass({node, counter, frame_id}))
    return;
  switch (n.kind) {
    case Node::Kind::kStep:
      out.configs.push_back({node, counter, frame_id});
      return;
    case Node::Kind::kSplit:
      for (const Edge& e : n.edges) enter(e.to, counter, frame_id, out);
      return;
    case Node::Kind::kCall:
      enter(n.entry, 0, frame(n.to, frame_id, initial_set(n.keys), depth + n.nests), out);
      return;
    case Node::Kind::kPop: {
      const Frame f = frames_[frame_id];
      if (f.parent < 0)
        out.escaped = true;
      else
        enter(f.to, 0, f.parent, out);
      return;
    }
  }
}

bool Machine::Building::pass(const Config& c) {
  constexpr size_t kFew = 32;
  if (passed.size() < kFew) {
    if (std::find(passed.begin(), passed.end(), c) != passed.end()) return false;
    passed.push_back(c);
    return true;
  }
  if (passed_more.empty()) passed_more.insert(passed.begin(), passed.end());
  return passed_more.insert(c).second;
}

int32_t Machine::intern(Building& b) {
  if (b.configs.empty() && !b.escaped) return kDead;
  std::sort(b.configs.begin(), b.configs.end());
  b.configs.erase(std::unique(b.configs.begin(), b.configs.end()), b.configs.end());
  if (b.configs.size() > kMaxPaths) {
    std::stable_sort(b.configs.begin(), b.configs.end(),
                     [&](const Config& x, const Config& y) { return distance(x) < distance(y); });
    b.configs.resize(kMaxPaths);
    std::sort(b.configs.begin(), b.configs.end());
  }
  const auto [it, added] =
      state_ids_.emplace(std::pair(b.configs, b.escaped), static_cast<int32_t>(states_.size()));
  if (!added) return it->second;
  State s;
  s.configs = std::move(b.configs);
  s.escaped = b.escaped;
  s.next.fill(kUnknown);
  s.distance = s.escaped ? 0 : kNever;
  for (const Config& c : s.configs) s.distance = std::min(s.distance, distance(c));
  states_.push_back(std::move(s));
  return it->second;
}

bool Machine::used(const Config& c) const {
  const int32_t set = key_set(c.frame);
  return set >= 0 && std::binary_search(sets_[set].begin(), sets_[set].end(), c.counter);
}

int64_t Machine::distance(const Config& c) const {
  const Node& n = automaton_.nodes[c.node];
  int64_t d = n.distance + frames_[c.frame].distance;
  if (n.counted)
    d += std::max(0, n.missing - c.counter);
  else if (n.role == Node::Role::kKeyText && used(c))
    d += 1;  // this key is taken: another character is needed
  return std::min(d, kNever);
}

int32_t Machine::frame(int32_t to, int32_t parent, int32_t keys, int depth) {
  const auto [it, added] =
      frame_ids_.emplace(std::array{to, parent, keys}, static_cast<int32_t>(frames_.size()));
  if (added) {
    const Node& n = automaton_.nodes[to];
    frames_.push_back(
        {to, parent, keys, depth, std::min(kNever, n.distance + n.missing + frames_[parent].distance)});
  }
  return it->second;
}

int32_t Machine::longer_text(int32_t text, uint8_t byte) {
  const uint64_t key = static_cast<uint64_t>(text) << 8 | byte;
  const auto [it, added] = text_ids_.emplace(key, static_cast<int32_t>(texts_.size()));
  if (added) texts_.emplace_back(text, byte);
  return it->second;
}

int32_t Machine::add_text(std::string_view text) {
  int32_t id = 0;
  for (char c : text) id = longer_text(id, static_cast<uint8_t>(c));
  return id;
}

std::string Machine::text(int32_t id) const {
  std::string out;
  for (; id != 0; id = texts_[id].first) out += static_cast<char>(texts_[id].second);
  std::reverse(out.begin(), out.end());
  return out;
}

int32_t Machine::add_set(std::vector<int32_t> texts) {
  const auto [it, added] = set_ids_.emplace(std::move(texts), static_cast<int32_t>(sets_.size()));
  if (added) sets_.push_back(it->first);
  return it->second;
}

int32_t Machine::initial_set(int32_t keys) {
  if (keys < 0) return -1;
  const auto it = initial_sets_.find(keys);
  if (it != initial_sets_.end()) return it->second;
  std::vector<int32_t> texts;
  for (const std::string& k : automaton_.key_sets[keys]) texts.push_back(add_text(k));
  std::sort(texts.begin(), texts.end());
  const int32_t set = add_set(std::move(texts));
  initial_sets_.emplace(keys, set);
  return set;
}

void Machine::open_key_sets(int32_t frame, std::vector<int32_t>& sets) const {
  for (; frame >= 0; frame = frames_[frame].parent)
    if (frames_[frame].keys >= 0) sets.push_back(frames_[frame].keys);
}

int32_t Machine::adopt_frame(const Machine& from, int32_t id) {
  const Frame& f = from.frames_[id];
  if (f.parent < 0) return 0;
  int32_t keys = -1;
  if (f.keys >= 0) {
    std::vector<int32_t> texts;
    for (int32_t t : from.sets_[f.keys]) texts.push_back(add_text(from.text(t)));
    std::sort(texts.begin(), texts.end());
    keys = add_set(std::move(texts));
  }
  return frame(f.to, adopt_frame(from, f.parent), keys, f.depth);
}

std::unique_ptr<Machine> Machine::compact(int32_t state, int32_t* moved) const {
  auto out = std::make_unique<Machine>(automaton_, depth_);
  Building b;
  b.escaped = states_[state].escaped;
  for (Config c : states_[state].configs) {
    if (automaton_.nodes[c.node].in_key && key_set(c.frame) >= 0) c.counter = out->add_text(text(c.counter));
    c.frame = out->adopt_frame(*this, c.frame);
    b.configs.push_back(c);
  }
  *moved = out->intern(b);
  return out;
}

}  // namespace perigee::policy
