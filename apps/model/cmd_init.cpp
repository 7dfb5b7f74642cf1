// perigee init: a model with random weights from a config.json.
#include <fmt/format.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <filesystem>
#include <optional>

#include "apps/command_line/commands.h"
#include "apps/command_line/shipped.h"
#include "apps/model/memory_plan.h"
#include "apps/model/model_files.h"
#include "apps/output/output.h"
#include "base/error.h"
#include "base/file.h"
#include "base/text.h"
#include "policy/device/initialize.h"
#include "policy/device/resident.h"
#include "policy/device/transfer.h"
#include "policy/weights/checkpoint.h"

namespace perigee::apps {
namespace {

namespace fs = std::filesystem;

const char* dtype_name(policy::Dtype d) { return d == policy::Dtype::kBf16 ? "bfloat16" : "float32"; }

// A directory that appears whole under its name, or not at all.
class NewDirectory {
 public:
  explicit NewDirectory(const std::string& path) : path_(fs::path(path).lexically_normal()) {
    if (path_.filename().empty()) path_ = path_.parent_path();
    std::error_code error;
    if (fs::exists(path_, error) && !(fs::is_directory(path_, error) && fs::is_empty(path_, error)))
      throw_input("{}: is there already; choose another directory for --out", path);
    if (path_.has_parent_path()) make_directories(path_.parent_path().string());
    building_ = path_;
    building_ += fmt::format(".building-{}", getpid());
    make_directories(building_.string());
  }
  ~NewDirectory() {
    std::error_code ignored;
    if (!done_) fs::remove_all(building_, ignored);
  }
  NewDirectory(const NewDirectory&) = delete;
  NewDirectory& operator=(const NewDirectory&) = delete;

  std::string building() const { return building_.string(); }
  void commit() {
    std::error_code error;
    fs::rename(building_, path_, error);
    if (error) throw_environment("{}: cannot be given its name: {}", path_.string(), error.message());
    done_ = true;
  }

