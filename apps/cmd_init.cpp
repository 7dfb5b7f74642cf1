// perigee init: a model with random weights from a config.json.
#include <fmt/format.h>
#include <unistd.h>

#include <filesystem>

#include "apps/commands.h"
#include "apps/model_files.h"
#include "apps/shipped.h"
#include "base/error.h"
#include "base/file.h"
#include "base/text.h"
#include "policy/weights/checkpoint.h"

namespace perigee::apps {
namespace {

namespace fs = std::filesystem;

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

}  // namespace

void add_init(Program& program) {
  struct Options {
    std::string config, out, dtype = "float32";
    int64_t seed = 0;
  };
  auto o = std::make_shared<Options>();
  Command command = program.command("init", "Make a model with random weights", kGroupModel);
  command
      .option("--config", o->config, "FILE",
              "the architecture: a Hugging Face config.json of model_type kimi_linear")
      .required("--config")
      .option("--out", o->out, "DIRECTORY", "where the model goes; must not be there yet")
      .required("--out")
      .option("--seed", o->seed, "N", "of the random weights")
      .option("--dtype", o->dtype, "NAME", "float32 or bfloat16")
      .example("init --config configs/model/bench-136m.json --out models/136m --seed 1");
  command.action([o] {
    const policy::Dtype dtype = parse_dtype(o->dtype);
    if (o->seed < 0) throw_input("--seed {}: 0 or more is expected", o->seed);
    const policy::ParamLayout layout(policy::load_model_config(shipped(o->config)), dtype);
    NewDirectory directory(o->out);
    std::vector<float> flat(static_cast<size_t>(layout.elements()));
    policy::initialize(layout, static_cast<uint64_t>(o->seed), flat.data());
    policy::save_model(directory.building(), layout, flat.data(), dtype, int64_t{5} << 30, true);
    directory.commit();
    fmt::print("{}: {} parameters, {}\n", o->out, layout.parameter_count(), o->dtype);
    return 0;
  });
}

}  // namespace perigee::apps
