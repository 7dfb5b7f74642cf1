#include "policy/grammar/cache.h"

namespace perigee::policy {

std::shared_ptr<CompiledGrammar> GrammarCache::get(const std::string& key,
                                                   const std::function<void(Automaton&)>& build) {
  {
    const std::lock_guard lock(mutex_);
    if (const auto it = by_key_.find(key); it != by_key_.end()) {
      entries_.splice(entries_.begin(), entries_, it->second);
      return it->second->second;
    }
  }
  auto made = std::make_shared<CompiledGrammar>();
  build(made->automaton);
  made->automaton.finish();
  made->masks = std::make_unique<NodeMasks>(index_, texts_, made->automaton);
  const std::lock_guard lock(mutex_);
  if (const auto it = by_key_.find(key); it != by_key_.end())
    return it->second->second;  // made twice at once
  entries_.emplace_front(key, made);
  by_key_[key] = entries_.begin();
  held_nodes_ += static_cast<int64_t>(made->automaton.nodes.size());
  while (entries_.size() > kMaxGrammars || (held_nodes_ > kMaxHeldNodes && entries_.size() > 1)) {
    held_nodes_ -= static_cast<int64_t>(entries_.back().second->automaton.nodes.size());
    by_key_.erase(entries_.back().first);
    entries_.pop_back();
  }
  return made;
}

}  // namespace perigee::policy
