// How many tokens the model is fed for a text: what generators of a requested length count with.
#pragma once
#include <cstdint>
#include <functional>
#include <string_view>

namespace perigee::rollout {

struct Task;

// Thread safety: const calls from several threads at once.
struct PromptTokens {
  std::function<int64_t(std::string_view)> text;  // of plain text by itself
  std::function<int64_t(const Task&)>
      prompt;           // of a task's whole prompt, with all that the run puts around it
  int64_t answer = 0;   // that a response may have: rollout.max_new_tokens
  int64_t longest = 0;  // sequence that the model takes; 0: any

  // A byte is a token, one more begins the prompt.
  static PromptTokens bytes();
};

}  // namespace perigee::rollout
