// perigee compare: configurations side by side, over the same seeds, data and budget.
#include <fmt/format.h>

#include <charconv>
#include <filesystem>
#include <thread>

#include "apps/command_line/commands.h"
#include "apps/command_line/commit.h"
#include "apps/compare/chart.h"
#include "apps/compare/report.h"
#include "apps/compare/runs.h"
#include "apps/output/output.h"
#include "base/error.h"
#include "base/text.h"

namespace perigee::apps {
namespace {

namespace fs = std::filesystem;
using namespace compare;

struct Options {
  std::vector<std::string> files, sets;
  std::string out, seeds;
  int64_t jobs = 0, threads = 1;
  bool json = false, dry_run = false, report_only = false, context_only = false, quiet = false;
};

constexpr int kStopped = 130;  // as a shell says of a program that Ctrl-C ended

std::vector<int64_t> parse_seeds(const std::string& text) {
  std::vector<int64_t> out;
  for (size_t begin = 0; begin < text.size() || begin == 0;) {
    const size_t comma = std::min(text.find(',', begin), text.size());
    const std::string word = text.substr(begin, comma - begin);
    int64_t n = 0;
    const auto [end, error] = std::from_chars(word.data(), word.data() + word.size(), n);
    if (error != std::errc() || end != word.data() + word.size() || n < 0 ||
        n > int64_t{9'000'000'000'000'000})
      throw_input("--seeds {}: numbers such as 1,2,3 are expected", quote(text));
    if (std::find(out.begin(), out.end(), n) != out.end())
      throw_input("--seeds {}: {} stands there twice", quote(text), n);
    out.push_back(n);
    begin = comma + 1;
  }
  return out;
}

// A directory's name from the comparison's.
std::string default_out(const std::string& name) {
  std::string out;
  for (const char c : name)
    out += (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' ? c : '-';
  return "runs/compare-" + out.substr(0, 80);
}

bool holds_runs(const fs::path& out) {
  std::error_code error;
  return fs::is_directory(out / "runs", error) && !fs::is_empty(out / "runs", error);
}

void print_plan(const Plan& plan) {
  Table models({"variant", "mixers", "parameters", "operations a token", "cache, bytes a token", "state"},
               {2, 3, 4, 5});
  for (size_t v = 0; v < plan.facts.size(); ++v) {
    const ModelFacts& f = plan.facts[v];
    models.row({printable_line(plan.comparison.variants[v].name, 40), f.mixers, std::to_string(f.parameters),
                number_text(f.operations()), fmt::format("{:.0f}", f.cache_bytes_per_token),
                human_bytes(static_cast<uint64_t>(f.state_bytes))});
  }
  models.print();
  if (!plan.runs.empty()) {
    fmt::print("\n");
    Table runs({"run", "supervised steps", "RL steps", "evaluations by length"}, {1, 2, 3});
    for (const PlannedRun& r : plan.runs)
      runs.row({r.id, std::to_string(r.effective["warmup"]["steps"].get<int64_t>()),
                std::to_string(r.effective["learn"]["steps"].get<int64_t>()),
                std::to_string(plan.comparison.tasks[r.task].evaluate.size())});
    runs.print();
  }
}

nlohmann::json plan_json(const Plan& plan, const fs::path& out) {
  nlohmann::json models = nlohmann::json::array(), runs = nlohmann::json::array(),
                 context = nlohmann::json::array();
  for (size_t v = 0; v < plan.facts.size(); ++v) {
    nlohmann::json one = {{"name", plan.comparison.variants[v].name}};
    one.update(plan.facts[v].to_json());
    models.push_back(std::move(one));
  }
  for (const PlannedRun& r : plan.runs)
    runs.push_back({{"id", r.id},
                    {"variant", plan.comparison.variants[r.variant].name},
                    {"task", plan.comparison.tasks[r.task].setting.name},
                    {"seed", r.seed},
                    {"steps", r.steps},
                    {"directory", run_directory(out, r).string()}});
  for (const int64_t n : plan.comparison.context.lengths) context.push_back(n);
  return {{"name", plan.comparison.name},
          {"directory", out.string()},
          {"variants", std::move(models)},
          {"runs", std::move(runs)},
          {"context", std::move(context)}};
}

ContextResults measure(const Plan& plan, const Options& o) {
  ContextResults results;
  results.threads = o.threads;
  results.machine = machine_text();
  for (size_t v = 0; v < plan.context_models.size(); ++v) {
    ContextOptions options;
    options.lengths = plan.comparison.context.lengths;
    options.steps = plan.comparison.context.steps;
    options.threads = o.threads;
    options.memory_bytes = context_memory_bytes();
    if (plan.comparison.context.memory_gib > 0)
      options.memory_bytes =
          std::min(options.memory_bytes,
                   static_cast<int64_t>(plan.comparison.context.memory_gib * (int64_t{1} << 30)));
    options.on_length = [&](int64_t tokens) {
      if (!o.quiet)
        fmt::print(stderr, "{}: a token behind {}\n", printable_line(plan.comparison.variants[v].name, 60),
                   tokens_text(tokens));
    };
    results.variants.push_back(measure_context(plan.context_models[v], options));
  }
  return results;
}

void print_results(const Plan& plan, const Results& results, const ContextResults* context) {
  const auto percent = [](double x) { return fmt::format("{:.1f} %", 100 * x); };
  if (!results.groups.empty()) {
    Table table({"task", "variant", "final accuracy", "from", "to",
                 fmt::format("steps to {:g} %", 100 * plan.comparison.reach), "runs"},
                {2, 3, 4, 5, 6});
    for (const GroupResult& g : results.groups) {
      const Reached& r = g.rl_accuracy.size() > 1 ? g.rl_reached : g.warmup_reached;
      table.row({printable_line(plan.comparison.tasks[g.task].setting.name, 30),
                 printable_line(plan.comparison.variants[g.variant].name, 30),
                 g.final_accuracy ? percent(g.final_accuracy->median) : "-",
                 g.final_accuracy ? percent(g.final_accuracy->min) : "-",
                 g.final_accuracy ? percent(g.final_accuracy->max) : "-",
                 r.of == 0  ? "-"
                 : r.median ? fmt::format("{:.0f}", *r.median)
                 : r.n > 0  ? fmt::format("{} of {}", r.n, r.of)
                            : "not reached",
                 std::to_string(g.final_accuracy ? g.final_accuracy->n : 0)});
    }
    table.print();
  }
  if (context == nullptr) return;
  if (!results.groups.empty()) fmt::print("\n");
  std::vector<std::string> header = {"ms a token behind"};
  std::vector<size_t> right;
  for (const int64_t n : plan.comparison.context.lengths)
    header.push_back(tokens_text(n)), right.push_back(right.size() + 1);
  Table table(header, right);
  for (size_t v = 0; v < context->variants.size(); ++v) {
    const std::string name = printable_line(plan.comparison.variants[v].name, 40);
    std::vector<std::string> wall = {name}, processor = {name + ", processor time"};
    for (const ContextPoint& p : context->variants[v]) {
      wall.push_back(p.left_out.empty() ? number_text(1e3 * p.median_s) : "left out");
      processor.push_back(p.left_out.empty() ? number_text(1e3 * p.processor_median_s) : "left out");
    }
    table.row(wall);
    table.row(processor);
  }
  table.print();
}

int run(const Options& o) {
  if (o.threads < 1 || o.threads > 4096) throw_input("--threads {}: 1 to 4096 is expected", o.threads);
  const int64_t cores = std::max<int64_t>(1, std::thread::hardware_concurrency());
  const int64_t jobs = o.jobs > 0 ? o.jobs : std::max<int64_t>(1, cores / o.threads);
  if (o.jobs < 0 || jobs > 1024) throw_input("--jobs {}: 1 to 1024 is expected", o.jobs);
  if (o.report_only && (o.dry_run || o.context_only)) throw_input("--report-only stands alone");
  PlanOptions options;
  options.set = o.sets;
  options.threads = o.threads;
  if (!o.seeds.empty()) options.seeds = parse_seeds(o.seeds);
  Comparison comparison = load_comparison(o.files);
  const fs::path out = o.out.empty() ? default_out(comparison.name) : o.out;
  // Where runs are there, what is measured joins them in the report.
  options.train = !o.context_only || (!o.dry_run && holds_runs(out));
  if (o.context_only && comparison.context.lengths.empty())
    for (int64_t n = 4096; n <= 1048576; n *= 2) comparison.context.lengths.push_back(n);
  const Plan plan = make_plan(std::move(comparison), options);
  const Comparison& c = plan.comparison;
  if (o.dry_run) {
    if (o.json)
      print_json(plan_json(plan, out));
    else
      print_plan(plan);
    return 0;
  }
  if (plan.runs.empty() && c.context.lengths.empty())
    throw_input("{}: there is nothing to do: train is false and measure.context is empty", c.where);
  check_out(plan, out);
  if (o.report_only && !fs::exists(out))
    throw_input("{} is not there: nothing was compared yet, or --out is another", out.string());
  const OutLock lock(out);
  RunsEnd end;
  std::optional<ContextResults> context = c.context.lengths.empty() ? std::nullopt : read_context(out, plan);
  if (context && !o.report_only && context->threads != o.threads) context.reset();
  if (!o.report_only) {
    if (!o.quiet && !o.json && !o.context_only) print_plan(plan), fmt::print("\n"), std::fflush(stdout);
    if (!plan.runs.empty() && !o.context_only) {
      RunsOptions runs;
      runs.out = out;
      runs.jobs = jobs;
      runs.quiet = o.quiet;
      end = do_runs(plan, runs);
    }
    if (!end.stopped && !context && !c.context.lengths.empty()) {
      context = measure(plan, o);
      write_context(out, plan, *context);
    }
  }
  const Results results = read_results(plan, out);
  ReportInput report{plan, results};
  report.context = context ? &*context : nullptr;
  report.machine = machine_text();
  report.program = kCommit;
  report.jobs = plan.runs.empty() || o.report_only || o.context_only ? 0 : jobs;  // else it does not know
  report.threads = o.threads;
  report.failures = end.failures;
  write_report(out, report);
  if (o.json) {
    print_json(report_json(report));
  } else {
    print_results(plan, results, report.context);
    fmt::print("\nreport: {}\n", (out / "report.html").string());
  }
  if (end.stopped) return kStopped;
  if (end.failures.empty()) return 0;
  fmt::print(
      stderr,
      "perigee: error: {} runs or evaluations did not end well; the first: {}. The same command goes on\n",
      end.failures.size(), end.failures.front());
  return 1;
}

}  // namespace

void add_compare(Program& program) {
  auto o = std::make_shared<Options>();
  Command command =
      program.command("compare", "Configurations side by side: same seeds, data and budget", kGroupRun);
  command
      .positionals("FILE", o->files,
                   "a comparison (docs/compare.md, configs/lab), or the configurations of several runs")
      .option("--out", o->out, "DIRECTORY",
              "where runs and report go; default: runs/compare-NAME; the same again goes on where it stopped")
      .option("--jobs", o->jobs, "N", "runs at a time; 0: as many as there are processors for")
      .option("--threads", o->threads, "N", "of each run and of measurements")
      .option("--seeds", o->seeds, "A,B,C", "instead of the comparison's")
      .list("--set", o->sets, "KEY=VALUE", "overrides a key of every run's configuration; may be repeated")
      .flag("--dry-run", o->dry_run, "print the models, their sizes and the runs, and do nothing")
      .flag("--report-only", o->report_only, "write the report from what is there")
      .flag("--context-only", o->context_only,
            "train nothing: time and memory of a token against context length")
      .flag("--quiet", o->quiet, "no progress")
      .flag("--json", o->json, "print the report (or the plan) as one JSON object")
      .example("compare configs/lab/synthetic_small.json")
      .example("compare a.json b.json --seeds 1,2,3 --out runs/a-and-b")
      .example("compare configs/lab/context.json --context-only");
  command.action([o] { return run(*o); });
}

}  // namespace perigee::apps
