// Where in a response the answer stands.
#pragma once
#include <optional>
#include <string>
#include <string_view>

#include "base/json.h"
#include "reward/verifier.h"

namespace perigee::reward {

std::string_view trim(std::string_view text);  // ASCII white space
bool is_space(char c);

// The options that exact, numeric, regex, countdown and positions share (reward/verifiers.h).
class Section {
 public:
  explicit Section(JsonReader& options, bool accept_truncated = false);
  // The trimmed text to judge, borrowed from the response; nullopt: there is none, and why says so.
  std::optional<std::string_view> find(const RewardInput& input, std::string& why) const;

 private:
  enum class Where { kAuto, kResponse, kAnswer };
  Where where_ = Where::kAuto;
  std::string think_close_, answer_open_, answer_close_;
  bool accept_truncated_ = false;
};

}  // namespace perigee::reward
