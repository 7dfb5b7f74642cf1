// The table of rollouts: a page of rows, and how many there are.
#include <fmt/format.h>

#include <algorithm>
#include <array>

#include "apps/inspect/api.h"
#include "apps/inspect/wire.h"
#include "apps/runs/episode_json.h"
#include "base/error.h"
#include "base/text.h"
#include "storage/filter.h"

namespace perigee::apps::inspect {
namespace {

using nlohmann::json;

constexpr int64_t kRowsAtOnce = 500, kRows = 100;
constexpr int64_t kRowPromptBytes = 400;
constexpr int64_t kCountAtMost = 10'000'000;
// Rows whose texts are read for one answer; the page asks again where they end.
constexpr int64_t kLookAt = 2000;
constexpr size_t kContainsBytes = 4096;

EpisodeFilter::Order order_of(const std::string& name) {
  constexpr std::pair<std::string_view, EpisodeFilter::Order> orders[] = {
      {"", EpisodeFilter::Order::kId},
      {"id", EpisodeFilter::Order::kId},
      {"reward", EpisodeFilter::Order::kReward},
      {"tokens", EpisodeFilter::Order::kTokens},
      {"step", EpisodeFilter::Order::kStep}};
  for (const auto& [text, order] : orders)
    if (text == name) return order;
  throw_input("sort {}: one of id, reward, tokens, step is expected", quote(name));
}

// Throws BadFilter where parse_filter finds a mistake: its line says "filter: WHAT at ^: TEXT", with a ^ put into the text.
void check_where(const std::string& where) {
  try {
    storage::parse_filter(where);
  } catch (const Error& e) {
    const std::string_view what = e.what();
    constexpr std::string_view kBegin = "filter: ", kMiddle = " at ^: ";
    const size_t middle = what.rfind(kMiddle, what.size() - std::min(what.size(), where.size() + 1));
    if (!what.starts_with(kBegin) || middle == std::string_view::npos) throw;
    const std::string_view marked = what.substr(middle + kMiddle.size());
    size_t at = 0;
    // The first ^ that is not the filter's own.
    while (at < where.size() && at < marked.size() && !(marked[at] == '^' && where[at] != '^')) ++at;
    const auto points = std::count_if(where.begin(), where.begin() + static_cast<std::ptrdiff_t>(at),
                                      [](char c) { return (static_cast<unsigned char>(c) & 0xc0) != 0x80; });
    throw BadFilter{std::string(what.substr(kBegin.size(), middle - kBegin.size())), where, points};
  }
}

EpisodeFilter filter_of(const Params& params, const OpenRun& run) {
  EpisodeFilter filter;
  filter.run = run.place.id;
  filter.where = params.text("where");
  check_where(filter.where);
  if (!params.text("step").empty()) filter.step = params.integer("step", 0, INT64_MAX);
  if (const std::string name = params.text("finish"); !name.empty()) {
    filter.finish = parse_finish(name);
    if (!filter.finish) throw_input("finish {}: no such reason", quote(name));
  }
  if (const std::string name = params.text("state"); !name.empty()) {
    for (int i = 0; i <= static_cast<int>(EpisodeState::kDropped); ++i)
      if (state_name(static_cast<EpisodeState>(i)) == name) filter.state = static_cast<EpisodeState>(i);
    if (!filter.state) throw_input("state {}: no such state", quote(name));
  }
  filter.order = order_of(params.text("sort"));
  filter.descending = params.integer("descending", 0, 1, 0) != 0;
  return filter;
}

// Whether the policy wrote it. The store keeps tokens: they are decoded.
bool wrote(StoreReader& store, const RunTokens& tokens, int64_t episode, const std::string& text) {
  if (!tokens.tokenizer) return false;
  std::string response;
  for (const Segment& s : store.episode(episode).segments)
    for (const int32_t id : s.tokens) response += token_text(*tokens.tokenizer, id);
  return response.find(text) != std::string::npos;
}

json row_of(const EpisodeRow& row) {
  json out = to_json(row);
  out["seed"] = std::to_string(row.seed);
  out["prompt"] = wire_part(row.prompt_text, 0, kRowPromptBytes)["text"];
  out.erase("task");
  return out;
}

}  // namespace

json Api::episodes(const Params& params, Readers& readers) {
  params.expect(
      {"run", "where", "contains", "step", "finish", "state", "sort", "descending", "after", "limit"});
  const OpenRun run = runs_.find(params.text("run"));
  EpisodeFilter filter = filter_of(params, run);
  filter.limit = params.integer("limit", 1, kRowsAtOnce, kRows);
  filter.after = params.text("after");
  const std::string contains = params.text("contains");
  if (contains.size() > kContainsBytes)
    throw_input("a text of {} bytes to look for: at most {} are taken", contains.size(), kContainsBytes);
  StoreReader& store = readers.of(run);
  EpisodePage page;
  if (contains.empty()) {
    page = store.page(filter);
  } else {
    const auto tokens = runs_.tokens(run);
    page = store.page(filter, kLookAt, [&](const EpisodeRow& row) {
      return store.mentions(row.episode_id, contains) || wrote(store, *tokens, row.episode_id, contains);
    });
  }
  json rows = json::array();
  for (const EpisodeRow& row : page.rows) rows.push_back(row_of(row));
  return {{"run", run.key}, {"rows", std::move(rows)}, {"next", page.next}, {"looked_at", page.looked_at}};
}

json Api::count(const Params& params, Readers& readers) {
  params.expect({"run", "where", "step", "finish", "state", "sort", "descending", "at_most"});
  const OpenRun run = runs_.find(params.text("run"));
  const EpisodeFilter filter = filter_of(params, run);
  const int64_t at_most = params.integer("at_most", 1, kCountAtMost, kCountAtMost);
  const int64_t n = readers.of(run).count_episodes(filter, at_most);
  return {{"run", run.key}, {"count", n}, {"at_least", n >= at_most}};
}

}  // namespace perigee::apps::inspect
