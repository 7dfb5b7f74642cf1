// The store of a run: one SQLite file (RUN/store.sqlite) that keeps every rollout so that it can be read and
// generated again, bit for bit.
// Format: docs/formats/store.md. Why one writer: docs/decisions/0001-one-sqlite-writer.md.
//
// Invariants:
//  S1  What commit() returned from is on the disk: a kill or a power cut does not take it back, and does not
//      tear it.
//  S2  A commit that throws is not to be acknowledged. It took effect wholly or not at all.
//  S3  One Store per file at a time, in one process (held by a lock file beside it): all writes and all
//      checkpoints of the write-ahead log go through its one connection. Readers are read-only and never
//      checkpoint.
//  S4  A segment is there once: (episode, index) is unique, indices have no gap (E1), and nothing follows a
//      finish.
//  S5  Floats come back with the bits they went in with, NaN and -0 included.
//
// Thread safety: none; a Store or StoreReader belongs to one thread at a time. A StoreReader sees, per call,
// one committed state, and may live in another thread or process than the Store.
//
// ERRORS  Error::kInput        an unknown run, group or episode; a file that is not a store; a newer store
//         Error::kEnvironment  disk full, I/O error, a damaged file or blob: names the file and the place
#pragma once
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/episode.h"
#include "storage/records.h"

namespace perigee {

namespace storage {
class Database;
class FileLock;
class SetCache;
}  // namespace storage

// What became of something that a worker sent. Only kAppended changes the store; kDuplicate may be
// acknowledged like it (the first copy is there); the others are refused and counted.
enum class Append : uint8_t {
  kAppended,
  kDuplicate,  // already present, the same bytes
  kStale,      // from an attempt superseded or given back, or for an episode finished with or dropped
  kGap,        // a predecessor is missing: index too high, or a reward before the finish
  kConflict,   // contradicts what is present: other bytes under the same name, an attempt never begun
};
std::string_view append_name(Append);

struct AppendCounts {
  int64_t appended = 0, duplicate = 0, stale = 0, gap = 0, conflict = 0;
};

struct StoreOptions {
  enum class Open : uint8_t { kOpenOrCreate, kCreate, kExisting };
  Open open = Open::kOpenOrCreate;
  bool quick_check = true;  // look for damage when opening an existing file (reads all of it)
  int busy_timeout_ms = 5000;
  int cache_mib = 0;  // of pages kept in memory; 0: as SQLite does (2 MiB)
  std::string vfs;    // name of a registered SQLite VFS; empty: the default
};

// Everything that reads. Store adds writing to it, StoreReader opens a file for it alone.
class StoreQueries {
 public:
  virtual ~StoreQueries();
  StoreQueries(const StoreQueries&) = delete;
  StoreQueries& operator=(const StoreQueries&) = delete;

  const std::filesystem::path& file() const;
  // A line for the user when the file is not quite what this program expects (a reader of a newer store), or
  // empty.
  const std::string& note() const { return note_; }

  std::vector<RunRecord> runs();  // by creation
  RunRecord run(std::string_view run_id);
  bool has_run(std::string_view run_id);

  // What is quick: EpisodeFilter. ERRORS (input): a filter that does not parse, a cursor of another order, an unknown run.
  std::vector<EpisodeRow> episodes(const EpisodeFilter&);
  // The same, a page at a time. look_at_most: rows whose texts are read at most (filter.contains, keep); < 0: no bound.
  // keep: asked for each row that the filter leaves; those for which it is false are left out. It may ask this object for
  // episodes and groups.
  EpisodePage page(const EpisodeFilter&, int64_t look_at_most = -1,
                   const std::function<bool(const EpisodeRow&)>& keep = {});
  // Stops at at_most; < 0: no bound. limit, offset and after are ignored.
  int64_t count_episodes(const EpisodeFilter&, int64_t at_most = -1);
  // Whether the text stands in the episode's prompt text or in the input or output of one of its tools: what
  // EpisodeFilter::contains asks.
  bool mentions(int64_t episode_id, std::string_view text);
  // Whole, with segments and reward. Damaged blobs: kEnvironment, naming episode, segment and column.
  EpisodeRecord episode(int64_t episode_id);
  GroupWithEpisodes group(int64_t group_id);  // likewise for all its members
  std::string run_of_episode(int64_t episode_id);

  // Warm-up first, then by phase and step. phase "": every phase.
  std::vector<StepMetrics> metrics(std::string_view run_id, std::string_view phase = {});
  std::vector<Evaluation> evaluations(std::string_view run_id);  // in the order recorded
  std::vector<PolicyVersion> versions(std::string_view run_id);  // by version
  std::optional<PolicyVersion> version(std::string_view run_id, uint32_t version);
  std::vector<Checkpoint> checkpoints(std::string_view run_id);  // kept ones, by version
  std::vector<std::string> forgotten_checkpoints(std::string_view run_id);  // paths: those whose files may go
  std::optional<TrainBatch> train_batch(std::string_view run_id, int64_t step);
  std::vector<int64_t> train_steps(std::string_view run_id);  // ascending

  ResumeState resume_state(std::string_view run_id);

  // Looks for damage: SQLite's integrity and foreign keys, every blob's checksum, S4. One line per finding,
  // at most limit; empty when sound.
  std::vector<std::string> check(int limit = 100);

