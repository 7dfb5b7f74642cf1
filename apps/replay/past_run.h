// A run of the past, opened to compute with its versions again: what replay, verify, checkout, branch and explain
// have in common.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "apps/command_line/run_argument.h"
#include "kernels/context.h"
#include "rollout/replay/rebuild.h"
#include "rollout/setup/run_config.h"
#include "rollout/setup/run_tasks.h"
#include "rollout/weights/host_model.h"
#include "storage/store.h"

namespace perigee::apps {

// --threads and --json of these commands.
struct AgainOptions {
  RunArgument run;
  int64_t threads = 0;
  bool json = false;
};
void declare_again(Command& command, AgainOptions& options);

class PastRun {
 public:
  enum class Open : uint8_t { kRead, kWrite };
  // ERRORS (input): of find_run; computed in bfloat16 on a GPU and there is none; --threads out of range; to write, while another process does.
  explicit PastRun(const AgainOptions& options, Open open = Open::kRead);
  PastRun(const PastRun&) = delete;
  PastRun& operator=(const PastRun&) = delete;

  const RunPlace place;
  const rollout::RunConfig config;
  const std::shared_ptr<const policy::ParamLayout> layout;
  const std::unique_ptr<policy::Tokenizer> tokenizer;
  const rollout::RunTasks tasks;
  kernels::Context ctx;
  const rollout::HostModel model;

  StoreQueries& store() { return *store_; }
  Store& writer();  // REQUIRES kWrite
  std::string directory() const { return place.directory.string(); }

  // Episodes that hold tokens, ascending; of those whose tokens were given up, only the number.
  struct Episodes {
    std::vector<int64_t> ids;
    int64_t pruned = 0;
  };
  Episodes episodes();

  // Rebuilder::run. On a terminal it says how far it is: "version 12 of 40" and what progress() adds; checkpoints that are
  // damaged are told of.
  rollout::Rebuilt rebuild(uint32_t first, uint32_t last,
                           const std::function<void(uint32_t, const std::byte*)>& visit,
                           const std::function<std::string()>& progress = {},
                           policy::StepObserver* observer = nullptr);

 private:
  std::unique_ptr<StoreQueries> store_;
};

// ERRORS (input): the run holds no episodes, so that `command` would find no fault in nothing.
void refuse_nothing_to_check(std::string_view command, const PastRun& run, const PastRun::Episodes& episodes);

}  // namespace perigee::apps
