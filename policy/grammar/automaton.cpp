#include "policy/grammar/automaton.h"

#include <algorithm>
#include <deque>

#include "base/error.h"

namespace perigee::policy {

int32_t Automaton::add(Node node) {
  if (static_cast<int64_t>(nodes.size()) >= kMaxNodes)
    throw_input("too large: it needs more than {} states; lower its bounds or split it", kMaxNodes);
  nodes.push_back(std::move(node));
  return static_cast<int32_t>(nodes.size()) - 1;
}

int32_t Automaton::step(uint16_t low, uint16_t high, int32_t to, Op op) {
  Node n;
  n.edges.push_back({low, high, op, to});
  return add(std::move(n));
}

int32_t Automaton::literal(std::string_view bytes, int32_t to) {
  for (size_t i = bytes.size(); i-- > 0;) {
    const auto b = static_cast<uint8_t>(bytes[i]);
    to = step(b, b, to);
  }
  return to;
}

int32_t Automaton::split(std::vector<int32_t> targets) {
  Node n;
  n.kind = Node::Kind::kSplit;
  for (int32_t t : targets) n.edges.push_back({0, 0, Op::kPlain, t});
  return add(std::move(n));
}

int32_t Automaton::pop() {
  if (pop_ < 0) {
    Node n;
    n.kind = Node::Kind::kPop;
    pop_ = add(std::move(n));
  }
  return pop_;
}

int32_t Automaton::call(int32_t entry, int32_t to, bool nests, int32_t keys) {
  // A call that returns to a return is a jump.
  if (nodes[to].kind == Node::Kind::kPop && !nests && keys < 0) return entry;
  Node n;
  n.kind = Node::Kind::kCall;
  n.entry = entry;
  n.to = to;
  n.nests = nests;
  n.keys = keys;
  return add(std::move(n));
}

void Automaton::edge(int32_t from, uint16_t low, uint16_t high, int32_t to, Op op) {
  nodes[from].edges.push_back({low, high, op, to});
}

int32_t Automaton::maybe_space(int32_t to) {
  return split({to, step(' ', ' ', to)});
}

void Automaton::measure() {
  const auto count = static_cast<int32_t>(nodes.size());
  std::vector<std::vector<int32_t>> before(count);  // who looks at whom
  for (int32_t i = 0; i < count; ++i) {
    Node& n = nodes[i];
    n.distance = n.kind == Node::Kind::kPop || i == final ? 0 : kNever;
    n.height = n.kind == Node::Kind::kPop || i == final ? 0 : kMaxDepth + 1;
    n.reach = 0;
    for (const Edge& e : n.edges) before[e.to].push_back(i);
    if (n.kind == Node::Kind::kCall) {
      before[n.entry].push_back(i);
      before[n.to].push_back(i);
    }
  }
  std::deque<int32_t> work;
  std::vector<char> queued(count, 1);
  for (int32_t i = 0; i < count; ++i) work.push_back(i);
  while (!work.empty()) {
    const int32_t i = work.front();
    work.pop_front();
    queued[i] = 0;
    Node& n = nodes[i];
    int64_t distance = n.distance;
    int32_t missing = n.missing, height = n.height, reach = n.reach;
    const auto total = [&](int32_t to) { return std::min(kNever, nodes[to].distance + nodes[to].missing); };
    switch (n.kind) {
      case Node::Kind::kPop:
        break;
      case Node::Kind::kCall: {
        const Node &entry = nodes[n.entry], &to = nodes[n.to];
        distance = std::min(kNever, total(n.entry) + total(n.to));
        height = std::min(kMaxDepth + 1, std::max(entry.height + n.nests, to.height));
        reach = std::min(kMaxDepth + 1, std::max(entry.reach + n.nests, to.reach));
        break;
      }
      case Node::Kind::kSplit:
        for (const Edge& e : n.edges) {
          distance = std::min(distance, total(e.to));
          height = std::min(height, nodes[e.to].height);
          reach = std::max(reach, nodes[e.to].reach);
        }
        break;
      case Node::Kind::kStep:
        if (i == final) break;
        for (const Edge& e : n.edges) {
          reach = std::max(reach, nodes[e.to].reach);
          height = std::min(height, nodes[e.to].height);
          if (!n.counted) {
            distance = std::min(distance, std::min(kNever, 1 + total(e.to)));
          } else if (e.op == Op::kEnough) {
            // The end of the text: `min` characters of a byte each come before it.
            const int64_t d = std::min(kNever, 1 + total(e.to));
            if (d < distance) distance = d, missing = n.min;
          } else if (e.op == Op::kBump) {  // completes a character, whose last byte this is
            const int64_t d = std::min(kNever, 1 + nodes[e.to].distance);
            if (d < distance) distance = d, missing = std::max(0, n.min - 1);
          } else if (e.op == Op::kStay || e.op == Op::kRoom) {
            if (i == e.to || e.op == Op::kRoom) continue;
            const int64_t d = std::min(kNever, 1 + nodes[e.to].distance);
            if (d < distance) distance = d, missing = nodes[e.to].missing;
          }
        }
        break;
    }
    if (distance == n.distance && missing == n.missing && height == n.height && reach == n.reach) continue;
    n.distance = distance;
    n.missing = missing;
    n.height = height;
    n.reach = reach;
    for (int32_t b : before[i])
      if (!queued[b]) {
        queued[b] = 1;
        work.push_back(b);
      }
  }
}

void Automaton::refuse_left_recursion() const {
  // Depth first over what is entered without consuming anything.
  enum : char { kNew, kOpen, kDone };
  std::vector<char> mark(nodes.size(), kNew);
  struct Frame {
    int32_t node;
    size_t next;
  };
  for (int32_t start = 0; start < static_cast<int32_t>(nodes.size()); ++start) {
    if (mark[start] != kNew) continue;
    std::vector<Frame> open = {{start, 0}};
    mark[start] = kOpen;
    while (!open.empty()) {
      Frame& f = open.back();
      const Node& n = nodes[f.node];
      int32_t to = -1;
      if (n.kind == Node::Kind::kSplit && f.next < n.edges.size()) to = n.edges[f.next].to;
      if (n.kind == Node::Kind::kCall && f.next == 0) to = n.entry;
      ++f.next;
      if (to < 0) {
        mark[f.node] = kDone;
        open.pop_back();
      } else if (mark[to] == kOpen) {
        throw_input("a reference leads back to itself with nothing in between");
      } else if (mark[to] == kNew) {
        mark[to] = kOpen;
        open.push_back({to, 0});
      }
    }
  }
}

void Automaton::finish() {
  PERIGEE_CHECK(root >= 0 && final >= 0, "root {} final {}", root, final);
  refuse_left_recursion();
  measure();
  if (nodes[root].distance >= kNever) throw_input("no text satisfies it");
  if (nodes[root].height > kMaxDepth) throw_input("it needs more than {} levels of nesting", kMaxDepth);
  for (const Node& n : nodes)
    if (n.height <= kMaxDepth) tallest = std::max(tallest, n.height);
  // What leads nowhere is never entered.
  for (Node& n : nodes)
    if (n.kind == Node::Kind::kStep || n.kind == Node::Kind::kSplit)
      std::erase_if(n.edges, [&](const Edge& e) { return nodes[e.to].distance >= kNever; });
}

}  // namespace perigee::policy
