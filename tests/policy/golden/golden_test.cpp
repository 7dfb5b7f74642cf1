// The model on the CPU against the golden cases. Each case prints one line with its largest errors.
#include "kernels/optim/optim.h"
#include "kernels/vocab/vocab.h"
#include "policy/memory/state_pool.h"
#include "tests/policy/golden/golden_case.h"

namespace perigee::policy {
namespace {

using namespace kernels;
using namespace testing;

class Golden : public GoldenCase {};

TEST_P(Golden, LogitsHiddenStatesAndExperts) {
  const int64_t D = config().hidden_size;
  double logits = 0, hidden = 0, state = 0;
  int prompts = 0, experts_wrong = 0, experts_seen = 0;
  for (int n = 0; has("prompt." + std::to_string(n) + ".ids"); ++n, ++prompts) {
    const std::string prefix = "prompt." + std::to_string(n) + ".";
    const auto ids = ints(prefix + "ids");
    const auto rows = static_cast<int64_t>(ids.size());
    StatePool pool(layout(), int64_t{1} << 28);
    SequenceState sequence = pool.create();
    const SequenceSlice slice = sequence.extend(0, rows);
    std::vector<float> out(static_cast<size_t>(rows * D));
    forward(ctx_, weights(), pool.layout(), ids, {&slice, 1}, out.data(), [&](int64_t layer, const float* x, const int32_t* chosen) {
      const std::string l = std::to_string(layer);
      if (has(prefix + "hidden." + l)) hidden = std::max(hidden, relative_difference({x, x + rows * D}, floats(prefix + "hidden." + l)));
      if (chosen != nullptr && has(prefix + "experts." + l)) {
        const auto want = ints(prefix + "experts." + l);
        for (size_t i = 0; i < want.size(); ++i, ++experts_seen) experts_wrong += want[i] != chosen[i];
      }
    });
    for (int64_t layer = 0; layer < config().num_layers; ++layer) {
      if (!has(prefix + "state." + std::to_string(layer))) continue;
      const KdaShape shape{config().linear_heads, config().linear_head_dim, config().linear_head_dim};
      const auto got = materialised_state(reinterpret_cast<float*>(slice.recurrent + pool.layout().state_offset(layer)), shape, rows);
      state = std::max(state, relative_difference(got, floats(prefix + "state." + std::to_string(layer))));
    }
    logits = std::max(logits, largest_difference(logits_of(out.data(), rows), floats(prefix + "logits")));
  }
  std::printf("golden %s: %d prompts, logits %.2e, hidden %.2e, KDA states %.2e, experts %d of %d wrong\n", name().c_str(), prompts, logits, hidden, state,
              experts_wrong, experts_seen);
  EXPECT_GT(prompts, 0);
  EXPECT_LE(logits, kLogitTolerance);
  EXPECT_LE(hidden, kHiddenTolerance);
  EXPECT_LE(state, kStateTolerance);
  EXPECT_EQ(experts_wrong, 0);
}

TEST_P(Golden, GreedyText) {
  Engine engine(ctx_, layout(), {});
  engine.set_weights(data_, 0);
  expect_greedy_text(engine);
}

// L = -(1/M) sum of weights[t] log p(ids[t+1]), through the pass the trainer uses, kept and recomputed.
TEST_P(Golden, GradientsAndAdamW) {
  const int64_t D = config().hidden_size;
  const GradientInput in = gradient_input();
  const auto M = static_cast<int64_t>(in.rows.size());
  std::vector<float> gradient[2];
  for (const bool recompute : {false, true}) {
    std::vector<float>& grad = gradient[recompute];
    grad.assign(static_cast<size_t>(layout().elements()), 0);
    TrainPass pass(ctx_, weights(), recompute);
    const float* hidden = pass.forward(in.tokens, in.lengths);
    std::vector<float> x(static_cast<size_t>(M * D)), dx(x.size()), logprob(static_cast<size_t>(M)), lse(logprob);
    for (int64_t i = 0; i < M; ++i) std::copy_n(hidden + in.rows[static_cast<size_t>(i)] * D, D, x.data() + i * D);
    const kernels::Weight head = weights().matrix(layout().head());
    vocab_logprob_forward(ctx_, M, x.data(), D, head, 1.0f, in.targets.data(), logprob.data(), lse.data(), nullptr);
    const std::vector<float> dlogprob = in.dlogprob();
    if (!recompute) {
      EXPECT_NEAR(in.loss(logprob), floats("grad.loss")[0], 1e-5);
      EXPECT_LE(largest_difference(logprob, in.logprobs), kLogitTolerance);
    }
    vocab_logprob_backward(ctx_, M, x.data(), D, head, 1.0f, in.targets.data(), lse.data(), nullptr, dlogprob.data(), nullptr, dx.data(), D,
                           grad.data() + layout().tensor(layout().head()).element_offset);
    std::vector<float> dhidden(static_cast<size_t>(static_cast<int64_t>(in.tokens.size()) * D));
    for (int64_t i = 0; i < M; ++i) std::copy_n(dx.data() + i * D, D, dhidden.data() + in.rows[static_cast<size_t>(i)] * D);
    pass.backward(dhidden.data(), grad.data());
  }
  EXPECT_EQ(gradient[0], gradient[1]) << "recomputed activations must give the same bits";
  expect_gradient(gradient[0]);

  std::vector<float> next = flat(), m(next.size()), v(next.size());
  adamw_step(ctx_, adamw(), static_cast<int64_t>(next.size()), next.data(), next.data(), gradient[0].data(), m.data(), v.data());
  expect_adamw(next);
}

INSTANTIATE_TEST_SUITE_P(Cases, Golden, ::testing::ValuesIn(cases()), case_name);

}  // namespace
}  // namespace perigee::policy
