// The roles of a run, each a function that runs until its stop token or the hub says stop. As a process or as a thread
// they are the same; only the endpoint and who owns the ZeroMQ context differ.
#pragma once
#include <stop_token>
#include <string>

#include "rollout/setup/run_config.h"
#include "rollout/wire/client.h"

namespace perigee::rollout {

struct RoleContext {
  const RunConfig& config;
  std::string run_dir;
  std::string run_id;
  std::string endpoint;  // of the hub
  std::string name;      // "policy-0": unique among the roles of a run
  zmq::context_t& zmq;
  std::stop_token stop;
};

// How a role ended. failure: one line, empty when it was told to stop or the run is over. A role that throws Error is
// broken (its process exits with the error's code).
struct RoleResult {
  std::string failure;
};

// keep_leases: the hub replaces one that died while its workers lived.
RoleResult run_hub(const RoleContext& role, bool keep_leases);
RoleResult run_policy_worker(const RoleContext& role);
RoleResult run_reward_worker(const RoleContext& role);
RoleResult run_learner(const RoleContext& role);
// Makes the model under adapters and ends (rollout/weights/base_weights.h).
RoleResult run_base(const RoleContext& role);

ClientOptions client_options(const RunConfig& config);
net::BusOptions bus_options(const RunConfig& config);

}  // namespace perigee::rollout
