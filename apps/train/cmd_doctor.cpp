// perigee doctor: looks at the machine and the configuration, and says what to do about what it finds.
#include <fmt/format.h>
#include <sched.h>
#include <sqlite3.h>
#include <sys/statvfs.h>
#include <unicode/uversion.h>
#include <unistd.h>
#include <xxhash.h>
#include <zmq.h>
#include <zstd.h>

#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>
#include <optional>
#include <thread>

#include "apps/command_line/commands.h"
#include "apps/command_line/environment_variables.h"
#include "apps/command_line/shipped.h"
#include "apps/model/memory_plan.h"
#include "apps/output/output.h"
#include "base/error.h"
#include "base/sandbox/sandbox.h"
#include "base/text.h"
#include "kernels/device/device.h"
#include "kernels/simd/simd.h"
#include "rollout/run/run_memory.h"
#include "rollout/setup/run_config.h"

namespace perigee::apps {
namespace {

enum class Verdict { kOk, kWarning, kFailure };

struct Finding {
  std::string name, value;
  Verdict verdict = Verdict::kOk;
  std::string fix;  // what to do; empty when all is well
};

// The text after "key" and a colon in a file of such lines, as in /proc/cpuinfo; "" when absent.
std::string field_of(const char* file, std::string_view key) {
  std::ifstream in(file);
  for (std::string line; std::getline(in, line);) {
    if (!line.starts_with(key)) continue;
    const size_t colon = line.find(':');
    if (colon == std::string::npos) continue;
    const size_t begin = line.find_first_not_of(" \t", colon + 1);
    return begin == std::string::npos ? "" : line.substr(begin);
  }
  return "";
}

Finding check_cpu() {
  const std::string name = field_of("/proc/cpuinfo", "model name");
  return {"processor", name.empty() ? "unknown" : name};
}

Finding check_simd() {
  const std::string built = simd::kSimdName;
#if defined(__x86_64__)
  const bool has512 = __builtin_cpu_supports("avx512f"), has2 = __builtin_cpu_supports("avx2");
  const std::string here = has512 ? "AVX-512" : has2 ? "AVX2" : "no AVX2";
  Finding f{"vectors", fmt::format("built for {}, the processor has {}", built, here)};
  if (built != here && (has512 || has2)) {
    f.verdict = Verdict::kWarning;
    f.fix =
        "same results, but slower than this processor can: remove build/release and start ./perigee again";
  } else if (!has2) {
    f.verdict = Verdict::kWarning;
    f.fix = "results are the same and everything is slow: use a processor with AVX2";
  }
  return f;
#else
  return {"vectors", "built for " + built};
#endif
}

Finding check_cores() {
  cpu_set_t set;
  const int usable = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
  Finding f{"cores",
            fmt::format("{} usable of {}", usable, std::max(1u, std::thread::hardware_concurrency()))};
  if (usable < 2) {
    f.verdict = Verdict::kWarning;
    f.fix = "the roles of a run share one core: give it two or more";
  }
  return f;
}

Finding check_memory() {
  const MachineMemory m = machine_memory();
  const std::string limit =
      m.limit > 0 ? fmt::format(", limited to {} by the control group", human_bytes(m.limit)) : "";
  Finding f{"memory",
            fmt::format("{} available of {}{}", human_bytes(m.available), human_bytes(m.total), limit)};
  if (m.available < (uint64_t{2} << 30)) {
    f.verdict = Verdict::kWarning;
    f.fix =
        "the quickstart wants about 2 GiB: close other programs, or lower engine.memory_mib and "
        "train.micro_batch_tokens";
  }
  return f;
}

std::string describe_gpu(const kernels::DeviceInfo& gpu) {
  return fmt::format("{}, capability {}.{}, {} multiprocessors, {} free of {}", gpu.name, gpu.capability / 10,
                     gpu.capability % 10, gpu.multiprocessors,
                     human_bytes(static_cast<uint64_t>(gpu.free_bytes)),
                     human_bytes(static_cast<uint64_t>(gpu.memory_bytes)));
}

// One for each GPU, or the reason why there is none. To have none is no fault; to have one that cannot be used is.
// found: of the first that can be used.
std::vector<Finding> check_gpus(std::optional<kernels::DeviceInfo>& found) {
  using kernels::Device;
  constexpr const char* kFix = "everything runs on the CPU until that is mended";
  const int count = Device::count();
  if (count == 0) {
    const std::string why = Device::why_none();
    const bool plain = why == "no CUDA device" || why.find("without CUDA") != std::string::npos;
    return {{"GPU", why, plain ? Verdict::kOk : Verdict::kWarning, plain ? "" : kFix}};
  }
  std::vector<Finding> findings;
  for (int i = 0; i < count; ++i) {
    const std::string which = count == 1 ? "" : fmt::format("{}: ", i);
    try {
      const Device device(i, 1024);
      if (!found) found = device.info();
      findings.push_back({"GPU", which + describe_gpu(device.info())});
    } catch (const Error& e) {
      findings.push_back({"GPU", which + e.what(), Verdict::kWarning, kFix});
    }
  }
  return findings;
}

struct PlanOptions {
  std::string model, device, contexts;
  std::optional<double> memory_gib;
};

PlanDevice plan_device(const PlanOptions& o, const std::optional<kernels::DeviceInfo>& gpu) {
  if (!o.device.empty() && o.device != "cpu" && o.device != "cuda")
    throw_input("--device {}: cpu or cuda is expected", quote(o.device));
  PlanDevice d;
  d.cuda = o.device.empty() ? gpu.has_value() : o.device == "cuda";
  if (o.memory_gib) {
    if (!(*o.memory_gib > 0 && *o.memory_gib < 1e9))
      throw_input("--memory-gib {}: a number above 0 is expected", *o.memory_gib);
    d.memory_bytes = static_cast<int64_t>(*o.memory_gib * static_cast<double>(int64_t{1} << 30));
    d.name = d.cuda ? "a GPU" : "a machine";
  } else if (!d.cuda) {
    d.memory_bytes = static_cast<int64_t>(machine_memory().available);
    d.name = "this machine";
  } else if (gpu) {
    d.memory_bytes = gpu->free_bytes;
    d.name = gpu->name;
  } else {
    throw_environment("--device cuda: {}; give --memory-gib N to plan for a GPU that is elsewhere",
                      kernels::Device::why_none());
  }
  return d;
}

MemoryPlan plan_for(const PlanOptions& o, const std::optional<kernels::DeviceInfo>& gpu) {
  const policy::ModelConfig config = policy::load_model_config(shipped(o.model));
  std::vector<int64_t> contexts = parse_contexts(o.contexts.empty() ? "4k,32k,1M" : o.contexts);
  // The usual ones, as far as the model goes.
  if (o.contexts.empty()) {
    std::erase_if(contexts, [&](int64_t tokens) { return tokens > config.max_length; });
    if (contexts.empty()) contexts = {config.max_length};
  }
  return plan_memory(config, o.model, plan_device(o, gpu), contexts);
}

Finding check_space(const std::string& name, const std::string& path, uint64_t wanted,
                    const std::string& fix) {
  struct statvfs s {};
  if (statvfs(path.c_str(), &s) != 0) return {name, path + " is not there", Verdict::kFailure, fix};
  const uint64_t free = uint64_t{s.f_bavail} * s.f_frsize;
  Finding f{name, fmt::format("{} free at {}", human_bytes(free), path)};
  if (access(path.c_str(), W_OK) != 0) {
    f.verdict = Verdict::kFailure;
    f.value += ", not writable";
    f.fix = fix;
  } else if (free < wanted) {
    f.verdict = Verdict::kWarning;
    f.fix = fix;
  }
  return f;
}

Finding check_sqlite() {
  // 3.51.3 fixed a bug by which a reset of the write-ahead log could lose pages when several connections
  // write. Perigee writes through one connection only, which does not meet it.
  return {"SQLite",
          fmt::format("{}{}", sqlite3_libversion(),
                      sqlite3_libversion_number() < 3051003 ? " (WAL-reset bug; one writer avoids it)" : "")};
}

Finding check_libraries() {
  int major = 0, minor = 0, patch = 0;
  zmq_version(&major, &minor, &patch);
  Finding f{"libraries",
            fmt::format("ZeroMQ {}.{}.{}, ICU {}, zstd {}, xxHash {}.{}.{}, fmt {}.{}", major, minor, patch,
                        U_ICU_VERSION, ZSTD_versionString(), XXH_versionNumber() / 10000,
                        XXH_versionNumber() / 100 % 100, XXH_versionNumber() % 100, FMT_VERSION / 10000,
                        FMT_VERSION / 100 % 100)};
  if (zmq_has("ipc") == 0) {
    f.verdict = Verdict::kFailure;
    f.fix = "this libzmq has no ipc transport: install Debian's libzmq3-dev, or train with --in-process";
  }
  return f;
}

Finding check_sandbox() {
  const std::string why = Sandbox::why_not();
  if (why.empty())
    return {"sandbox", geteuid() == 0 ? fmt::format("works; programs of tools run as user {}", Sandbox::kUser)
                                      : "works; programs of tools run as this user without rights"};
  return {"sandbox", "refused: " + why, Verdict::kWarning,
          "python, shell and command tools are refused until that is mended; all else works"};
}

Finding check_files_open() {
  const long files = sysconf(_SC_OPEN_MAX);
  Finding f{"open files", fmt::format("at most {}", files)};
  if (files < 256) {
    f.verdict = Verdict::kWarning;
    f.fix = "raise it: ulimit -n 1024";
  }
  return f;
}

// The configuration, and of a run on a GPU the memory it takes there.
std::vector<Finding> check_configuration(const std::string& path,
                                         const std::optional<kernels::DeviceInfo>& gpu,
                                         std::optional<double> memory_gib) {
  try {
    const rollout::RunConfig config = rollout::load_run_config(path);
    std::vector<Finding> findings = {{"configuration", path}};
    if (config.run.device != "cuda") return findings;
    const rollout::RunMemory memory = rollout::plan_run_memory(config, rollout::make_run_model(config));
    for (const rollout::RunMemory::Item& i : memory.items)
      findings.push_back(
          {i.name, fmt::format("{}, {}", human_bytes(static_cast<uint64_t>(i.bytes)), i.what)});
    findings.push_back({"together", human_bytes(static_cast<uint64_t>(memory.total()))});
    try {
      if (memory_gib)
        rollout::check_run_memory(memory, "a GPU",
                                  static_cast<int64_t>(*memory_gib * static_cast<double>(int64_t{1} << 30)));
      else if (gpu)
        rollout::check_run_memory(memory, gpu->name, gpu->free_bytes);
    } catch (const Error& e) {
      findings.back().verdict = Verdict::kFailure;
      findings.back().fix = e.what();
    }
    return findings;
  } catch (const Error& e) {
    std::string what = e.what();
    if (what.starts_with(path + ": ")) what.erase(0, path.size() + 2);  // it stands beside
    return {{"configuration", path, Verdict::kFailure, what}};
  }
}

const char* verdict_name(Verdict v) {
  constexpr const char* names[] = {"ok", "warning", "failure"};
  return names[static_cast<int>(v)];
}

int report(const std::vector<Finding>& findings, const std::optional<MemoryPlan>& plan,
           const std::string& model, bool json) {
  bool failed = false;
  for (const Finding& f : findings) failed = failed || f.verdict == Verdict::kFailure;
  if (json) {
    nlohmann::json out = {{"ok", !failed}, {"findings", nlohmann::json::array()}};
    for (const Finding& f : findings)
      out["findings"].push_back(
          {{"name", f.name}, {"value", f.value}, {"verdict", verdict_name(f.verdict)}, {"fix", f.fix}});
    if (plan) out["plan"] = plan->to_json();
    print_json(out);
  } else {
    for (const Finding& f : findings) {
      const char* mark = f.verdict == Verdict::kOk        ? "ok  "
                         : f.verdict == Verdict::kWarning ? "warn"
                                                          : "FAIL";
      fmt::print("{}  {:<14} {}\n", mark, f.name, printable(f.value));
      if (!f.fix.empty()) fmt::print("      {:<14} -> {}\n", "", f.fix);
    }
    if (plan) plan->print(model);
  }
  return failed ? 1 : 0;
}

}  // namespace

void add_doctor(Program& program) {
  struct Options {
    bool json = false;
    std::string config;
    PlanOptions plan;
  };
  auto o = std::make_shared<Options>();
  Command command = program.command("doctor", "Look at this machine and say what to mend", kGroupMachine);
  command.option("--config", o->config, "FILE", "check this run configuration too")
      .option("--model", o->plan.model, "FILE",
              "plan the memory of this model: a config.json, or the directory that holds one")
      .option("--device", o->plan.device, "NAME", "cpu or cuda; without it the GPU if there is one")
      .option("--contexts", o->plan.contexts, "LIST", "lengths of sequences to plan for, such as 4k,32k,1M")
      .option("--memory-gib", o->plan.memory_gib, "N", "plan for a device with this much memory instead")
      .flag("--json", o->json, "print one JSON object")
      .example("doctor")
      .example("doctor --config configs/quickstart.json")
      .example("doctor --model configs/model/kimi-linear-48b.json --device cuda --memory-gib 140");
  command.action([o] {
    const PlanOptions& p = o->plan;
    if (p.model.empty() && (!p.device.empty() || !p.contexts.empty()))
      throw_input("doctor: --device and --contexts go with --model");
    if (p.model.empty() && o->config.empty() && p.memory_gib)
      throw_input("doctor: --memory-gib goes with --model or --config");
    std::optional<kernels::DeviceInfo> gpu;
    std::vector<Finding> findings = {check_cpu(), check_simd(), check_cores(), check_memory()};
    for (Finding& f : check_gpus(gpu)) findings.push_back(std::move(f));
    std::optional<MemoryPlan> plan;
    if (!p.model.empty()) plan = plan_for(p, gpu);
    findings.push_back(check_space("disk", ".", uint64_t{1} << 30,
                                   "runs are written here: free 1 GiB, or set run.dir elsewhere"));
    findings.push_back(
        check_space("shared memory", "/dev/shm", uint64_t{256} << 20,
                    "weights pass between processes here: mount a tmpfs of 256 MiB or more (in a container: "
                    "--shm-size), or train with --in-process"));
    findings.push_back(check_sandbox());
    findings.push_back(check_files_open());
    findings.push_back(check_sqlite());
    findings.push_back(check_libraries());
    if (!o->config.empty())
      for (Finding& f : check_configuration(shipped(o->config), gpu, p.memory_gib))
        findings.push_back(std::move(f));
    for (const EnvironmentVariable& v : environment_table())
      if (const char* value = std::getenv(std::string(v.name).c_str()))
        findings.push_back({std::string(v.name), value});
    return report(findings, plan, p.model, o->json);
  });
}

}  // namespace perigee::apps
