// Runs an automaton on bytes and special tokens: every path at once, each with its own stack.
//
// States are numbered as they are met and their steps remembered, so a walk over a tree of tokens is a table look-up a
// byte. A machine grows with what it has met: compact() starts anew from one state.
#pragma once
#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "policy/grammar/automaton.h"

namespace perigee::policy {

// One path: where it stands, its counter, its stack. Of a kStep node.
struct Config {
  int32_t node = 0, counter = 0, frame = 0;
  auto operator<=>(const Config&) const = default;
};

// Not thread safe. The automaton is finished and outlives it.
class Machine {
 public:
  static constexpr int32_t kDead = -1;
  // Paths that one state keeps. A schema may be so ambiguous that they double with every level of nesting; then those
  // nearest to the end are kept: less may be said, but what is said is valid and can be finished.
  static constexpr size_t kMaxPaths = 512;

  // depth: of nesting above the outermost rule; what was called from there is not known: leaving it is "escaping".
  explicit Machine(const Automaton& automaton, int depth = 0);

  // The state in which `node` of the outermost rule stands next.
  int32_t start(int32_t node, int32_t counter = 0);
  // kDead when no path goes on. REQUIRES state != kDead.
  int32_t step(int32_t state, uint8_t byte) {
    const int32_t known = states_[state].next[byte];
    return known != kUnknown ? known : compute(state, byte);
  }
  int32_t step_special(int32_t state, uint16_t symbol) { return target(state, symbol); }
  // The state after the rule of that frame has ended.
  int32_t after(int32_t frame);

  const std::vector<Config>& configs(int32_t state) const { return states_[state].configs; }
  bool escaped(int32_t state) const { return states_[state].escaped; }  // a path has left the outermost rule
  // Symbols to the end (or the escape) at least; 0 when escaped.
  int64_t distance(int32_t state) const { return states_[state].distance; }
  int64_t distance(const Config& config) const;
  int depth(int32_t frame) const { return frames_[frame].depth; }
  size_t states() const { return states_.size(); }

  // Keys. The set of the object whose key is being written at this frame (of a key's rule), or -1 when not known.
  int32_t key_set(int32_t frame) const {
    const int32_t parent = frames_[frame].parent;
    return parent < 0 ? -1 : frames_[parent].keys;
  }
  const std::vector<int32_t>& keys(int32_t set) const { return sets_[set]; }
  std::string text(int32_t id) const;
  // Of the objects open around this frame, outwards.
  void open_key_sets(int32_t frame, std::vector<int32_t>& sets) const;

  // A machine that has met nothing but `state`, which gets its number in *moved.
  std::unique_ptr<Machine> compact(int32_t state, int32_t* moved) const;

 private:
  static constexpr int32_t kUnknown = -2;
  struct Frame {
    int32_t to = -1, parent = -1, keys = -1,
            depth = 0;     // keys: set of the object that this frame is of, or -1
    int64_t distance = 0;  // from `to`, outwards
  };
  struct State {
    std::vector<Config> configs;
    bool escaped = false;
    int64_t distance = kNever;
    std::array<int32_t, 256> next;
  };
  struct Building {
    std::vector<Config> configs;
    bool escaped = false;
    std::vector<Config> passed;  // what was entered on the way, so that nothing is entered twice
    std::set<Config> passed_more;
    bool pass(const Config& c);  // false: passed before
  };

  int32_t compute(int32_t state, uint8_t byte);
  int32_t target(int32_t state, uint16_t symbol);
  void enter(int32_t node, int32_t counter, int32_t frame, Building& out);
  int32_t intern(Building& b);
  int32_t frame(int32_t to, int32_t parent, int32_t keys, int depth);
  int32_t add_text(std::string_view text);
  int32_t longer_text(int32_t text, uint8_t byte);
  int32_t add_set(std::vector<int32_t> texts);
  int32_t initial_set(int32_t keys);
  int32_t adopt_frame(const Machine& from, int32_t frame);
  bool used(const Config& config) const;

  const Automaton& automaton_;
  int depth_;
  std::vector<Frame> frames_;
  std::map<std::array<int32_t, 3>, int32_t> frame_ids_;
  std::vector<State> states_;
  std::map<std::pair<std::vector<Config>, bool>, int32_t> state_ids_;
  // Texts of keys, as a tree: each is its parent and one byte more. [0] is the empty one.
  std::vector<std::pair<int32_t, uint8_t>> texts_;
  std::unordered_map<uint64_t, int32_t> text_ids_;
  std::vector<std::vector<int32_t>> sets_;
  std::map<std::vector<int32_t>, int32_t> set_ids_;
  std::unordered_map<int32_t, int32_t> initial_sets_;
};

}  // namespace perigee::policy
