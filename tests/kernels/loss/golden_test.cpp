// Losses and gradients computed elsewhere: losses.json beside this file, and the one under PERIGEE_GOLDEN.
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "tests/kernels/loss/loss_case.h"

namespace perigee {
namespace {
using kernels::LossConfig;
using kernels::LossKind;
using nlohmann::json;

LossConfig config_of(const json& p) {
  const std::string objective = p.at("objective"), aggregate = p.value("aggregate", "");
  LossConfig c;
  if (objective == "clip")
    c.kind = aggregate == "sequence_mean" ? LossKind::kGrpo
             : aggregate == "constant"    ? LossKind::kDrGrpo
                                          : LossKind::kDapo;
  else if (objective == "reinforce")
    c.kind = LossKind::kRloo;
  else if (!kernels::parse(objective, c.kind))
    ADD_FAILURE() << "objective " << objective;
  c.clip_low = p.value("clip_low", 0.0);
  c.clip_high = p.value("clip_high", 0.0);
  c.max_length = p.value("max_length", 0.0);
  c.tau = p.value("tau", 1.0);
  c.kl_coef = p.value("kl_beta", 0.0);
  if (!kernels::parse(p.value("correction", "none"), c.correction)) ADD_FAILURE() << p.at("correction");
  c.cap = p.value("cap", 1.0);
  c.icepop_low = p.value("low", 0.0);
  c.icepop_high = p.value("high", 1.0);
  return c;
}

std::vector<double> advantages(const json& sequences, const std::string& kind_name) {
  kernels::AdvantageKind kind{};
  EXPECT_TRUE(kernels::parse(kind_name, kind)) << kind_name;
  std::vector<double> out;
  for (size_t i = 0; i < sequences.size();) {
    std::vector<double> rewards;
    const auto group = sequences[i].at("group");
    for (; i < sequences.size() && sequences[i].at("group") == group; ++i)
      rewards.push_back(sequences[i].at("reward"));
    std::vector<double> a(rewards.size());
    kernels::advantage(kind, rewards, a);
    out.insert(out.end(), a.begin(), a.end());
  }
  return out;
}

std::vector<double> numbers(const json& j, const char* key) {
  return j.at(key).get<std::vector<double>>();
}

template <class T>
double largest_error(const LossConfig& config, const std::vector<reference::LossSequence>& batch,
                     const json& want) {
  const Packed<T> packed(batch);
  const auto got = run_loss<T>(config, packed.view());
  double error = std::abs(got.stats.loss - want.at("loss").get<double>());
  std::vector<double> grad;  // one list per sequence
  for (const auto& g : want.at("grad")) {
    const auto values = g.get<std::vector<double>>();
    grad.insert(grad.end(), values.begin(), values.end());
  }
  EXPECT_EQ(grad.size(), got.dlogprob.size());
  for (size_t t = 0; t < grad.size(); ++t)
    error = std::max(error, std::abs(grad[t] - static_cast<double>(got.dlogprob[t])));
  return error;
}

void check_file(const std::filesystem::path& path) {
  std::ifstream file(path);
  ASSERT_TRUE(file) << path;
  const json golden = json::parse(file);
  std::vector<reference::LossSequence> batch;
  for (const auto& s : golden.at("sequences"))
    batch.push_back({numbers(s, "logp"),
                     numbers(s, "old"),
                     numbers(s, "mu"),
                     numbers(s, "ref"),
                     {},
                     numbers(s, "mask"),
                     0});
  ASSERT_FALSE(golden.at("cases").empty());
  for (const auto& c : golden.at("cases")) {
    const auto a = advantages(golden.at("sequences"), c.at("params").at("advantage"));
    const auto want = c.at("advantages").get<std::vector<double>>();
    ASSERT_EQ(a.size(), want.size());
    double advantage_error = 0;
    for (size_t i = 0; i < a.size(); ++i) {
      advantage_error = std::max(advantage_error, std::abs(a[i] - want[i]));
      batch[i].advantage = a[i];
    }
    const LossConfig config = config_of(c.at("params"));
    const double in_double = largest_error<double>(config, batch, c),
                 in_float = largest_error<float>(config, batch, c);
    std::printf("golden loss %-14s advantage %.1e  float64 %.1e  float32 %.1e\n",
                c.at("name").get<std::string>().c_str(), advantage_error, in_double, in_float);
    EXPECT_LE(advantage_error, 1e-9) << c.at("name");
    EXPECT_LE(in_double, 1e-9) << c.at("name");
    EXPECT_LE(in_float, 1e-5) << c.at("name");
  }
}

TEST(LossGolden, EveryCase) {
  check_file(std::string(PERIGEE_SOURCE_DIR) + "/tests/kernels/loss/losses.json");
}

TEST(LossGolden, CasesFromTheEnvironment) {
  const char* directory = std::getenv("PERIGEE_GOLDEN");
  if (directory == nullptr) return;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(directory))
    if (entry.path().filename() == "losses.json") check_file(entry.path());
}

}  // namespace
}  // namespace perigee
