// perigee rollouts RUN: the episodes of a run, filtered, sorted, a page at a time.
#include <fmt/format.h>

#include "apps/command_line/commands.h"
#include "apps/command_line/run_argument.h"
#include "apps/output/output.h"
#include "apps/runs/episode_filter.h"
#include "apps/runs/episode_json.h"
#include "apps/runs/run_tokenizer.h"
#include "base/error.h"
#include "base/text.h"

namespace perigee::apps {
namespace {

using Order = EpisodeFilter::Order;
constexpr std::pair<std::string_view, Order> kOrders[] = {
    {"id", Order::kId}, {"reward", Order::kReward}, {"tokens", Order::kTokens}, {"step", Order::kStep}};
// A total beyond this is said as "more than".
constexpr int64_t kCountAtMost = 1'000'000;

struct Options {
  RunArgument run;
  FilterOptions filter;
  int64_t limit = 20, page = 1, look_at = 20000;
  std::string sort = "id", after;
  bool descending = false, json = false, csv = false;
};

Order parse_order(const std::string& name) {
  std::vector<std::string> names;
  for (const auto& [text, order] : kOrders) {
    if (text == name) return order;
    names.emplace_back(text);
  }
  throw_input("--sort {}: one of {} is expected{}", quote(name), join(names), did_you_mean(name, names));
}

struct Listing {
  EpisodePage page;
  int64_t offset = 0, total = 0;
  bool total_is_all = true;  // else there are more than total
  bool searched = false;     // --contains: total is of the rest of the filter
};

Listing read(const Options& o, const RunPlace& place) {
  if (o.limit < 1) throw_input("--limit {}: at least 1 is expected", o.limit);
  if (o.page < 1) throw_input("--page {}: pages count from 1", o.page);
  if (o.look_at < 1) throw_input("--look-at {}: at least 1 is expected", o.look_at);
  if (!o.after.empty() && o.page > 1) throw_input("give --page or --after, not both");
  if (o.json && o.csv) throw_input("give --json or --csv, not both");
  Listing out;
  out.searched = !o.filter.contains.empty();
  if (out.searched && o.page > 1) throw_input("--page does not go with --contains: go on with --after, as the listing says");
  EpisodeFilter filter = make_filter(o.filter, place.id);
  filter.order = parse_order(o.sort);
  filter.descending = o.descending;
  filter.limit = o.limit;
  filter.offset = out.offset = (o.page - 1) * o.limit;
  filter.after = o.after;
  StoreReader store(place.store());
  out.total = store.count_episodes(filter, kCountAtMost + 1);
  out.total_is_all = out.total <= kCountAtMost;
  out.total = std::min(out.total, kCountAtMost);
  if (!out.searched) {
    out.page = store.page(filter);
    return out;
  }
  const auto tokenizer = tokenizer_of(place, store);
  out.page = store.page(filter, o.look_at, mentions(store, *tokenizer, o.filter.contains));
  return out;
}

void print_csv(const std::vector<EpisodeRow>& rows) {
  std::string out =
      "episode,step,group,member,round,task_index,state,finish,attempt,tokens,reward,reward_failed,seed,created_us,"
      "finished_us,parent_episode,prompt,task\r\n";
  for (const EpisodeRow& e : rows)
    out += fmt::format("{},{},{},{},{},{},{},{},{},{},{},{},{},{},{},{},{},{}\r\n", e.episode_id, e.step, e.group_id,
                       e.member, e.round, e.task_index, state_name(e.state), finish_name(e.finish), e.attempt,
                       e.token_count, e.reward ? fmt::format("{}", *e.reward) : "", e.reward_failed ? 1 : 0, e.seed,
                       e.created_us, e.finished_us == 0 ? "" : std::to_string(e.finished_us),
                       e.parent_episode_id == 0 ? "" : std::to_string(e.parent_episode_id), csv_field(e.prompt_text),
                       csv_field(e.task));
  std::fwrite(out.data(), 1, out.size(), stdout);
}

// The prompt; of a session of `perigee serve`, which keeps it as tokens, the session's id.
std::string what_of(const EpisodeRow& e) {
  if (!e.prompt_text.empty()) return e.prompt_text;
  const nlohmann::json task = nlohmann::json::parse(e.task, nullptr, false);
  const bool session = task.is_object() && task.contains("session") && task["session"].is_string();
  return session ? "session " + task["session"].get<std::string>() : "";
}

void print_table(const Options& o, const Listing& listing, const RunPlace& place) {
  const std::vector<EpisodeRow>& rows = listing.page.rows;
  if (listing.total == 0) {
    fmt::print("{}\n",
               o.filter.any()
                   ? "no episode matches"
                   : "no episodes: the run has not got so far, or it learns from worked examples only");
    return;
  }
  Table table({"episode", "step", "group", "state", "finish", "tokens", "reward", "prompt"}, {0, 1, 2, 5, 6});
  for (const EpisodeRow& e : rows)
    table.row({std::to_string(e.episode_id), std::to_string(e.step), std::to_string(e.group_id),
               std::string(state_name(e.state)) + (e.parent_episode_id != 0 ? ", branch" : ""),
               std::string(finish_name(e.finish)), std::to_string(e.token_count),
               e.reward ? fmt::format("{:.3f}{}", *e.reward, e.reward_failed ? "!" : "") : "-",
               printable_line(what_of(e), 60)});
  table.print();
  const std::string total = fmt::format("{}{}", listing.total_is_all ? "" : "more than ", listing.total);
  if (listing.searched) {
    fmt::print("{} with the text; looked at {} of {} episodes", rows.size(), listing.page.looked_at, total);
    if (!listing.page.next.empty()) fmt::print("; more: --after {}", listing.page.next);
  } else if (rows.empty()) {
    fmt::print("{} episodes match, none on page {}", total, o.page);
  } else if (!o.after.empty()) {
    fmt::print("{} of {}", rows.size(), total);
    if (!listing.page.next.empty()) fmt::print("; more: --after {}", listing.page.next);
  } else {
    fmt::print("{} to {} of {}", listing.offset + 1, listing.offset + static_cast<int64_t>(rows.size()), total);
    if (!listing.page.next.empty()) fmt::print("; more: --page {} or --after {}", o.page + 1, listing.page.next);
  }
  if (rows.empty())
    fmt::print("\n");
  else
    fmt::print(". One of them whole: perigee show {} {}\n", shell_word(place.name().string()),
               rows.front().episode_id);
}

int rollouts(const Options& o) {
  const RunPlace place = find_run(o.run);
  const Listing listing = read(o, place);
  if (o.csv) {
    print_csv(listing.page.rows);
    if (!listing.page.next.empty())
      fmt::print(stderr, "{} of {}{} episodes; more: --limit N, or --after {}\n", listing.page.rows.size(),
                 listing.total_is_all ? "" : "more than ", listing.total, listing.page.next);
  } else if (o.json) {
    nlohmann::json list = nlohmann::json::array();
    for (const EpisodeRow& e : listing.page.rows) list.push_back(to_json(e));
    nlohmann::json out = {{"run", place.id},
                          {"total", listing.total},
                          {"total_is_all", listing.total_is_all},
                          {"offset", listing.offset},
                          {"next", listing.page.next.empty() ? nlohmann::json() : nlohmann::json(listing.page.next)},
                          {"episodes", std::move(list)}};
    if (listing.searched) out["looked_at"] = listing.page.looked_at;
    print_json(out);
  } else {
    print_table(o, listing, place);
  }
  return 0;
}

}  // namespace

void add_rollouts(Program& program) {
  auto o = std::make_shared<Options>();
  Command command = program.command("rollouts", "List the episodes of a run", kGroupLook);
  declare_run(command, o->run);
  declare_filter(command, o->filter);
  command.option("--look-at", o->look_at, "N", "with --contains: at most so many episodes are read (20000)")
      .option("--sort", o->sort, "KEY", "by id, reward, tokens or step")
      .flag("--descending", o->descending, "largest first")
      .option("--limit", o->limit, "N", "rows on a page")
      .option("--page", o->page, "N", "which page, from 1")
      .option("--after", o->after, "CURSOR",
              "go on where a listing ended, as it said; with the same filter and order, and quick however far")
      .flag("--json", o->json, "print one JSON object; its \"next\" is the cursor for --after")
      .flag("--csv", o->csv, "print CSV with a header; texts that a spreadsheet would compute get ' before them")
      .example("rollouts --latest --where 'reward < 0.5 and tokens > 100' --sort tokens --descending")
      .example("rollouts --latest --contains 'Traceback' --finish length")
      .example("rollouts runs/quickstart --step 40 --json")
      .example("rollouts runs/quickstart --limit 100000 --csv > episodes.csv");
  command.action([o] { return rollouts(*o); });
}

}  // namespace perigee::apps
