// The tokens of a vocabulary as a tree of bytes, for masks of what may come next. Built once per tokenizer.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "policy/tokenizer/tokenizer.h"

namespace perigee::policy {

class GrammarCache;  // policy/grammar/cache.h

// Const after construction, but for caches with locks of their own: any thread may use it. Keeps nothing of the
// tokenizer. Constraints refer to it: it outlives them.
class TokenIndex {
 public:
  // A node of the tree, in preorder: the children of a node follow it, each with all of its own.
  struct Node {
    int32_t token = -1;  // the plain token of these bytes, or -1; others of the same bytes: next_same()
    int32_t skip = 0;    // index of the node after this one's last descendant
    uint16_t depth = 0;  // bytes from the root to here, this node's byte included; 0 at the root only
    uint8_t byte = 0;
  };

  explicit TokenIndex(const Tokenizer& tokenizer);
  ~TokenIndex();
  TokenIndex(const TokenIndex&) = delete;
  TokenIndex& operator=(const TokenIndex&) = delete;

  int64_t vocab_size() const { return vocab_size_; }
  size_t mask_words() const { return static_cast<size_t>((vocab_size_ + 31) / 32); }
  const std::vector<Node>& tree() const { return tree_; }  // [0] is the root, of no bytes
  int32_t next_same(int32_t token) const { return next_same_.empty() ? -1 : next_same_[token]; }
  // Of a plain token; of a special one, "".
  std::string_view bytes(int32_t token) const {
    return std::string_view(pool_).substr(start_[token], start_[token + 1] - start_[token]);
  }
  // REQUIRES one of the names of policy/tokenizer/tokenizer.h.
  int32_t special(std::string_view name) const;
  // The node of these bytes, or -1.
  int32_t find(std::string_view bytes) const;

  int longest_bytes() const { return longest_bytes_; }  // of a token
  int most_openings() const { return most_openings_; }  // '{' and '[' in a token, at most
  // Tokens that hold `"` + inner + `"`.
  const std::vector<int32_t>& quoting(std::string_view inner) const;
  // Tokens with three `"` or more.
  const std::vector<int32_t>& many_quotes() const { return many_quotes_; }

  GrammarCache& cache() const { return *cache_; }

 private:
  void build_tree(std::vector<int32_t> order);

  int64_t vocab_size_;
  std::string pool_;
  std::vector<uint32_t> start_;
  std::vector<Node> tree_;
  std::vector<int32_t> next_same_;  // empty when no two tokens have the same bytes
  std::map<std::string, int32_t, std::less<>> specials_;
  std::unordered_map<std::string, std::vector<int32_t>> quoting_;
  std::vector<int32_t> many_quotes_;
  int longest_bytes_ = 0, most_openings_ = 0;
  std::unique_ptr<GrammarCache> cache_;
};

}  // namespace perigee::policy
