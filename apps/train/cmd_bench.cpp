// perigee bench: each figure beside what this machine allows.
#include <fmt/format.h>

#include <charconv>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <utility>

#include "apps/command_line/commands.h"
#include "apps/command_line/shipped.h"
#include "apps/output/output.h"
#include "base/error.h"
#include "base/text.h"
#include "bench/bench.h"

namespace perigee::apps {
namespace {

using bench::Bound;
using bench::Figure;

int64_t parse_size(const std::string& text) {
  double value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  const std::string_view unit(end, static_cast<size_t>(text.data() + text.size() - end));
  const double scale = unit.empty() ? 1 : unit == "k" ? 1e3 : unit == "M" ? 1e6 : unit == "G" ? 1e9 : 0;
  if (error != std::errc{} || scale == 0 || !(value * scale >= 1 && value * scale <= 1e13))
    throw_input("--bytes {}: give a size such as 500M or 10G", quote(text));
  return static_cast<int64_t>(value * scale);
}

std::string number(double x) {
  return x >= 100 ? fmt::format("{:.0f}", x) : x >= 10 ? fmt::format("{:.1f}", x) : fmt::format("{:.3g}", x);
}

const char* bound_name(Bound b) {
  return b == Bound::kFma ? "fma" : b == Bound::kMemory ? "memory" : "none";
}

void print_header() {
  fmt::print("{:<34} {:>9} {:<11} {:>9} {:>6} {:>9}  {:<16} {}\n", "figure", "value", "unit", "limit",
             "share", "aim", "ceiling", "what");
}

// A line as soon as it is known: a whole run takes minutes.
void print_line(const Figure& f) {
  static bool begun = false;
  if (!std::exchange(begun, true)) print_header();
  const bool bound = f.bound != Bound::kNone;
  const std::string ceiling = f.bound == Bound::kFma      ? fmt::format("{:.0f} GFLOP/s", f.ceiling * 1e-9)
                              : f.bound == Bound::kMemory ? fmt::format("{:.1f} GB/s", f.ceiling * 1e-9)
                                                          : "-";
  fmt::print("{:<34} {:>9} {:<11} {:>9} {:>6} {:>9}  {:<16} {}\n", f.name, number(f.value), f.unit,
             bound ? number(f.limit) : "-", bound ? fmt::format("{:.0f} %", f.share * 100) : "-",
             f.target > 0 ? number(f.target)
             : f.aim > 0  ? fmt::format("{:.0f} %", f.aim * 100)
                          : "-",
             ceiling, f.note);
  std::fflush(stdout);
}

nlohmann::json to_json(const bench::Report& r, const bench::Options& o) {
  const std::string command = fmt::format("perigee bench {}{}--model {} --seconds {} --json", fmt::join(o.what, ","),
                                          o.what.empty() ? "" : " ", o.model, o.seconds);
  nlohmann::json figures = nlohmann::json::array();
  for (const Figure& f : r.figures) {
    nlohmann::json j = {{"name", f.name},
                        {"unit", f.unit},
                        {"value", f.value},
                        {"quartiles", {f.low, f.high}},
                        {"turns", f.turns},
                        {"note", f.note},
                        {"bound", bound_name(f.bound)}};
    if (f.bound != Bound::kNone) {
      j["work_per_unit"] = f.work;
      j["ceiling"] = f.ceiling;
      j["limit"] = f.limit;
      j["share"] = f.share;
      j["floor_s"] = f.work / f.ceiling;                            // what a unit takes at the ceiling
      j["ratio"] = f.time ? f.value / f.limit : f.limit / f.value;  // what it took, to that
    }
    if (f.aim > 0) j["aim"] = f.aim;
    if (f.target > 0) {
      j["target"] = f.target;
      j["met"] = f.time ? f.value <= f.target : f.value >= f.target;
    }
    figures.push_back(std::move(j));
  }
  return {
      {"command", command},
      {"device",
       {{"cpu", r.cpu}, {"simd", r.simd}, {"processors", r.processors}, {"threads", r.threads}, {"gpu", r.gpu}}},
      {"commit", r.commit},
      {"configuration", {{"model", o.model}, {"seconds", o.seconds}, {"what", o.what}}},
      {"ceilings", {{"fma_gflops", r.fma_gflops}, {"memory_read_gbs", r.memory_gbs}}},
      {"figures", std::move(figures)}};
}

}  // namespace

void add_bench(Program& program) {
  struct Choice {
    bench::Options bench;
    std::string what, bytes;
    int64_t threads = 0;
    bool json = false;
  };
  auto o = std::make_shared<Choice>();
  Command command = program.command("bench", "Measure speed beside what the machine allows", kGroupMachine);
  command
      .positional(
          "what", o->what,
          "figures or their families, commas between them: decode, prefill, train, tiny, kda, store, bus, grammar, "
          "sessions, http, gpu "
          "(gpu-kda, gpu-mla, gpu-train, gpu-exact, gpu-decode, gpu-prefill, gpu-context); "
          "all without it",
          false)
      .option("--seconds", o->bench.seconds, "S", "measure each figure at least this long")
      .option("--threads", o->threads, "N", "threads to use; 0: one per processor")
      .option("--model", o->bench.model, "FILE",
              "config.json of the model that decode, prefill, train and gpu run")
      .option("--episodes", o->bench.store_episodes, "N", "store-list: of the store that is made and listed")
      .option("--bytes", o->bytes, "SIZE", "store-list: of that store, about: 200M, 10G")
      .option("--store", o->bench.store, "FILE", "store-list: list this store; one that is not there is made and stays")
      .option("--dir", o->bench.directory, "DIR", "where the store is written while it is measured")
      .flag("--json", o->json, "print one JSON object")
      .example("bench")
      .example("bench decode,prefill --seconds 5")
      .example("bench store-list --episodes 1000000 --bytes 10G")
      .example("bench gpu-kda,gpu-mla,gpu-train")
      .example("bench gpu --model configs/model/kimi-linear-48b.json")
      .example("bench --json > bench.json");
  command.action([o] {
    bench::Options& b = o->bench;
    if (!(b.seconds > 0 && b.seconds <= 3600))
      throw_input("--seconds is {}: give a number above 0", b.seconds);
    if (o->threads < 0 || o->threads > 1024) throw_input("--threads is {}: give 0 to 1024", o->threads);
    b.threads = static_cast<int>(o->threads);
    for (size_t at = 0; at < o->what.size();) {
      const size_t end = std::min(o->what.find(',', at), o->what.size());
      if (end > at) b.what.push_back(o->what.substr(at, end - at));
      at = end + 1;
    }
    b.model = shipped(b.model);
    if (b.store_episodes < 1 || b.store_episodes > 1'000'000'000)
      throw_input("--episodes is {}: give 1 to 1000000000", b.store_episodes);
    if (!o->bytes.empty()) b.store_bytes = parse_size(o->bytes);
    const bench::Report report = bench::run(b, o->json ? nullptr : print_line);
    if (o->json) {
      print_json(to_json(report, b));
    } else {
      fmt::print("{}, {}, {} of {} processors; {:.0f} GFLOP/s multiply-add, {:.1f} GB/s read; commit {}\n",
                 report.cpu, report.simd, report.threads, report.processors, report.fma_gflops,
                 report.memory_gbs, report.commit);
    }
    return 0;
  });
}

}  // namespace perigee::apps
