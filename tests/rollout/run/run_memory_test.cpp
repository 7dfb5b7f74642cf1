// What a run is said to take of a GPU.
#include "rollout/run/run_memory.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "base/error.h"

namespace perigee::rollout {
namespace {

RunConfig config(const std::vector<std::string>& sets = {}) {
  return load_run_config(PERIGEE_SOURCE_DIR "/configs/lora_48b_h200.json", sets);
}

int64_t item(const RunMemory& m, const std::string& name) {
  const auto it = std::find_if(m.items.begin(), m.items.end(), [&](const auto& i) { return i.name == name; });
  return it == m.items.end() ? -1 : it->bytes;
}

TEST(RunMemory, AModelUnderAdaptersCountsOnceForAllRoles) {
  const RunConfig one = config(), three = config({"workers.policy=3"});
  const RunMemory a = plan_run_memory(one, make_run_model(one)), b = plan_run_memory(three, make_run_model(three));
  EXPECT_EQ(item(a, "model"), make_run_model(one).layout->weight_bytes());
  EXPECT_EQ(item(b, "model"), item(a, "model"));
  EXPECT_EQ(item(b, "states"), 3 * item(a, "states"));
  EXPECT_EQ(item(b, "adapters to sample"), 3 * item(a, "adapters to sample"));
  EXPECT_EQ(item(b, "adapters to train"), item(a, "adapters to train"));
  EXPECT_EQ(item(a, "states"), int64_t{8192} << 20);
  int64_t sum = 0;
  for (const auto& i : a.items) sum += i.bytes;
  EXPECT_EQ(a.total(), sum);
  EXPECT_EQ(a.lines().size(), a.items.size() + 1);
  // The configuration is for a card of 141 GB.
  EXPECT_LT(a.total(), int64_t{139} << 30);
}

TEST(RunMemory, AModelThatIsTrainedCountsForEachRole) {
  const RunConfig full = config({"learn.lora=null"});
  const RunModel model = make_run_model(full);
  const RunMemory m = plan_run_memory(full, model);
  EXPECT_EQ(item(m, "model"), -1);
  EXPECT_EQ(item(m, "weights to sample"), model.layout->weight_bytes());
  EXPECT_EQ(item(m, "weights to train"), 2 * model.layout->weight_bytes() + 16 * model.layout->elements());
}

TEST(RunMemory, WhatDoesNotFitIsRefusedInOneLineWithTheNumbers) {
  const RunConfig c = config();
  const RunMemory m = plan_run_memory(c, make_run_model(c));
  EXPECT_NO_THROW(check_run_memory(m, "a card", m.total()));
  try {
    check_run_memory(m, "a card", m.total() - 1);
    FAIL();
  } catch (const Error& e) {
    const std::string line = e.what();
    EXPECT_EQ(line.find('\n'), std::string::npos);
    EXPECT_NE(line.find("a card has"), std::string::npos) << line;
    EXPECT_NE(line.find("model 91."), std::string::npos) << line;
    EXPECT_NE(line.find("engine.memory_mib"), std::string::npos) << line;
  }
}

TEST(RunMemory, MomentsOfAByteTakeAQuarter) {
  for (const std::vector<std::string>& model : {std::vector<std::string>{}, {"learn.lora=null"}}) {
    std::vector<std::string> sets = model;
    const RunConfig floats = config(sets);
    sets.push_back("learn.optimizer_state=8bit");
    const RunConfig bytes = config(sets);
    const RunModel a = make_run_model(floats), b = make_run_model(bytes);
    const char* const name = model.empty() ? "adapters to train" : "weights to train";
    const auto saved = static_cast<double>(item(plan_run_memory(floats, a), name) - item(plan_run_memory(bytes, b), name));
    EXPECT_NEAR(saved / static_cast<double>(a.trained().elements()), 8 - 2.03125, 0.001);
  }
}

// bfloat16 on a GPU with the CPU's form of matrices: what a run that says so computes with, whatever the GPU.
TEST(RunMemory, PortableNumericsKeepTheFormOfTheCpu) {
  const RunConfig exact = config(), portable = config({"run.numerics=portable"});
  const RunModel a = make_run_model(exact), b = make_run_model(portable);
  EXPECT_EQ(a.layout->matrices(), policy::MatrixForm::kTiles);
  EXPECT_EQ(b.layout->matrices(), policy::MatrixForm::kPanels);
  EXPECT_EQ(b.layout->dtype(), policy::Dtype::kBf16);
  EXPECT_LE(b.layout->weight_bytes(), a.layout->weight_bytes());
  // Ranks are not rounded up to a tile there.
  EXPECT_LT(item(plan_run_memory(portable, b), "adapters to train"), item(plan_run_memory(exact, a), "adapters to train") / 2);
  EXPECT_THROW(config({"run.numerics=fastest"}), Error);
}

}  // namespace
}  // namespace perigee::rollout
