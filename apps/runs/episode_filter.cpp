#include "apps/runs/episode_filter.h"

#include <algorithm>

#include "apps/runs/episode_json.h"
#include "base/error.h"
#include "base/text.h"

namespace perigee::apps {
namespace {

constexpr int64_t kPageRows = 256;

template <class Value>
Value named(const std::string& option, const std::string& name, Value last, std::string_view (*name_of)(Value)) {
  std::vector<std::string> names;
  for (int i = 0; i <= static_cast<int>(last); ++i) {
    names.emplace_back(name_of(static_cast<Value>(i)));
    if (names.back() == name) return static_cast<Value>(i);
  }
  throw_input("{} {}: one of {} is expected{}", option, quote(name), join(names), did_you_mean(name, names));
}

std::string_view finish_text(FinishReason finish) { return finish_name(finish); }

}  // namespace

void declare_filter(Command& command, FilterOptions& o) {
  command.option("--step", o.step, "N", "only episodes opened for this step")
      .option("--where", o.where, "FILTER", "only those that satisfy it: fields, and, or, not (docs/filters.md)")
      .option("--finish", o.finish, "WHY", "only those that ended so: stop, length, turns, time, cancelled, error, none")
      .option("--state", o.state, "STATE", "only in this state: open, leased, generated, rewarded, trained, dropped")
      .option("--task", o.task, "TEXT", "only tasks in whose prompt or answer this text stands")
      .option("--contains", o.contains, "TEXT",
              "only those in whose prompt, tools or generated text this text stands; each is read and decoded");
}

EpisodeFilter make_filter(const FilterOptions& o, const std::string& run_id) {
  EpisodeFilter filter;
  filter.run = run_id;
  filter.step = o.step;
  filter.where = o.where;
  if (!o.finish.empty()) filter.finish = named("--finish", o.finish, kLastFinishReason, finish_text);
  if (!o.state.empty()) filter.state = named("--state", o.state, EpisodeState::kDropped, state_name);
  filter.task_contains = o.task;
  return filter;
}

std::function<bool(const EpisodeRow&)> mentions(StoreQueries& store, const policy::Tokenizer& tokenizer, std::string text) {
  if (text.empty()) return {};
  return [&store, &tokenizer, text = std::move(text)](const EpisodeRow& row) {
    if (store.mentions(row.episode_id, text)) return true;
    if (row.token_count == 0 || !row.pruned.empty()) return false;
    std::string written;
    for (const Segment& s : store.episode(row.episode_id).segments)
      for (size_t i = 0; i < s.tokens.size(); ++i)
        if (s.mask.empty() || s.mask[i] != 0) written += token_text(tokenizer, s.tokens[i]);
    return written.find(text) != std::string::npos;
  };
}

EpisodeRows::EpisodeRows(StoreQueries& store, EpisodeFilter filter, std::function<bool(const EpisodeRow&)> keep)
    : store_(store), filter_(std::move(filter)), keep_(std::move(keep)), left_(filter_.limit) {}

std::optional<EpisodeRow> EpisodeRows::next() {
  while (at_ == page_.rows.size()) {
    if (left_ == 0 || (began_ && page_.next.empty())) return std::nullopt;
    filter_.limit = left_ < 0 ? kPageRows : std::min(left_, kPageRows);
    if (began_) {
      filter_.after = page_.next;
      filter_.offset = 0;
    }
    began_ = true;
    page_ = store_.page(filter_, -1, keep_);
    at_ = 0;
    if (left_ >= 0) left_ -= static_cast<int64_t>(page_.rows.size());
  }
  return std::move(page_.rows[at_++]);
}

}  // namespace perigee::apps
