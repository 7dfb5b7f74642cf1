// What an engine keeps of its sequences. Private to policy/engine: engine.cpp (requests come and go), hold.cpp (held
// sequences), batch.cpp (a step).
#pragma once
#include <deque>
#include <list>
#include <memory>
#include <span>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "policy/engine/backend.h"
#include "policy/engine/engine.h"
#include "policy/engine/prefix_cache.h"

namespace perigee::policy {

// A prompt that several members share. Lives until the last of them has ended: they share its full latent
// blocks.
struct Group {
  std::vector<int32_t> prompt;
  std::vector<int32_t> stop_tokens;
  std::deque<GenerationRequest> waiting;  // members without a state of their own yet
  SequenceState state;                    // of the prompt, while members wait for it
  // After the prompt's last token, kept by the backend; null until it is prefilled.
  std::shared_ptr<const float> logits;
  int64_t alive = 0;     // members, waiting ones included
  int64_t reserved = 0;  // bytes held for the prompt
  int64_t cached = 0;    // tokens of the prompt that were not computed for it
  bool admitted = false;
  bool scored = false;  // log-probabilities of the prompt's tokens are wanted, at this temperature
  float inv_temperature = 1;
  std::vector<float> logprobs;  // [prompt] once prefilled
};

// A sequence with a state of its own.
struct Member {
  enum class Place : uint8_t { kRunning, kResuming, kHeld };

  uint64_t id = 0, seed = 0;
  kernels::SamplingParams sampling;
  std::vector<int32_t> stop_tokens;
  std::shared_ptr<TokenConstraint> constraint;
  int top_logprobs = 0;
  bool hold = false;      // at kStop
  bool restored = false;  // hold always, and memory is set aside for what it has, not for what it may come to
  std::shared_ptr<Group> group;  // null: restored

  SequenceState state;
  std::vector<int32_t> tokens;  // all that are known: the first prompt, fed, sampled
  int64_t prompt_tokens = 0;    // of them, the first prompt; < 0: the next extension says
  int64_t reserved = 0;         // bytes
  Place place = Place::kRunning;
  std::list<Member>::iterator self;

  // The stretch since it was submitted or extended last.
  int64_t first_sampled = 0;   // tokens before it were given, those from it on sampled
  int64_t most = 0;            // tokens in all at kLength
  int64_t no_stop_before = 0;  // tokens in all
  int64_t report_from = 0;     // tokens from it to first_sampled are reported with the first sampled one
  bool scored = false;         // with their log-probabilities
  std::vector<uint32_t> fed_versions;  // [first_sampled - report_from]
  std::vector<float> fed_logprobs;     // likewise, when scored
  int64_t cached = 0;

  // Every position was computed by the weights of now.
  bool pure = false;
  // Nothing was sampled yet from what was computed since the beginning: when weights change it starts over, from
  // `start` or from nothing.
  bool restarts = false;
  std::shared_ptr<const Snapshot> start;

  int64_t length() const { return static_cast<int64_t>(tokens.size()); }
  // Tokens known but not yet computed; a member is decoding when there is exactly one.
  int64_t pending() const { return length() - state.position(); }
  bool sampled_any() const { return length() > first_sampled; }
};

struct Engine::Impl {
  std::unique_ptr<Backend> backend;
  const ParamLayout& layout;
  EngineConfig config;
  StatePool& pool;
  bool has_weights = false;
  uint32_t version = 0;

  std::deque<std::shared_ptr<Group>> groups;  // with waiting members, in order of arrival
  std::list<Member> running;                  // in order of admission
  std::list<Member> resuming;  // extended, for want of a place not running yet; they go before groups
  std::list<Member> held;
  std::unordered_map<uint64_t, Member*> members;  // of the three lists
  std::unordered_set<uint64_t> ids;               // of unfinished requests, held ones included
  PrefixCache cache;
  bool blocked_on_memory = false;
  EngineStats counters;

  // The batch of the step in flight.
  struct Row {
    Member* member = nullptr;  // either a member ...
    Group* group = nullptr;    // ... or a prompt
    int64_t count = 0;
    bool last = false;  // its last row's logits are wanted
  };
  std::vector<Row> rows;
  std::vector<int32_t> tokens;
  std::vector<SequenceSlice> slices;
  std::vector<uint8_t> wanted;
  std::vector<Backend::Score> scores;
  std::vector<float*> score_to;  // where each goes
  struct Draw {
    Member* member;
    std::shared_ptr<const float> kept;  // a prompt's logits, or null:
    const float* logits;
  };
  std::vector<Draw> draws;
  std::vector<Backend::Draw> drawn;
  std::vector<std::vector<uint32_t>> masks;  // of the draws that have one of their own

  Impl(std::unique_ptr<Backend> b, const ParamLayout& l, const EngineConfig& e)
      : backend(std::move(b)),
        layout(l),
        config(e),
        pool(backend->pool()),
        cache(pool, std::min(e.prefix_cache_bytes, e.memory_bytes)) {}

  int64_t vocab() const { return layout.config().vocab_size; }

  // engine.cpp: requests.
  void check(const GenerationGroup& g) const;
  void check_tokens(std::span<const int32_t> tokens, const char* what) const;
  void check_length(int64_t tokens, int64_t bytes) const;
  int64_t member_bytes(const Group& g, const GenerationRequest& r) const;
  int64_t prompt_bytes(const Group& g) const { return pool.bytes_for(static_cast<int64_t>(g.prompt.size())); }
  // Sets the bytes aside, giving up cached prefixes for them; false when there is no room.
  bool reserve(int64_t bytes);
  void finish(Member& m, bool keep_prefix);
  void leave_group(const std::shared_ptr<Group>& g);
  void drop_if_done(const std::shared_ptr<Group>& g);
  void release_prompt(Group& g);
  std::shared_ptr<Group> restart(Group& g);

  // hold.cpp: held sequences.
  std::list<Member>& list_of(Member::Place place);
  void move_to(Member& m, Member::Place place);
  Member& add(Member m, Member::Place place);
  void hold(Member& m);
  void end_stretch(Member& m, FinishReason finish);
  void start_over(Member& m);
  const Member& held_member(uint64_t id) const;

  // batch.cpp: a step.
  void admit();
  void start_members(Group& g);
  void gather();
  int64_t slice_end(int64_t position, int64_t count, bool leaves) const;
  void add_rows(SequenceState& state, std::span<const int32_t> known, int64_t count, const Row& row);
  void add_scores(int64_t first_row, int64_t position, std::span<const int32_t> known, int64_t from,
                  int64_t end, float inv_temperature, float* out, int64_t count);
  void compute();
  void advance(Member& m, int64_t count);
  void leave_prefix(std::span<const int32_t> known, const SequenceState& state);
  void ask(const Draw& d);
  void draw(std::vector<GeneratedToken>& out);
  void report_fed(Member& m, std::vector<GeneratedToken>& out);
};

}  // namespace perigee::policy
