#include "rollout/host_model.h"

#include "base/error.h"
#include "rollout/base_weights.h"

namespace perigee::rollout {

HostModel::HostModel(const RunConfig& config) : model(make_run_model(config)) {
  if (!model.adapters) return;
  if (model.layout->matrices() == policy::MatrixForm::kTiles)
    throw_input("the model under this run's adapters computes in bfloat16 on a GPU, with sums that the CPU does not repeat");
  base = make_base(config, *model.layout, nullptr);
  base_fingerprint = policy::weights_fingerprint(base.data(), base.bytes());
}

}  // namespace perigee::rollout
