// Tasks as the hub takes them: what a schedule needs of where they come from.
#pragma once
#include <cstdint>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace perigee::rollout {

// A task as the hub needs it.
struct PreparedTask {
  int64_t index = 0;  // in its source
  std::vector<int32_t> prompt;
  std::string prompt_text;
  nlohmann::json task;  // what the reward worker gets: prompt, answer, verifier
};

// Where tasks come from. Pure functions of their arguments but for feedback.
struct TaskFeed {
  std::function<PreparedTask(int64_t ordinal)> train;  // the ordinal-th group that the run opens
  std::function<PreparedTask(int64_t index)> held_out;
  // For a curriculum: the totals of a scored group, failed ones left out, in the order of opening (synchronous mode).
  // May be empty.
  std::function<void(int64_t task_index, const std::vector<double>& totals)> feedback;
};

}  // namespace perigee::rollout
