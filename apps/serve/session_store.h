// Sessions in a store (storage/store.h): each is recorded like a rollout, and is there again at the next start.
//
// A run of the store holds them (config {"kind":"session", "model":directory}); a session is a group of one episode:
//   task      {"session":name, "parent":.., "parent_tokens":.., "meta":{..}}
//   prompt    the first turn's tokens before the first sampled one; a session without turns has none and its own group,
//             which is dropped ("begun") for the real one with its first turn
//   segments  one for each turn, in order: fed tokens with mask 0, then sampled ones. Its first tool event is named
//             "perigee.turn": its input says how the turn was drawn ({"seed":.., "finish":.., "sampling":{..}}); the calls
//             of the turn follow.
//   attempt   one more for each start of the program that goes on with it
// A closed session ends with an empty segment that has a finish.
#pragma once
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <string>

#include "agents/session/log.h"
#include "storage/store.h"

namespace perigee {

class SessionStore : public agents::SessionLog {
 public:
  // Opens or makes the store, and the run in it.
  // ERRORS  those of Store; an I/O error while writing is LogBroken.
  // model: the directory of the model that generates; what reads the store finds the tokenizer there.
  explicit SessionStore(const std::filesystem::path& file, std::string run = "sessions",
                        const StoreOptions& options = {}, const std::string& model = {});

  void opened(const agents::SessionInfo& info, std::span<const agents::SessionTurn> turns) override;
  void append(std::span<const agents::SessionTurn> turns) override;
  void closed(const std::string& name) override;
  void load(const std::function<void(agents::SessionRecord)>& each) override;
  agents::SessionRecord read(const std::string& name) override;

  // Of an open session; 0: it has no turn yet.
  int64_t episode_of(const std::string& name) const;
  StoreQueries& queries() { return store_; }

 private:
  struct Open {
    agents::SessionInfo info;
    int64_t group_id = 0, episode_id = 0;
    int32_t attempt = 0;  // 0: none begun by this program
    int32_t turns = 0;
  };
  // f within a transaction that is committed; nothing is changed when it throws.
  template <class F>
  void commit(const F& f);
  void open_group(Open& s, std::vector<int32_t> prompt, const agents::SessionTurn* first);
  void append_turn(Open& s, const agents::SessionTurn& turn);
  agents::SessionRecord record_of(const Open& s);

  Store store_;
  std::string run_;
  std::map<std::string, Open> open_;
  int64_t commits_ = 0;
};

}  // namespace perigee
