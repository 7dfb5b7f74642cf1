// Which tokens may follow a place of an automaton, whatever is on the stack: computed once by a walk over the tree of
// tokens, and then put together for a state from its paths.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string_view>
#include <tuple>
#include <vector>

#include "policy/grammar/machine.h"
#include "policy/grammar/token_index.h"

namespace perigee::policy {

// The tokens that may follow one node, of those its rule decides on alone, and the rest of those that leave the rule.
struct LocalMask {
  // Token and how much further from the end it leads, at most.
  struct Rising {
    int32_t token, by;
  };
  // A tree of what follows the end of the rule inside of tokens, in preorder.
  struct TailNode {
    int32_t skip = 0;
    int32_t first_token = 0, last_token = 0;  // in tail_tokens
    uint16_t depth = 0;
    uint8_t byte = 0;
  };
  // Tokens that do not lead further from the end than the node is: as bits where they are many.
  std::vector<uint32_t> bits;
  std::vector<int32_t> tokens;
  std::vector<Rising> rising;
  std::vector<TailNode> tail;  // [0] is the root, of no token; empty when no token leaves the rule
  std::vector<int32_t> tail_tokens;

  size_t bytes() const {
    return bits.size() * 4 + tokens.size() * 4 + rising.size() * 8 + tail.size() * sizeof(TailNode) +
           tail_tokens.size() * 4;
  }
};

// One token that leaves its rule after `at` bytes.
struct Leaving {
  int32_t token;
  int32_t at;
};
void build_tail(const TokenIndex& index, std::vector<Leaving> leaving, LocalMask& mask);

// By a walk over the whole tree. depth: of nesting at the node; counter: of the path.
LocalMask walk_local_mask(const TokenIndex& index, const Automaton& automaton, int32_t node, int32_t counter,
                          int depth);

// The masks of strings, the same in all schemas. Any thread may use it.
class TextMasks {
 public:
  explicit TextMasks(const TokenIndex& index) : index_(index) {}
  std::shared_ptr<const LocalMask> free_text();
  std::shared_ptr<const LocalMask> key_text();
  // Text of which `room` more characters may come, and `missing` more have to.
  std::shared_ptr<const LocalMask> counted_text(int32_t room, int32_t missing);

 private:
  struct Counted {
    int32_t token;
    int32_t characters;
  };
  const LocalMask& free_locked();

  const TokenIndex& index_;
  std::mutex mutex_;
  std::shared_ptr<const LocalMask> free_, key_;
  // Of free text: its tokens and rising ones with the characters they begin, fewest first; those that leave it.
  std::vector<Counted> inside_;
  struct CountedRising {
    LocalMask::Rising rising;
    int32_t characters;
  };
  std::vector<CountedRising> rising_;
  struct CountedLeaving {
    Leaving leaving;
    int32_t characters;
  };
  std::vector<CountedLeaving> leaving_;
  int32_t most_characters_ = 0;
  std::map<std::pair<int32_t, int32_t>, std::shared_ptr<const LocalMask>> counted_;
};

// Of one automaton, as they are asked for. Any thread may use it.
class NodeMasks {
 public:
  NodeMasks(const TokenIndex& index, TextMasks& texts, const Automaton& automaton)
      : index_(index), texts_(texts), automaton_(automaton) {}
  // Of a path at this depth of nesting.
  std::shared_ptr<const LocalMask> get(const Config& config, int depth);

 private:
  const TokenIndex& index_;
  TextMasks& texts_;
  const Automaton& automaton_;
  std::mutex mutex_;
  std::map<std::tuple<int32_t, int32_t, int32_t>, std::shared_ptr<const LocalMask>> masks_;
  size_t held_bytes_ = 0;
};

}  // namespace perigee::policy
