#pragma once
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include <string>

#include "base/error.h"
#include "reward/rubric.h"

namespace perigee::reward {

inline Rubric rubric(const char* list) {
  return Rubric::parse(nlohmann::json::parse(list), "run.json: reward");
}

inline RewardInput sample(std::string response, std::string answer = "") {
  RewardInput input;
  input.response = std::move(response);
  input.answer = std::move(answer);
  return input;
}

// The first component of a one-entry rubric.
inline RewardComponent verdict(const char* list, const RewardInput& input) {
  return rubric(list).score(input).components.at(0);
}

// The message of the input error that parsing the list must give.
inline std::string refusal(const char* list) {
  try {
    rubric(list);
  } catch (const Error& e) {
    EXPECT_EQ(e.exit_code(), 2);
    return e.what();
  }
  return "accepted";
}

}  // namespace perigee::reward
