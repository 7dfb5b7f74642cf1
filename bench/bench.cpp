#include "bench/bench.h"

#include <algorithm>
#include <fstream>
#include <thread>

#include "apps/command_line/commit.h"
#include "base/error.h"
#include "base/text.h"
#include "bench/rig.h"
#include "kernels/simd/simd.h"

namespace perigee::bench {
namespace {

std::string cpu_name() {
  std::ifstream in("/proc/cpuinfo");
  for (std::string line; std::getline(in, line);) {
    if (!line.starts_with("model name")) continue;
    const size_t colon = line.find(": ");
    if (colon != std::string::npos) return line.substr(colon + 2);
  }
  return "unknown";
}

}  // namespace

std::vector<std::string> figure_names() {
  std::vector<std::string> names;
  for (const char* dtype : {"f32", "bf16"})
    for (const char* figure :
         {"decode-1", "decode-deep", "decode-64", "prefill-512", "prefill-4096", "train"})
      names.push_back(std::string(figure) + "-" + dtype);
  for (const char* name : {"tiny-decode", "tiny-train", "kda-chunked", "kda-recurrent", "kda-dplr",
                           "kda-chunked-32", "kda-recurrent-32", "kda-dplr-32", "store-episodes",
                           "store-groups", "store-list", "bus-messages", "bus-bytes", "grammar-mask", "sessions-begin",
                           "sessions-memory", "sessions-disk", "sessions-start", "sessions-resume", "http-tokens", "http-first", "http-overhead", "http-apart",
                           "http-sessions-begin", "http-sessions-memory", "http-sessions-start", "http-sessions-resume"})
    names.emplace_back(name);
  for (std::string& name : gpu_figure_names()) names.push_back(std::move(name));
  return names;
}

Report run(const Options& options, void (*done)(const Figure&)) {
  const std::vector<std::string> names = figure_names();
  for (const std::string& w : options.what) {
    const bool known = std::any_of(names.begin(), names.end(),
                                   [&](const std::string& n) { return n == w || n.starts_with(w + "-"); });
    if (!known)
      throw_input("unknown figure {}{}; the figures are {}", quote(w), did_you_mean(w, names),
                  fmt::join(names, ", "));
  }
  Report report;
  Rig rig(options, report, done);
  report.cpu = cpu_name();
  report.simd = simd::kSimdName;
  report.commit = kCommit;
  report.processors = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  report.threads = rig.context().pool.size();
  rig.fma_rate();  // both are part of the report, whatever is asked for
  rig.read_rate();
  bench_model(rig);
  bench_tiny(rig);
  bench_kda(rig);
  bench_store(rig);
  bench_store_list(rig);
  bench_bus(rig);
  bench_grammar(rig);
  bench_sessions(rig);
  bench_serve(rig);
  bench_http_sessions(rig);
  bench_gpu(rig);
  return report;
}

}  // namespace perigee::bench