 protected:
  explicit StoreQueries(std::unique_ptr<storage::Database> db);
  // After opening; schema: of the file.
  void opened(int64_t schema);
  int64_t run_number(std::string_view run_id);
  std::optional<int64_t> filtered_run(const EpisodeFilter&);
  bool tools_mention(int64_t episode_id, std::string_view text);
  std::unique_ptr<storage::Database> db_;
  std::unique_ptr<storage::SetCache> sets_;  // of filters
  int64_t schema_ = 0;  // of the file, or the newest that this program knows
  std::string note_;
};

// Read-only, from any process, while a Store writes or not. Modifies nothing.
class StoreReader : public StoreQueries {
 public:
  explicit StoreReader(const std::filesystem::path& file, const std::string& vfs = {});
};

class Store : public StoreQueries {
 public:
  // Opens for writing and brings an older schema up to date (in one transaction).
  explicit Store(const std::filesystem::path& file, const StoreOptions& options = {});
  ~Store() override;

  // Groups writes into one durable commit. One at a time; moved-from and committed ones do nothing at
  // destruction, others roll back. Everything below REQUIRES one to be active. When a write throws, the
  // transaction is lost: let it go out of scope, and acknowledge nothing of it.
  class Transaction {
   public:
    Transaction(Transaction&& other) noexcept : store_(std::exchange(other.store_, nullptr)) {}
    Transaction& operator=(Transaction&&) = delete;
    ~Transaction();
    void commit();  // S1, S2
    void rollback();

   private:
    friend class Store;
    explicit Transaction(Store* store) : store_(store) {}
    Store* store_;
  };
  Transaction begin();

  void create_run(const RunRecord&);  // kInput when the id exists
  void set_run_state(std::string_view run_id, std::string_view state);

  // Opens a group with its members. Ids that are 0 are given (ascending) and written back into the
  // arguments, as are group_id, member (its position) and task_index of each spec.
  // REQUIRES all members to have the same prompt.
  void open_group(std::string_view run_id, GroupRecord& group, std::span<EpisodeSpec> members);
  // The same for a group that is no part of training: origin kBranch, outcome kDropped, reason "branch". Its episodes go on
  // as others do (begin_attempt, append_segment, record_reward) and end generated or rewarded; record_batch refuses them.
  // REQUIRES of each member a parent_episode_id of this run, parent_tokens (base/episode.h) whose tokens end the prompt, and
  // group_id and episode ids of 0.
  void open_branch(std::string_view run_id, GroupRecord& group, std::span<EpisodeSpec> members);
  // open or leased -> leased; returns the new attempt, 1 higher than the last. Committed segments stay and
  // are gone on from. nullopt when the episode is past generating (finished or dropped).
  std::optional<int32_t> begin_attempt(int64_t episode_id);
  // leased -> open: what this attempt still sends is stale from here on. Nothing when not leased.
  void release_attempt(int64_t episode_id);

  // Judged in this order:
  //  kDuplicate  of what is there
  //  kConflict   an attempt that was never begun;  kStale  one that was superseded
  //  kConflict   other bytes under the same index
  //  kStale      an episode that is not leased
  //  kGap        an index too high
  // A finish moves the episode to generated.
  // REQUIRES E2 and E3 of the segment (PERIGEE_CHECK): the hub checks what comes off the wire.
  Append append_segment(const Segment&);
  // generated -> rewarded.
  Append record_reward(const Reward&);
  // Closes a pending group and with kDropped its episodes. kTrained is set by record_batch.
  void drop_group(int64_t group_id, std::string_view reason);

  // Keeps what a step trains on, and marks the episodes and their groups trained. The same step again with
  // the same content is a duplicate, with other content a conflict. kGap when an episode has no reward.
  Append record_batch(std::string_view run_id, const TrainBatch&);
  // The same version again with another hash is a conflict: two runs of the same steps differed.
  Append record_version(std::string_view run_id, const PolicyVersion&);
  // The next three replace what is there under the same key, since a step that is run again reports again.
  void record_metrics(std::string_view run_id, std::string_view phase, int64_t step, const Metrics&);
  void record_evaluation(std::string_view run_id, const Evaluation&);
  void record_checkpoint(std::string_view run_id, const Checkpoint&);
  // Its files are gone; the row stays, marked.
  void forget_checkpoint(std::string_view run_id, uint32_t version);

  // Gives up the tokens and tool calls of episodes that no later step needs: of steps up to `through_step` (in no batch of a
  // later one), dropped or, unless dropped_only, trained. Their rows stay with their rewards and counts, and say the reason
  // (EpisodeRecord::pruned). At most at_most episodes, the oldest first; returns how many. Branches are left alone.
  int64_t prune_tokens(std::string_view run_id, int64_t through_step, bool dropped_only, std::string_view reason,
                       int64_t at_most);

  const AppendCounts& append_counts() const { return counts_; }  // of this object, committed or not
  // Moves the write-ahead log into the main file, as far as readers allow. Not within a transaction.
  void checkpoint_log();
  // Writes the file anew without free space (storage/care.h). Not within a transaction.
  void compact();

 private:
  struct EpisodeHead;
  class Write;
  void open_group(std::string_view run_id, GroupRecord& group, std::span<EpisodeSpec> members, GroupOrigin origin);
  EpisodeHead head(int64_t episode_id);
  Append counted(Append);
  // Sums rows anew (storage/row_sum.h) whose columns were set.
  template <class... A>
  void seal(std::string_view table, std::string_view where, const A&... values);
  void end_transaction(bool commit);

  std::unique_ptr<storage::FileLock> lock_;
  bool in_transaction_ = false;
  bool lost_ = false;  // a write threw half-way: the transaction must not be committed
  AppendCounts counts_;
};

// UTC, microseconds since 1970.
int64_t unix_time_us();
std::string_view state_name(EpisodeState);
std::string_view outcome_name(GroupOutcome);
std::string_view origin_name(GroupOrigin);

}  // namespace perigee
