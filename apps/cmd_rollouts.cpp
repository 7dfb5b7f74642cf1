// perigee rollouts RUN: the episodes of a run, filtered, sorted, a page at a time.
#include <fmt/format.h>

#include "apps/commands.h"
#include "apps/output.h"
#include "apps/run_argument.h"
#include "base/error.h"
#include "base/text.h"

namespace perigee::apps {
namespace {

constexpr EpisodeState kStates[] = {EpisodeState::kOpen,     EpisodeState::kLeased,  EpisodeState::kGenerated,
                                    EpisodeState::kRewarded, EpisodeState::kTrained, EpisodeState::kDropped};
using Order = EpisodeFilter::Order;
constexpr std::pair<std::string_view, Order> kOrders[] = {
    {"id", Order::kId}, {"reward", Order::kReward}, {"tokens", Order::kTokens}, {"step", Order::kStep}};

EpisodeState parse_state(const std::string& name) {
  std::vector<std::string> names;
  for (const EpisodeState state : kStates) {
    if (state_name(state) == name) return state;
    names.emplace_back(state_name(state));
  }
  throw_input("rollouts: --state {}: one of {} is expected", quote(name), join(names));
}

Order parse_order(const std::string& name) {
  for (const auto& [text, order] : kOrders)
    if (text == name) return order;
  throw_input("rollouts: --sort {}: one of id, reward, tokens, step is expected", quote(name));
}

nlohmann::json to_json(const EpisodeRow& e) {
  nlohmann::json row = {{"episode", e.episode_id},
                        {"group", e.group_id},
                        {"member", e.member},
                        {"step", e.step},
                        {"round", e.round},
                        {"task_index", e.task_index},
                        {"prompt", e.prompt_text},
                        {"seed", e.seed},
                        {"state", state_name(e.state)},
                        {"attempt", e.attempt},
                        {"finish", finish_name(e.finish)},
                        {"tokens", e.token_count},
                        {"reward", nullptr},
                        {"reward_failed", e.reward_failed},
                        {"created_us", e.created_us},
                        {"finished_us", e.finished_us}};
  if (e.reward) row["reward"] = *e.reward;
  return row;
}

}  // namespace

void add_rollouts(Program& program) {
  struct Options {
    RunArgument run;
    std::optional<int64_t> step;
    int64_t limit = 20, page = 1;
    std::string where, finish, state, task, sort = "id";
    bool descending = false, json = false;
  };
  auto o = std::make_shared<Options>();
  Command command = program.command("rollouts", "List the episodes of a run", kGroupLook);
  declare_run(command, o->run);
  command.option("--step", o->step, "N", "only those opened for this step")
      .option("--where", o->where, "FILTER", "only those that satisfy it: fields, and, or, not (docs/filters.md)")
      .option("--finish", o->finish, "WHY", "only those that ended so: stop, length, turns, time, cancelled, error, none")
      .option("--state", o->state, "STATE",
              "only in this state: open, leased, generated, rewarded, trained, dropped")
      .option("--task", o->task, "TEXT", "only tasks in whose prompt or answer this text stands")
      .option("--sort", o->sort, "KEY", "by id, reward, tokens or step")
      .flag("--descending", o->descending, "largest first")
      .option("--limit", o->limit, "N", "rows on a page")
      .option("--page", o->page, "N", "which page, from 1")
      .flag("--json", o->json, "print one JSON object")
      .example("rollouts --latest --where 'reward < 0.5 and tokens > 100' --sort tokens --descending")
      .example("rollouts runs/quickstart --step 40 --json");
  command.action([o] {
    const RunPlace place = find_run(o->run);
    EpisodeFilter filter;
    filter.run = place.id;
    filter.step = o->step;
    filter.where = o->where;
    if (!o->finish.empty()) {
      filter.finish = parse_finish(o->finish);
      if (!filter.finish)
        throw_input("rollouts: --finish {}: one of stop, length, turns, time, cancelled, error, none is expected",
                    quote(o->finish));
    }
    if (!o->state.empty()) filter.state = parse_state(o->state);
    filter.task_contains = o->task;
    filter.order = parse_order(o->sort);
    filter.descending = o->descending;
    if (o->limit < 1) throw_input("rollouts: --limit {}: at least 1 is expected", o->limit);
    if (o->page < 1) throw_input("rollouts: --page {}: pages count from 1", o->page);
    filter.limit = o->limit;
    filter.offset = (o->page - 1) * o->limit;

    StoreReader store(place.store());
    const int64_t total = store.count_episodes(filter);
    const std::vector<EpisodeRow> rows = store.episodes(filter);
    if (o->json) {
      nlohmann::json list = nlohmann::json::array();
      for (const EpisodeRow& e : rows) list.push_back(to_json(e));
      print_json(
          {{"run", place.id}, {"total", total}, {"offset", filter.offset}, {"episodes", std::move(list)}});
      return 0;
    }
    Table table({"episode", "step", "group", "state", "finish", "tokens", "reward", "prompt"},
                {0, 1, 2, 5, 6});
    for (const EpisodeRow& e : rows)
      table.row({std::to_string(e.episode_id), std::to_string(e.step), std::to_string(e.group_id),
                 std::string(state_name(e.state)), std::string(finish_name(e.finish)),
                 std::to_string(e.token_count),
                 e.reward ? fmt::format("{:.3f}{}", *e.reward, e.reward_failed ? "!" : "") : "-",
                 printable_line(e.prompt_text, 60)});
    table.print();
    const int64_t last = filter.offset + static_cast<int64_t>(rows.size());
    if (rows.empty()) {
      fmt::print("{} episodes match, none on page {}\n", total, o->page);
    } else {
      fmt::print("{} to {} of {}", filter.offset + 1, last, total);
      if (last < total) fmt::print("; more: --page {}", o->page + 1);
      fmt::print(". One of them whole: perigee show {} {}\n", place.directory.string(),
                 rows.front().episode_id);
    }
    return 0;
  });
}

}  // namespace perigee::apps
