// Everything that reads, for the hub's restart and for inspection.
#include <algorithm>
#include <filesystem>

#include "base/error.h"
#include "storage/columns.h"
#include "storage/row_sum.h"
#include "storage/schema.h"
#include "storage/id_set.h"
#include "storage/store.h"

namespace perigee {
using storage::Database;
using storage::Query;
using storage::ReadScope;

std::string_view state_name(EpisodeState state) {
  constexpr std::string_view names[] = {"open", "leased", "generated", "rewarded", "trained", "dropped"};
  return names[static_cast<int>(state)];
}
std::string_view outcome_name(GroupOutcome outcome) {
  constexpr std::string_view names[] = {"pending", "trained", "dropped"};
  return names[static_cast<int>(outcome)];
}
std::string_view origin_name(GroupOrigin origin) {
  return origin == GroupOrigin::kRun ? "run" : "branch";
}

StoreQueries::StoreQueries(std::unique_ptr<Database> db) : db_(std::move(db)) {}
StoreQueries::~StoreQueries() = default;
void StoreQueries::opened(int64_t schema) {
  sets_ = std::make_unique<storage::SetCache>();
  schema_ = std::min(schema, storage::schema_version());
  storage::register_filter_functions(*db_);
  storage::register_row_sum(*db_);
}
const std::filesystem::path& StoreQueries::file() const {
  return db_->file();
}

StoreReader::StoreReader(const std::filesystem::path& file, const std::string& vfs) : StoreQueries(nullptr) {
  std::error_code ec;
  if (std::filesystem::is_directory(file, ec)) throw_input("{}: is a directory, not a store", file.string());
  if (!std::filesystem::exists(file, ec))
    throw_input("{}: no such store: give the directory of a run", file.string());
  db_ = std::make_unique<Database>(file, Database::Options{.read_only = true, .vfs = vfs});
  const storage::FileKind kind = storage::file_kind(*db_);
  if (kind == storage::FileKind::kForeign)
    throw_input("{}: an SQLite database of another program, not a Perigee store", file.string());
  const int64_t version = db_->pragma("PRAGMA user_version"), known = storage::schema_version();
  if (kind == storage::FileKind::kEmpty || version == 0)
    throw_input("{}: an empty store: its run ended before it began", file.string());
  if (version > known)
    note_ =
        fmt::format("{}: written by a newer Perigee (schema {}, this one knows {}): showing what is known",
                    file.string(), version, known);
  opened(version);
}

namespace {

RunRecord run_row(Query& q) {
  return {.id = q.str(0),
          .created_us = q.int64(1),
          .config = q.str(2),
          .state = q.str(3),
          .parent = q.str(4),
          .code_version = q.str(5)};
}
PolicyVersion version_row(Query& q) {
  return {.version = static_cast<uint32_t>(q.int64(0)),
          .phase = q.str(1),
          .step = q.int64(2),
          .weights_hash = q.str(3),
          .checkpoint = q.str(4),
          .created_us = q.int64(5)};
}

// Without prompt, segments and components. Older schemas lack columns that say what could not happen then.
constexpr std::string_view kEpisodeColumns =
    "SELECT episode_id, group_id, member, seed, max_new_tokens, temperature, sampling, parent_episode, "
    "parent_tokens, state, attempt, finish, segment_count, token_count, reward_bits, reward_failed, ";
std::string episode_columns(int64_t schema) {
  return std::string(kEpisodeColumns) + (schema >= 3 ? "pruned" : "NULL") + " FROM episodes ";
}
EpisodeRecord episode_row(Database& db, Query& q) {
  EpisodeRecord e;
  e.spec.episode_id = q.int64(0);
  e.spec.group_id = q.int64(1);
  e.spec.member = q.int32(2);
  e.spec.seed = static_cast<uint64_t>(q.int64(3));
  e.spec.max_new_tokens = q.int32(4);
  e.spec.temperature = static_cast<float>(q.real(5));
  e.spec.sampling = q.str(6);
  e.spec.parent_episode_id = q.int64(7);
  e.spec.parent_tokens = q.int32(8);
  e.state = storage::state_column(db, q.text(9));
  e.attempt = q.int32(10);
  e.finish = storage::finish_column(db, q.text(11));
  e.segment_count = q.int32(12);
  e.token_count = q.int64(13);
  if (!q.is_null(14)) e.reward = Reward{e.spec.episode_id, q.exact(14), q.int64(15) != 0, {}};
  e.pruned = q.str(16);
  return e;
}

void load_rest(Database& db, EpisodeRecord& e) {
  e.segments = storage::load_segments(db, e.spec.episode_id);
  if (e.pruned.empty() && static_cast<int32_t>(e.segments.size()) != e.segment_count)
    throw_environment("{}: episode {} has {} segments and should have {}: the file was altered",
                      db.file().string(), e.spec.episode_id, e.segments.size(), e.segment_count);
  if (e.reward) e.reward->components = storage::load_components(db, e.spec.episode_id);
}

struct GroupRow {
  GroupRecord group;
  std::vector<int32_t> prompt;
  std::string prompt_text;
};
GroupRow load_group(Database& db, int64_t group_id, int64_t schema) {
  constexpr std::string_view kOld =
      "SELECT step, round, task_index, task, prompt, prompt_text, outcome, reason, created_us, 'run' FROM groups WHERE "
      "group_id = ?";
  constexpr std::string_view kNew =
      "SELECT step, round, task_index, task, prompt, prompt_text, outcome, reason, created_us, origin FROM groups WHERE "
      "group_id = ?";
  Query q = db.query(schema >= 3 ? kNew : kOld);
  q.bind(group_id);
  if (!q.step()) throw_input("{}: no group {}", db.file().string(), group_id);
  GroupRow row;
  row.group = {.group_id = group_id,
               .step = q.int64(0),
               .round = q.int32(1),
               .task_index = q.int64(2),
               .task = q.str(3),
               .outcome = storage::outcome_column(db, q.text(6)),
               .reason = q.str(7),
               .created_us = q.int64(8),
               .origin = storage::origin_column(db, q.text(9))};
  row.prompt = storage::decode_column<int32_t>(db, q.blob(4),
                                               [&] { return fmt::format("group {}, prompt", group_id); });
  row.prompt_text = q.str(5);
  return row;
}
void set_prompt(EpisodeSpec& spec, const GroupRow& row) {
  spec.prompt = row.prompt;
  spec.prompt_text = row.prompt_text;
  spec.task_index = row.group.task_index;
}

GroupWithEpisodes load_group_whole(Database& db, int64_t group_id, int64_t schema) {
  const GroupRow row = load_group(db, group_id, schema);
  GroupWithEpisodes out{row.group, {}};
  {
    Query q = db.query(episode_columns(schema) + "WHERE group_id = ? ORDER BY member");
    q.bind(group_id);
    while (q.step()) out.episodes.push_back(episode_row(db, q));
  }
  for (EpisodeRecord& e : out.episodes) {
    set_prompt(e.spec, row);
    load_rest(db, e);
  }
  return out;
}

}  // namespace

int64_t StoreQueries::run_number(std::string_view run_id) {
  Query q = db_->query("SELECT run FROM runs WHERE id = ?");
  q.bind(run_id);
  if (!q.step()) throw_input("{}: no run \"{}\": `perigee runs` lists them", file().string(), run_id);
  return q.int64(0);
}

bool StoreQueries::has_run(std::string_view run_id) {
  Query q = db_->query("SELECT 1 FROM runs WHERE id = ?");
  return q.bind(run_id).step();
}

std::vector<RunRecord> StoreQueries::runs() {
  Query q = db_->query("SELECT id, created_us, config, state, parent, code_version FROM runs ORDER BY run");
  std::vector<RunRecord> out;
  while (q.step()) out.push_back(run_row(q));
  return out;
}

RunRecord StoreQueries::run(std::string_view run_id) {
  const int64_t run = run_number(run_id);
  Query q = db_->query("SELECT id, created_us, config, state, parent, code_version FROM runs WHERE run = ?");
  q.bind(run).step();
  return run_row(q);
}

EpisodeRecord StoreQueries::episode(int64_t episode_id) {
  ReadScope scope(*db_);
  EpisodeRecord e;
  {
    Query q = db_->query(episode_columns(schema_) + "WHERE episode_id = ?");
    q.bind(episode_id);
    if (!q.step()) throw_input("{}: no episode {}", file().string(), episode_id);
    e = episode_row(*db_, q);
  }
  set_prompt(e.spec, load_group(*db_, e.spec.group_id, schema_));
  load_rest(*db_, e);
  return e;
}

GroupWithEpisodes StoreQueries::group(int64_t group_id) {
  ReadScope scope(*db_);
  return load_group_whole(*db_, group_id, schema_);
}

std::string StoreQueries::run_of_episode(int64_t episode_id) {
  Query q = db_->query(
      "SELECT r.id FROM episodes e JOIN groups g ON g.group_id = e.group_id JOIN runs r ON r.run = g.run "
      "WHERE e.episode_id = ?");
  q.bind(episode_id);
  if (!q.step()) throw_input("{}: no episode {}", file().string(), episode_id);
  return q.str(0);
}

std::vector<StepMetrics> StoreQueries::metrics(std::string_view run_id, std::string_view phase) {
  ReadScope scope(*db_);
  const int64_t run = run_number(run_id);
  Query q = db_->query(
      "SELECT phase, step, name, value_bits FROM step_metrics WHERE run = ?1 AND (?2 = '' OR phase = ?2) "
      "ORDER BY phase <> 'warmup', phase, step, name");
  q.with(run, phase);
  std::vector<StepMetrics> out;
  while (q.step()) {
    if (out.empty() || out.back().phase != q.text(0) || out.back().step != q.int64(1))
      out.push_back({q.str(0), q.int64(1), {}});
    out.back().values.emplace_back(q.str(2), q.exact(3));
  }
  return out;
}

std::vector<Evaluation> StoreQueries::evaluations(std::string_view run_id) {
  ReadScope scope(*db_);
  const int64_t run = run_number(run_id);
  Query q = db_->query(
      "SELECT phase, step, name, version, n, correct, accuracy_bits, detail, created_us FROM evaluations "
      "WHERE run = ? ORDER BY evaluation");
  q.bind(run);
  std::vector<Evaluation> out;
  while (q.step())
    out.push_back({q.str(0), q.int64(1), q.str(2), static_cast<uint32_t>(q.int64(3)), q.int64(4), q.int64(5),
                   q.exact(6), q.str(7), q.int64(8)});
  return out;
}

std::vector<PolicyVersion> StoreQueries::versions(std::string_view run_id) {
  ReadScope scope(*db_);
  const int64_t run = run_number(run_id);
  Query q = db_->query(
      "SELECT version, phase, step, weights_hash, checkpoint, created_us FROM policy_versions WHERE run = ? "
      "ORDER BY version");
  q.bind(run);
  std::vector<PolicyVersion> out;
  while (q.step()) out.push_back(version_row(q));
  return out;
}

std::optional<PolicyVersion> StoreQueries::version(std::string_view run_id, uint32_t version) {
  ReadScope scope(*db_);
  const int64_t run = run_number(run_id);
  Query q = db_->query(
      "SELECT version, phase, step, weights_hash, checkpoint, created_us FROM policy_versions "
      "WHERE run = ? AND version = ?");
  q.with(run, version);
  if (!q.step()) return std::nullopt;
  return version_row(q);
}

std::vector<Checkpoint> StoreQueries::checkpoints(std::string_view run_id) {
  ReadScope scope(*db_);
  const int64_t run = run_number(run_id);
  Query q = db_->query(
      "SELECT version, phase, step, path, weights_hash, optimizer_hash, bytes, created_us FROM checkpoints "
      "WHERE run = ? AND kept = 1 ORDER BY version");
  q.bind(run);
  std::vector<Checkpoint> out;
  while (q.step())
    out.push_back({static_cast<uint32_t>(q.int64(0)), q.str(1), q.int64(2), q.str(3), q.str(4), q.str(5),
                   q.int64(6), q.int64(7)});
  return out;
}

std::vector<std::string> StoreQueries::forgotten_checkpoints(std::string_view run_id) {
  ReadScope scope(*db_);
  const int64_t run = run_number(run_id);
  Query q = db_->query(
      "SELECT path FROM checkpoints c WHERE run = ?1 AND kept = 0 AND NOT EXISTS "
      "(SELECT 1 FROM checkpoints k WHERE k.run = ?1 AND k.path = c.path AND k.kept = 1) ORDER BY version");
  q.bind(run);
  std::vector<std::string> out;
  while (q.step()) out.push_back(q.str(0));
  return out;
}

std::optional<TrainBatch> StoreQueries::train_batch(std::string_view run_id, int64_t step) {
  ReadScope scope(*db_);
  const int64_t run = run_number(run_id);
  TrainBatch batch;
  {
    Query q = db_->query(
        "SELECT version_before, version_after, detail, created_us FROM train_batches WHERE run = ? AND step "
        "= ?");
    q.with(run, step);
    if (!q.step()) return std::nullopt;
    batch = {.step = step,
             .version_before = static_cast<uint32_t>(q.int64(0)),
             .version_after = static_cast<uint32_t>(q.int64(1)),
             .items = {},
             .detail = q.str(2),
             .created_us = q.int64(3)};
  }
  Query q = db_->query(
      "SELECT episode_id, advantage_bits FROM train_items WHERE run = ? AND step = ? ORDER BY position");
  q.with(run, step);
  while (q.step()) batch.items.push_back({q.int64(0), q.exact(1)});
  return batch;
}

std::vector<int64_t> StoreQueries::train_steps(std::string_view run_id) {
  ReadScope scope(*db_);
  const int64_t run = run_number(run_id);
  Query q = db_->query("SELECT step FROM train_batches WHERE run = ? ORDER BY step");
  q.bind(run);
  std::vector<int64_t> out;
  while (q.step()) out.push_back(q.int64(0));
  return out;
}

ResumeState StoreQueries::resume_state(std::string_view run_id) {
  ReadScope scope(*db_);
  const int64_t number = run_number(run_id);
  ResumeState state;
  state.run = run(run_id);
  if (auto all = versions(run_id); !all.empty()) state.last_version = std::move(all.back());
  if (auto all = checkpoints(run_id); !all.empty()) state.last_checkpoint = std::move(all.back());
  if (const auto steps = train_steps(run_id); !steps.empty())
    state.last_batch = train_batch(run_id, steps.back());
  std::vector<int64_t> pending;
  {
    Query q =
        db_->query("SELECT group_id FROM groups WHERE run = ? AND outcome = 'pending' ORDER BY group_id");
    q.bind(number);
    while (q.step()) pending.push_back(q.int64(0));
  }
  for (const int64_t group_id : pending) state.pending.push_back(load_group_whole(*db_, group_id, schema_));
  return state;
}

}  // namespace perigee