 private:
  fs::path path_, building_;
  bool done_ = false;
};

struct Options {
  std::string config, out, dtype, device = "cpu";
  int64_t seed = 0;
};

// Needs are known before anything is made: a disk that fills up after an hour is no answer.
void check_disk(const std::string& out, int64_t bytes) {
  fs::path at = fs::absolute(out);
  std::error_code error;
  while (!at.empty() && at != at.parent_path() && !fs::exists(at, error)) at = at.parent_path();
  const fs::space_info space = fs::space(at, error);
  // Headers, the index, and what the file system itself takes.
  const int64_t needed = bytes + bytes / 100 + (int64_t{16} << 20);
  if (!error && static_cast<int64_t>(space.available) < needed)
    throw_environment("{}: the model takes {} on disk, and {} are free there; free some, or give another --out", out,
                      human_bytes(static_cast<uint64_t>(needed)), human_bytes(space.available));
}

void check_memory(int64_t bytes, int64_t free, const std::string& where, const char* otherwise) {
  if (bytes > free)
    throw_environment("the model takes {} of memory, and {} has {} free{}", human_bytes(static_cast<uint64_t>(bytes)), where,
                      human_bytes(static_cast<uint64_t>(free)), otherwise);
}

void announce(const policy::ParamLayout& layout, const Options& o, const char* dtype, int64_t memory, int64_t disk) {
  fmt::print("{}: {} parameters in {}, {} of memory", o.config, layout.parameter_count(), dtype,
             human_bytes(static_cast<uint64_t>(memory)));
  if (!o.out.empty()) fmt::print(", {} on disk", human_bytes(static_cast<uint64_t>(disk)));
  fmt::print("\n");
  std::fflush(stdout);
}

constexpr int64_t kShardBytes = int64_t{5} << 30;

int init_on_cpu(const Options& o, const policy::ModelConfig& config, policy::Dtype dtype) {
  if (o.out.empty()) throw_input("init: --out is needed; without it only --device cuda says something");
  const policy::ParamLayout layout(config, dtype);
  const int64_t memory = layout.elements() * 4, disk = policy::checkpoint_bytes(layout, dtype);
  check_memory(memory, static_cast<int64_t>(machine_memory().available), "this machine",
               "; with --device cuda a GPU makes it, and the host needs next to none");
  check_disk(o.out, disk);
  NewDirectory directory(o.out);
  announce(layout, o, dtype_name(dtype), memory, disk);
  std::vector<float> flat(static_cast<size_t>(layout.elements()));
  policy::initialize(layout, static_cast<uint64_t>(o.seed), flat.data());
  policy::save_model(directory.building(), layout, flat.data(), dtype, kShardBytes, true);
  directory.commit();
  fmt::print("{}: written\n", o.out);
  return 0;
}

int init_on_gpu(const Options& o, const policy::ModelConfig& config, policy::Dtype dtype) {
  const auto form = dtype == policy::Dtype::kBf16 ? policy::MatrixForm::kTiles : policy::MatrixForm::kPanels;
  const policy::ParamLayout layout(config, dtype, form);
  const int64_t disk = policy::checkpoint_bytes(layout, dtype);
  kernels::Device device(0, int64_t{1} << 20);
  constexpr int64_t kBuffers = int64_t{64} << 20;
  check_memory(layout.weight_bytes() + kBuffers, device.info().free_bytes, device.info().name, "");
  if (!o.out.empty()) check_disk(o.out, disk);
  std::optional<NewDirectory> directory;
  if (!o.out.empty()) directory.emplace(o.out);
  announce(layout, o, dtype_name(dtype), layout.weight_bytes(), disk);
  const auto start = std::chrono::steady_clock::now();
  auto weights = policy::ResidentWeights::create(&device, layout.weight_bytes());
  policy::device_initialize(device, layout, static_cast<uint64_t>(o.seed), weights.writable());
  device.synchronize();
  const double made = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  fmt::print("made on {} in {}, fingerprint {}\n", device.info().name, duration(made),
             policy::weights_fingerprint(device, weights.data(), layout.weight_bytes()));
  if (!directory) return 0;
  std::fflush(stdout);
  const policy::Transfer t = policy::device_save(device, layout, weights.data(), directory->building(), dtype, kShardBytes);
  directory->commit();
  fmt::print("{}: {} written in {}, {:.2f} GB/s\n", o.out, human_bytes(static_cast<uint64_t>(t.bytes)), duration(t.seconds),
             static_cast<double>(t.bytes) * 1e-9 / t.seconds);
  return 0;
}

}  // namespace

void add_init(Program& program) {
  auto o = std::make_shared<Options>();
  Command command = program.command("init", "Make a model with random weights", kGroupModel);
  command
      .option("--config", o->config, "FILE",
              "the architecture: a config.json of model_type kimi_linear or perigee_hybrid (docs/mixers.md)")
      .required("--config")
      .option("--out", o->out, "DIRECTORY",
              "where the model goes; must not be there yet. With --device cuda it may be left out: then the model is made, "
              "timed and forgotten")
      .option("--seed", o->seed, "N", "of the random weights")
      .option("--dtype", o->dtype, "NAME", "float32 or bfloat16; without it float32, on a GPU the configuration's own")
      .option("--device", o->device, "NAME",
              "cpu or cuda: where the weights are made. A GPU writes them without the host ever holding the model; its "
              "numbers are others than the CPU's, of the same distributions")
      .example("init --config configs/model/bench-136m.json --out models/136m --seed 1")
      .example("init --config configs/model/kimi-linear-48b.json --device cuda --out models/48b");
  command.action([o] {
    if (o->device != "cpu" && o->device != "cuda") throw_input("--device {}: cpu or cuda is expected", quote(o->device));
    if (o->seed < 0) throw_input("--seed {}: 0 or more is expected", o->seed);
    const bool cuda = o->device == "cuda";
    const policy::ModelConfig config = policy::load_model_config(shipped(o->config));
    const policy::Dtype dtype = !o->dtype.empty() ? parse_dtype(o->dtype) : cuda ? config.dtype : policy::Dtype::kF32;
    return cuda ? init_on_gpu(*o, config, dtype) : init_on_cpu(*o, config, dtype);
  });
}

}  // namespace perigee::apps
