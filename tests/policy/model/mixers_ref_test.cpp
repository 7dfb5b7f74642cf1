// The reference itself: against the golden cases, which another program computed in float64. And the tape that gives it
// gradients: against derivatives written down by hand.
#include "tests/policy/model/mixers_ref.h"

#include <gtest/gtest.h>

#include "base/file.h"
#include "policy/weights/safetensors.h"
#include "tests/policy/model/tape.h"

namespace perigee::policy {
namespace {

using nlohmann::json;
using reference::Tensors;

class ReferenceGolden : public ::testing::TestWithParam<const char*> {};
INSTANTIATE_TEST_SUITE_P(Mixers, ReferenceGolden, ::testing::Values("tiny", "grouped"));

// The expected logits are float32 roundings of float64 ones.
TEST_P(ReferenceGolden, LogitsAreThoseOfTheOtherProgram) {
  const std::string directory = std::string(PERIGEE_SOURCE_DIR) + "/tests/golden/" + GetParam();
  const json config = json::parse(read_file(directory + "/config.json"));
  const SafetensorsFile file(directory + "/model.safetensors"), expected(directory + "/expected.safetensors");
  Tensors<double> tensors;
  for (const TensorView& t : file.tensors())
    for (const float v : to_float32(t)) tensors[t.name].push_back(v);
  reference::Model<double> model(config, tensors);
  const auto vocab = config.at("vocab_size").get<size_t>();
  double worst = 0;
  for (const char* prompt : {"prompt.0.", "prompt.1."}) {
    const std::vector<int64_t> ids = to_int64(*expected.find(prompt + std::string("ids")));
    const std::vector<float> logits = to_float32(*expected.find(prompt + std::string("logits")));
    model.reset();
    for (size_t t = 0; t < ids.size(); ++t) {
      const std::vector<double> got = model.step(static_cast<int32_t>(ids[t]));
      double sum = 0;
      for (size_t i = 0; i < vocab; ++i) sum += std::exp(double{logits[t * vocab + i]});
      for (size_t i = 0; i < vocab; ++i)
        worst = std::max(worst, std::abs(got[i] - (logits[t * vocab + i] - std::log(sum))));
    }
  }
  std::printf("reference against golden %s: %.2g\n", GetParam(), worst);
  EXPECT_LT(worst, 2e-6);
}

// y = a * exp(b) / sqrt(1 + a) - log(b) log1p(a), whose derivatives anyone can write down.
TEST(Tape, KnowsTheDerivativesOfWhatItRecords) {
  using reference::Var;
  reference::Tape<double> tape;
  const double x = 0.7, z = 1.9;
  const Var<double> a = tape.leaf(x), b = tape.leaf(z), one(1);
  const Var<double> y = a * exp(b) / sqrt(one + a) - log(b) * log1p(a) + a;
  const std::vector<double> d = tape.gradient(y);
  const double e = std::exp(z), root = std::sqrt(1 + x);
  EXPECT_NEAR(y.value, x * e / root - std::log(z) * std::log1p(x) + x, 1e-14);
  EXPECT_NEAR(d[static_cast<size_t>(a.node)],
              e / root - x * e / (2 * root * root * root) - std::log(z) / (1 + x) + 1, 1e-14);
  EXPECT_NEAR(d[static_cast<size_t>(b.node)], x * e / root - std::log1p(x) / z, 1e-14);
}

}  // namespace
}  // namespace perigee::policy
