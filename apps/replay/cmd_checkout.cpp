// perigee checkout RUN --version V --out DIR: the weights of any policy version, as a model directory, or its adapters.
#include <fmt/format.h>

#include <filesystem>

#include "apps/command_line/commands.h"
#include "apps/output/output.h"
#include "apps/replay/past_run.h"
#include "base/error.h"
#include "policy/weights/checkpoint.h"
#include "rollout/weights/base_weights.h"

namespace perigee::apps {
namespace {

struct Options {
  AgainOptions again;
  std::optional<int64_t> version;
  std::string out;
};

void save(const PastRun& run, const std::string& out, const std::vector<float>& flat) {
  const rollout::HostModel& model = run.model;
  if (model.model.adapters)
    policy::save_adapter(out, *model.model.adapters, flat.data(),
                         rollout::base_reference(run.config, *run.layout, model.base_fingerprint));
  else
    policy::save_model(out, *run.layout, flat.data(), policy::Dtype::kF32);
}

int checkout(const Options& o) {
  PastRun run(o.again);
  const std::vector<PolicyVersion> versions = run.store().versions(run.place.id);
  if (versions.empty()) throw_input("{}: the run has made no version yet", run.directory());
  const int64_t wanted = o.version.value_or(versions.back().version);
  if (wanted < 0 || wanted > int64_t{versions.back().version})
    throw_input("--version {}: the run made versions 0 to {}", wanted, versions.back().version);
  std::error_code ignored;
  if (std::filesystem::exists(o.out, ignored) && !std::filesystem::is_empty(o.out, ignored))
    throw_input("{}: exists and is not empty; give a new directory", o.out);
  const auto version = static_cast<uint32_t>(wanted);
  const rollout::HostModel& model = run.model;
  const policy::ArenaLayout& trained = model.model.trained();
  std::vector<float> flat(static_cast<size_t>(trained.elements()));
  std::string hash;
  const rollout::Rebuilt rebuilt = run.rebuild(version, version, [&](uint32_t, const std::byte* weights) {
    hash = model.hash(weights);
    trained.weights_to_flat(weights, flat.data());
  });
  const std::optional<PolicyVersion> record = run.store().version(run.place.id, version);
  const std::string recorded = record ? record->weights_hash : std::string();
  if (!recorded.empty() && recorded != hash)
    throw_environment(
        "version {} came out with hash {}, not {} as recorded: an altered store, or built "
        "by other code? Nothing was written",
        version, hash, recorded);
  const bool fresh = !std::filesystem::exists(o.out, ignored);
  try {
    save(run, o.out, flat);
  } catch (...) {
    if (fresh)
      std::filesystem::remove(o.out, ignored);  // where it is empty: a second try finds nothing in its way
    throw;
  }
  if (o.again.json) {
    print_json({{"run", run.place.id},
                {"version", version},
                {"weights_hash", hash},
                {"recorded", !recorded.empty()},
                {"steps_run_again", rebuilt.versions - 1},
                {"directory", o.out}});
    return 0;
  }
  fmt::print("version {} of {}, hash {}{}: {} steps run again; the model is in {}\n", version, run.place.id,
             hash, recorded.empty() ? "" : " as recorded", rebuilt.versions - 1, o.out);
  return 0;
}

}  // namespace

void add_checkout(Program& program) {
  auto o = std::make_shared<Options>();
  Command command = program.command("checkout", "The weights of any policy version, rebuilt", kGroupLook);
  declare_run(command, o->again.run);
  command.option("--version", o->version, "V", "which; the last one when not given")
      .option("--out", o->out, "DIR", "the model's directory, new")
      .required("--out");
  declare_again(command, o->again);
  command.example("checkout runs/quickstart --version 123 --out models/v123")
      .example("checkout --latest --out models/last");
  command.action([o] { return checkout(*o); });
}

}  // namespace perigee::apps
