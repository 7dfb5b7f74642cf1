// The weights of every policy version of a run, made again from what the store keeps: a step is a pure
// function of the weights, the optimiser state and the batch (policy/learn/trainer.h), so running the steps
// again gives the same bits.
#pragma once
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "kernels/context.h"
#include "rollout/setup/run_config.h"
#include "rollout/setup/run_tasks.h"
#include "rollout/weights/host_model.h"
#include "storage/store.h"

namespace perigee::rollout {

struct Rebuilt {
  int64_t versions = 0;              // visited or passed on the way
  int64_t other_hash = 0;            // with another hash than the run recorded
  uint32_t first_other = 0;          // the first of those
  std::vector<std::string> damaged;  // checkpoints that were passed over: a line each
};

class Rebuilder {
 public:
  // All outlive the object. run_dir: where the run's checkpoints lie.
  Rebuilder(kernels::Context& ctx, const RunConfig& config, const HostModel& model, const RunTasks& tasks,
            StoreQueries& store, std::string run_id, std::string run_dir);

  // Calls visit(version, arena of model.trained()) for each version from first to last, ascending. Starts from the newest
  // checkpoint before `first` that is as the store says, or the run's first weights. observer, if any, is shown the steps from
  // `first` on. ERRORS (environment): what the store or a checkpoint lacks.
  Rebuilt run(uint32_t first, uint32_t last, const std::function<void(uint32_t, const std::byte*)>& visit,
              policy::StepObserver* observer = nullptr);

 private:
  std::vector<policy::TrainSequence> batch_for(const PolicyVersion& version);

  kernels::Context& ctx_;
  const RunConfig& config_;
  const HostModel& model_;
  const RunTasks& tasks_;
  StoreQueries& store_;
  std::string run_id_, run_dir_;
  std::map<uint32_t, TrainBatch> batches_;  // by the version they make
};

}  // namespace perigee::rollout
