// What a run takes of a GPU's memory: the model once, then what each role holds beside it.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "rollout/setup/run_model.h"

namespace perigee::rollout {

struct RunMemory {
  struct Item {
    std::string name;
    int64_t bytes = 0;
    std::string what;
  };
  std::vector<Item> items;
  int64_t total() const;
  // A line for each item.
  std::vector<std::string> lines() const;
};

// Of a run whose roles all compute on one GPU. Temporary buffers are known only to a program that was built with CUDA.
RunMemory plan_run_memory(const RunConfig& config, const RunModel& model);

// ERRORS (environment): what the run takes is more than is free, with the numbers and what to lower.
void check_run_memory(const RunMemory& memory, const std::string& device, int64_t free_bytes);

}  // namespace perigee::rollout
