// Worked examples against what the model holds and the policy may say.
#include <gtest/gtest.h>

#include "base/error.h"
#include "policy/tokenizer/tokenizer.h"
#include "rollout/setup/run_tasks.h"

namespace perigee::rollout {
namespace {

// What check() says of forty numbers to sort: a prompt of some 120 tokens, an example of some 2,500.
std::string said(int64_t max_length, int64_t max_new_tokens, int64_t warmup_steps = 5) {
  const RunConfig config = parse_run_config({{"model", {{"config", {{"none", 0}}}}},
                                             {"tasks", {{"kind", "sort"}, {"min_length", 40}, {"max_length", 40}}},
                                             {"reward", {{{"verifier", "exact"}}}},
                                             {"warmup", {{"steps", warmup_steps}}},
                                             {"rollout", {{"max_new_tokens", max_new_tokens}}}},
                                            "test");
  policy::ModelConfig model;
  model.bos_id = 256;
  model.eos_id = 257;
  const policy::ByteTokenizer tokenizer;
  try {
    return RunTasks(config, model, tokenizer).check(config, max_length);
  } catch (const Error& e) {
    EXPECT_EQ(e.kind(), Error::Kind::kInput);
    return std::string("refused: ") + e.what();
  }
}

TEST(WorkedExamples, ThatTheModelDoesNotHoldAreRefusedWhenTheRunStarts) {
  EXPECT_NE(said(200, 20).find("refused: tasks: worked_example: "), std::string::npos) << said(200, 20);
  EXPECT_NE(said(200, 20).find("exceed the model's 200"), std::string::npos) << said(200, 20);
  EXPECT_EQ(said(200, 20, 0), "") << "a run that learns from none";
}

TEST(WorkedExamples, LongerThanThePolicyMaySayIsAWarning) {
  EXPECT_EQ(said(4096, 3000), "");
  EXPECT_NE(said(4096, 20).find("rollout.max_new_tokens is 20"), std::string::npos) << said(4096, 20);
}

}  // namespace
}  // namespace perigee::rollout
