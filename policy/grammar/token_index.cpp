#include "policy/grammar/token_index.h"

#include <algorithm>
#include <numeric>

#include "base/error.h"
#include "policy/grammar/cache.h"

namespace perigee::policy {

TokenIndex::TokenIndex(const Tokenizer& tokenizer)
    : vocab_size_(tokenizer.vocab_size()), specials_(tokenizer.specials()) {
  std::vector<int32_t> order;
  start_.reserve(static_cast<size_t>(vocab_size_) + 1);
  for (int32_t t = 0; t < vocab_size_; ++t) {
    start_.push_back(static_cast<uint32_t>(pool_.size()));
    if (tokenizer.is_special(t)) continue;
    const std::string bytes = tokenizer.token(t);
    PERIGEE_CHECK(bytes.size() < 65536, "token {} has {} bytes", t, bytes.size());
    if (bytes.empty()) continue;
    pool_ += bytes;
    order.push_back(t);
    longest_bytes_ = std::max(longest_bytes_, static_cast<int>(bytes.size()));
    int openings = 0;
    std::vector<size_t> quotes;
    for (size_t i = 0; i < bytes.size(); ++i) {
      openings += bytes[i] == '{' || bytes[i] == '[';
      if (bytes[i] == '"') quotes.push_back(i);
    }
    most_openings_ = std::max(most_openings_, openings);
    if (quotes.size() >= 3) many_quotes_.push_back(t);
    for (size_t i = 0; i < quotes.size() && quotes.size() <= 8; ++i)
      for (size_t j = i + 1; j < quotes.size(); ++j) {
        auto& list = quoting_[bytes.substr(quotes[i] + 1, quotes[j] - quotes[i] - 1)];
        if (list.empty() || list.back() != t) list.push_back(t);
      }
  }
  start_.push_back(static_cast<uint32_t>(pool_.size()));
  build_tree(std::move(order));
  cache_ = std::make_unique<GrammarCache>(*this);
}

TokenIndex::~TokenIndex() = default;

void TokenIndex::build_tree(std::vector<int32_t> order) {
  std::sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    const int c = bytes(a).compare(bytes(b));
    return c != 0 ? c < 0 : a < b;
  });
  tree_.emplace_back();
  std::vector<int32_t> path = {0};  // nodes from the root to the last token
  std::string_view last;
  const auto close = [&](size_t depth) {  // nodes deeper than depth end here
    while (path.size() > depth + 1) {
      tree_[path.back()].skip = static_cast<int32_t>(tree_.size());
      path.pop_back();
    }
  };
  for (int32_t t : order) {
    const std::string_view b = bytes(t);
    const auto [x, y] = std::mismatch(last.begin(), last.end(), b.begin(), b.end());
    const auto common = static_cast<size_t>(x - last.begin());
    close(common);
    for (size_t i = common; i < b.size(); ++i) {
      path.push_back(static_cast<int32_t>(tree_.size()));
      tree_.push_back({-1, 0, static_cast<uint16_t>(i + 1), static_cast<uint8_t>(b[i])});
    }
    int32_t& here = tree_[path.back()].token;
    if (here >= 0) {
      if (next_same_.empty()) next_same_.assign(static_cast<size_t>(vocab_size_), -1);
      next_same_[t] = here;
    }
    here = t;
    last = b;
  }
  close(0);
  tree_[0].skip = static_cast<int32_t>(tree_.size());
}

int32_t TokenIndex::special(std::string_view name) const {
  const auto it = specials_.find(name);
  PERIGEE_CHECK(it != specials_.end(), "no special token {}", name);
  return it->second;
}

int32_t TokenIndex::find(std::string_view bytes) const {
  int32_t at = 0;
  for (char c : bytes) {
    int32_t child = at + 1;
    const int32_t end = tree_[at].skip;
    while (child < end && tree_[child].byte != static_cast<uint8_t>(c)) child = tree_[child].skip;
    if (child >= end) return -1;
    at = child;
  }
  return at;
}

const std::vector<int32_t>& TokenIndex::quoting(std::string_view inner) const {
  static const std::vector<int32_t> none;
  const auto it = quoting_.find(std::string(inner));
  return it == quoting_.end() ? none : it->second;
}

}  // namespace perigee::policy
