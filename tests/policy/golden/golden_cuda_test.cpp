// The float32 path of a GPU against the golden cases, within the tolerances that hold for the CPU.
#include "kernels/device/device.h"
#include "policy/device/backend.h"
#include "policy/device/learn.h"
#include "tests/policy/golden/golden_case.h"

namespace perigee::policy {
namespace {

using namespace kernels;
using namespace testing;

class DeviceGolden : public GoldenCase {
 protected:
  static Device& device() {
    static Device d(0, int64_t{2} << 30);
    return d;
  }
  void SetUp() override {
    if (Device::count() == 0) GTEST_SKIP() << "skipped: " << Device::why_none();
    GoldenCase::SetUp();
  }
};

TEST_P(DeviceGolden, LogitsAndStates) {
  const std::unique_ptr<Backend> backend = device_backend(device(), layout(), EngineConfig{});
  backend->set_weights(data_);
  StatePool& pool = backend->pool();
  double logits = 0, state = 0;
  int prompts = 0;
  for (int n = 0; has("prompt." + std::to_string(n) + ".ids"); ++n, ++prompts) {
    const std::string prefix = "prompt." + std::to_string(n) + ".";
    const auto ids = ints(prefix + "ids");
    const auto rows = static_cast<int64_t>(ids.size());
    // A pass returns the logits of its last row: a pass for every token, all of them decoding steps, gives all.
    SequenceState sequence = pool.create();
    std::vector<float> got(static_cast<size_t>(rows * config().vocab_size));
    SequenceSlice slice;
    const uint8_t wanted = 1;
    for (int64_t t = 0; t < rows; ++t) {
      slice = sequence.extend(0, 1);
      const float* row = backend->forward({&ids[static_cast<size_t>(t)], 1}, {&slice, 1}, {&wanted, 1}, {});
      device().copy_out(got.data() + t * config().vocab_size, row, config().vocab_size * 4);
      sequence.advance(1);
      backend->end_step();
    }
    // And all tokens in one.
    SequenceState whole = pool.create();
    slice = whole.extend(0, rows);
    std::vector<float> last(static_cast<size_t>(config().vocab_size));
    device().copy_out(last.data(), backend->forward(ids, {&slice, 1}, {&wanted, 1}, {}), config().vocab_size * 4);
    EXPECT_EQ(last, std::vector<float>(got.end() - config().vocab_size, got.end())) << "prefill against decoding";
    for (int64_t layer = 0; layer < config().num_layers; ++layer) {
      if (!has(prefix + "state." + std::to_string(layer))) continue;
      const KdaShape shape{config().linear_heads, config().linear_head_dim, config().linear_head_dim};
      std::vector<float> recurrent(static_cast<size_t>(pool.layout().recurrent_bytes() / 4));
      device().copy_out(recurrent.data(), slice.recurrent, pool.layout().recurrent_bytes());
      const auto materialised = materialised_state(recurrent.data() + pool.layout().state_offset(layer) / 4, shape, rows);
      state = std::max(state, relative_difference(materialised, floats(prefix + "state." + std::to_string(layer))));
    }
    backend->end_step();
    logits = std::max(logits, largest_difference(got, floats(prefix + "logits")));
  }
  std::printf("golden %s on a GPU: %d prompts, logits %.2e, KDA states %.2e\n", name().c_str(), prompts, logits, state);
  EXPECT_GT(prompts, 0);
  EXPECT_LE(logits, kLogitTolerance);
  EXPECT_LE(state, kStateTolerance);
}

TEST_P(DeviceGolden, GreedyText) {
  Engine engine(device_backend(device(), layout(), EngineConfig{}), layout(), {});
  engine.set_weights(data_, 0);
  expect_greedy_text(engine);
}

TEST_P(DeviceGolden, GradientsAndAdamW) {
  const GradientInput in = gradient_input();
  MicroBatch batch;
  batch.tokens = in.tokens;
  batch.lengths = in.lengths;
  batch.rows = in.rows;
  batch.targets = in.targets;
  const std::unique_ptr<LearnBackend> backend = device_learn_backend(device(), layout(), true);
  backend->set_weights(data_);
  const LearnBackend::Scores scores = backend->forward(batch, true);
  const std::vector<float> logprob(scores.logprob, scores.logprob + batch.entries());
  EXPECT_NEAR(in.loss(logprob), floats("grad.loss")[0], 1e-5);
  EXPECT_LE(largest_difference(logprob, in.logprobs), kLogitTolerance);
  backend->zero_gradient();
  backend->backward(batch, in.dlogprob().data(), nullptr);
  std::vector<float> gradient(static_cast<size_t>(layout().elements()));
  backend->read_gradient(gradient.data());
  expect_gradient(gradient);

  std::vector<std::byte> next_weights(static_cast<size_t>(layout().weight_bytes()));
  backend->update(adamw(), next_weights.data());
  backend->finish(next_weights.data());
  std::vector<float> next(flat().size());
  layout().weights_to_flat(next_weights.data(), next.data());
  expect_adamw(next);
}

INSTANTIATE_TEST_SUITE_P(Cases, DeviceGolden, ::testing::ValuesIn(cases()), case_name);

}  // namespace
}  // namespace perigee::policy
