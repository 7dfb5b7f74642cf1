// The role that makes the model under a run's adapters.
#include "rollout/roles/roles.h"
#include "rollout/weights/base_weights.h"

namespace perigee::rollout {

RoleResult run_base(const RoleContext& role) {
  offer_base(role.config, role.run_dir);
  return {};
}

}  // namespace perigee::rollout
