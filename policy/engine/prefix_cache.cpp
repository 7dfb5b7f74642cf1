#include "policy/engine/prefix_cache.h"

#include <algorithm>

#include "base/hash.h"

namespace perigee::policy {

uint64_t PrefixCache::hash(std::span<const int32_t> tokens) {
  return hash128(tokens).low;
}

const PrefixCache::Entries::iterator* PrefixCache::lookup(std::span<const int32_t> tokens,
                                                          uint64_t key) const {
  const auto length = by_length_.find(static_cast<int64_t>(tokens.size()));
  if (length == by_length_.end()) return nullptr;
  const auto it = length->second.find(key);
  // The hash finds damage, not intent: only the tokens themselves say that it is this prefix.
  if (it == length->second.end() || !std::ranges::equal(it->second->tokens, tokens)) return nullptr;
  return &it->second;
}

SequenceState PrefixCache::find(std::span<const int32_t> tokens, int64_t most) {
  Hasher hasher;
  int64_t hashed = 0;
  const Entries::iterator* best = nullptr;
  for (const auto& [length, by_key] : by_length_) {
    if (length > most) break;
    hasher.update(tokens.data() + hashed, static_cast<size_t>(length - hashed) * sizeof(int32_t));
    hashed = length;
    const auto* found = lookup(tokens.first(static_cast<size_t>(length)), hasher.digest().low);
    if (found != nullptr) best = found;
  }
  if (best == nullptr) return {};
  entries_.splice(entries_.begin(), entries_, *best);
  return (*best)->state.fork();
}

int64_t PrefixCache::bytes_of(const SequenceState& state) const {
  int64_t bytes = pool_.layout().recurrent_bytes();
  for (std::byte* page : state.pages())
    if (!pages_.contains(page)) bytes += pool_.layout().block_bytes();
  return bytes;
}

void PrefixCache::put(std::span<const int32_t> tokens, SequenceState state) {
  PERIGEE_CHECK(state.position() == static_cast<int64_t>(tokens.size()), "{} tokens, a state of {}",
                tokens.size(), state.position());
  if (!on() || tokens.empty()) return;
  const uint64_t key = hash(tokens);
  if (const auto* known = lookup(tokens, key)) {
    entries_.splice(entries_.begin(), entries_, *known);
    return;
  }
  while (entries() >= kMostEntries || bytes_ + bytes_of(state) > budget_bytes_ ||
         !pool_.reserve(bytes_of(state)))
    if (!evict()) return;
  bytes_ += bytes_of(state);
  for (std::byte* page : state.pages()) ++pages_[page];
  entries_.push_front({{tokens.begin(), tokens.end()}, key, std::move(state)});
  // A collision of hashes: the later one stays.
  auto& slot = by_length_[static_cast<int64_t>(tokens.size())];
  if (const auto it = slot.find(key); it != slot.end()) drop(it->second);
  by_length_[static_cast<int64_t>(tokens.size())][key] = entries_.begin();
}

void PrefixCache::drop(Entries::iterator it) {
  int64_t freed = pool_.layout().recurrent_bytes();
  for (std::byte* page : it->state.pages()) {
    const auto held = pages_.find(page);
    if (--held->second > 0) continue;
    pages_.erase(held);
    freed += pool_.layout().block_bytes();
  }
  const auto length = by_length_.find(static_cast<int64_t>(it->tokens.size()));
  length->second.erase(it->key);
  if (length->second.empty()) by_length_.erase(length);
  entries_.erase(it);
  bytes_ -= freed;
  pool_.unreserve(freed);
}

bool PrefixCache::evict() {
  if (entries_.empty()) return false;
  drop(std::prev(entries_.end()));
  ++evictions_;
  return true;
}

void PrefixCache::clear() {
  while (!entries_.empty()) drop(std::prev(entries_.end()));
}

}  // namespace perigee::policy
