#include "agents/session/log.h"

#include <algorithm>

namespace perigee::agents {

void MemoryLog::opened(const SessionInfo& info, std::span<const SessionTurn> turns) {
  const std::lock_guard lock(mutex_);
  PERIGEE_CHECK(sessions_.emplace(info.name, SessionRecord{info, {turns.begin(), turns.end()}}).second,
                "session {} is open", info.name);
}

void MemoryLog::append(std::span<const SessionTurn> turns) {
  const std::lock_guard lock(mutex_);
  for (const SessionTurn& turn : turns) {
    const auto it = sessions_.find(turn.session);
    PERIGEE_CHECK(it != sessions_.end(), "session {} is not open", turn.session);
    PERIGEE_CHECK(turn.segment.index == static_cast<int32_t>(it->second.turns.size()),
                  "turn {} of session {}", turn.segment.index, turn.session);
    it->second.turns.push_back(turn);
  }
}

void MemoryLog::closed(const std::string& name) {
  const std::lock_guard lock(mutex_);
  sessions_.erase(name);
}

void MemoryLog::load(const std::function<void(SessionRecord)>& each) {
  const std::lock_guard lock(mutex_);
  for (const auto& [name, record] : sessions_) each(record);
}

SessionRecord MemoryLog::read(const std::string& name) {
  const std::lock_guard lock(mutex_);
  const auto it = sessions_.find(name);
  PERIGEE_CHECK(it != sessions_.end(), "session {} is not open", name);
  return it->second;
}

bool valid_session_name(std::string_view name) {
  if (name.empty() || name.size() > 128 || name.front() == '.') return false;
  return std::all_of(name.begin(), name.end(), [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '.' ||
           c == '_' || c == '-';
  });
}

}  // namespace perigee::agents
