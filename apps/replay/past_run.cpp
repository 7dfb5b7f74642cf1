#include "apps/replay/past_run.h"

#include <fmt/format.h>

#include <chrono>

#include "apps/output/output.h"
#include "apps/output/terminal.h"
#include "base/error.h"
#include "rollout/run/run.h"

namespace perigee::apps {
namespace {

RunPlace checked_place(const AgainOptions& o) {
  if (o.threads < 0 || o.threads > 4096) throw_input("--threads {}: 0 to 4096 is expected", o.threads);
  return find_run(o.run);
}

std::unique_ptr<StoreQueries> open_store(const RunPlace& place, PastRun::Open open) {
  if (open == PastRun::Open::kRead) return std::make_unique<StoreReader>(place.store());
  StoreOptions options;
  options.open = StoreOptions::Open::kExisting;
  options.quick_check = false;  // reads all of a file that may be large; what is read here is checked
  return std::make_unique<Store>(place.store(), options);
}

}  // namespace

void declare_again(Command& command, AgainOptions& o) {
  command.option("--threads", o.threads, "N", "0: one per processor")
      .flag("--json", o.json, "print one JSON object");
}

PastRun::PastRun(const AgainOptions& o, Open open)
    : place(checked_place(o)),
      config(rollout::run_config_of(place.directory.string())),
      layout(rollout::make_layout(config)),
      tokenizer(rollout::make_tokenizer(config, layout->config())),
      tasks(config, layout->config(), *tokenizer),
      ctx(static_cast<int>(o.threads)),
      model(config),
      store_(open_store(place, open)) {}

Store& PastRun::writer() {
  auto* store = dynamic_cast<Store*>(store_.get());
  PERIGEE_CHECK(store != nullptr, "the run was opened to read");
  return *store;
}

PastRun::Episodes PastRun::episodes() {
  EpisodeFilter filter;
  filter.run = place.id;
  filter.limit = -1;
  Episodes out;
  for (const EpisodeRow& row : store_->episodes(filter)) {
    if (row.token_count == 0) continue;
    if (row.pruned.empty())
      out.ids.push_back(row.episode_id);
    else
      ++out.pruned;
  }
  return out;
}

void refuse_nothing_to_check(std::string_view command, const PastRun& run, const PastRun::Episodes& episodes) {
  if (episodes.ids.empty() && episodes.pruned == 0)
    throw_input("{}: {} holds no episodes: a run of supervised learning, or one that is still in its warm-up", command,
                run.directory());
}

rollout::Rebuilt PastRun::rebuild(uint32_t first, uint32_t last,
                                  const std::function<void(uint32_t, const std::byte*)>& visit,
                                  const std::function<std::string()>& progress,
                                  policy::StepObserver* observer) {
  rollout::Rebuilt rebuilt;
  {
    ProgressLine line;
    const auto begun = std::chrono::steady_clock::now();
    line.show([&] { return fmt::format("rebuilding version {}", first); });
    rollout::Rebuilder rebuilder(ctx, config, model, tasks, *store_, place.id, directory());
    rebuilt = rebuilder.run(
        first, last,
        [&](uint32_t version, const std::byte* weights) {
          visit(version, weights);
          line.show([&] {
            const int64_t done = int64_t{version} - first + 1, all = int64_t{last} - first + 1;
            const double s = std::chrono::duration<double>(std::chrono::steady_clock::now() - begun).count();
            return fmt::format("version {} of {}, left {}{}{}", version, last,
                               duration(s * static_cast<double>(all - done) / static_cast<double>(done)),
                               progress ? ", " : "", progress ? progress() : "");
          });
        },
        observer);
  }
  for (const std::string& text : rebuilt.damaged)
    fmt::print(stderr, "perigee: warning: {}; an older one served\n", printable_line(text));
  return rebuilt;
}

}  // namespace perigee::apps
