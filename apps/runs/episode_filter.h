// Which episodes a command is about: the same options wherever episodes are chosen (docs/filters.md).
#pragma once
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "apps/command_line/command.h"
#include "policy/tokenizer/tokenizer.h"
#include "storage/store.h"

namespace perigee::apps {

struct FilterOptions {
  std::optional<int64_t> step;
  std::string where, finish, state, task, contains;
  // Some option was given.
  bool any() const {
    return step || !where.empty() || !finish.empty() || !state.empty() || !task.empty() || !contains.empty();
  }
};
void declare_filter(Command& command, FilterOptions& options);
// The filter of a run's episodes, but for --contains: that is for mentions() below.
// ERRORS (input): a name that is none, with those there are. A `where` that does not parse is refused by the store.
EpisodeFilter make_filter(const FilterOptions& options, const std::string& run_id);

// Whether a text stands in an episode: in its prompt, in what a tool was given or answered, or in what the policy wrote; plain
// text, case kept. The store keeps tokens and no text of what was written, so each episode asked about is decoded, some tens of
// microseconds and more for long ones: the `keep` of StoreQueries::page, to be bounded by its look_at_most.
// store and tokenizer outlive it. An empty text gives a null function: everything is kept.
std::function<bool(const EpisodeRow&)> mentions(StoreQueries& store, const policy::Tokenizer& tokenizer, std::string text);

// The rows that a filter leaves, in its order, one after the other, read a page at a time: memory does not grow with their
// number. filter.limit counts as it does for a listing; < 0: all.
class EpisodeRows {
 public:
  EpisodeRows(StoreQueries& store, EpisodeFilter filter, std::function<bool(const EpisodeRow&)> keep = {});
  std::optional<EpisodeRow> next();

 private:
  StoreQueries& store_;
  EpisodeFilter filter_;
  std::function<bool(const EpisodeRow&)> keep_;
  int64_t left_;  // < 0: no limit
  EpisodePage page_;
  size_t at_ = 0;
  bool began_ = false;
};

}  // namespace perigee::apps
