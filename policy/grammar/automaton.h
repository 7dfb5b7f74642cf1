// A pushdown automaton over bytes and special tokens: what a schema compiles to.
//
// Rules are entered by calls and left by pops; the stack of what to return to is the nesting of the text. A machine
// (machine.h) runs all of its paths at once.
#pragma once
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

namespace perigee::policy {

// Limits on what may be compiled.
inline constexpr int64_t kMaxSchemaBytes = 1 << 20;
inline constexpr int32_t kMaxNodes = 200'000;
inline constexpr int kMaxDepth = 64;  // of objects and arrays in the text
inline constexpr int64_t kNever = std::numeric_limits<int64_t>::max() / 4;  // distance when there is no end

// Symbols below 256 are bytes; 256 + i is special token i of Automaton::specials.
inline constexpr int kFirstSpecial = 256;

// What a step along an edge does to the counter of a path (Config::aux), and asks of it.
enum class Op : uint8_t {
  kPlain,     // counter = 0
  kStay,      // counter stays
  kRoom,      // asks counter < max
  kRoomBump,  // asks counter < max; counter + 1
  kBump,      // counter + 1
  kEnough,    // asks counter >= min; counter = 0
  // Inside the rule of a key, called from the rule of its object:
  kKeyStart,  // counter = the empty text
  kKeyByte,   // counter = the text with the byte added
  kKeyEnd,    // asks that the object has no such key yet; adds it; counter = 0
};

struct Edge {
  uint16_t low = 0, high = 0;  // symbols
  Op op = Op::kPlain;
  int32_t to = -1;
};

struct Node {
  enum class Kind : uint8_t {
    kStep,   // consumes a symbol along an edge
    kSplit,  // goes on at the targets of all edges
    kCall,   // enters `entry`, to return to `to`
    kPop,    // returns
  };
  // Masks of nodes of these roles are shared by all schemas.
  enum class Role : uint8_t { kNone, kFreeText, kCountedText, kKeyText };
  Kind kind = Kind::kStep;
  Role role = Role::kNone;
  bool nests = false;  // kCall: a level of nesting
  int32_t entry = -1, to = -1;
  int32_t keys = -1;         // kCall: index in key_sets, for an object whose keys have to differ; or -1
  bool in_key = false;       // inside the text of a key
  bool counted = false;      // of a text whose characters are counted:
  int32_t min = 0, max = 0;  // how many it has
  std::vector<Edge> edges;

  // Set by Automaton::finish. Of the way to the rule's end:
  int64_t distance = kNever;  // symbols at least, with counter = 0 and without `missing`
  int32_t missing = 0;        // counted text: characters that are still asked for at counter = 0
  int32_t height = 0;         // levels of nesting that cannot be avoided
  int32_t reach = 0;          // levels of nesting possible, at most kMaxDepth + 1
};

class Automaton {
 public:
  std::vector<Node> nodes;
  std::vector<std::vector<std::string>>
      key_sets;                   // keys an object has from the start (declared ones), as spelled
  std::vector<int32_t> specials;  // token ids of symbols 256, 257, ...
  int32_t root = -1;
  int32_t final = -1;  // the text is complete here

  // Each throws Error(kInput) beyond kMaxNodes.
  int32_t add(Node node);
  int32_t step(uint16_t low, uint16_t high, int32_t to, Op op = Op::kPlain);
  int32_t literal(std::string_view bytes, int32_t to);
  int32_t split(std::vector<int32_t> targets);
  int32_t pop();
  int32_t call(int32_t entry, int32_t to, bool nests = false, int32_t keys = -1);
  void edge(int32_t from, uint16_t low, uint16_t high, int32_t to, Op op = Op::kPlain);
  void branch(int32_t from, int32_t to) { nodes[from].edges.push_back({0, 0, Op::kPlain, to}); }
  // At most one space, then `to`.
  int32_t maybe_space(int32_t to);

  int32_t tallest = 0;  // set by finish: the largest height of a node that can be reached

  // Computes what nodes say of the way ahead; to be called once, when all is built. ERRORS (input), one line: nothing
  // reaches the end; more than kMaxDepth levels are needed; a rule enters itself before any byte.
  void finish();

 private:
  void measure();
  void refuse_left_recursion() const;
  int32_t pop_ = -1;
};

}  // namespace perigee::policy
