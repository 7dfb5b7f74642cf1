// The model against cases computed in float64 by an independent program: tests/golden, and every case under the
// directory in PERIGEE_GOLDEN. Each case prints one line with its largest errors.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <map>

#include "kernels/kda/kda.h"
#include "kernels/optim/optim.h"
#include "kernels/vocab/vocab.h"
#include "policy/engine/engine.h"
#include "policy/memory/state_pool.h"
#include "policy/weights/checkpoint.h"
#include "policy/weights/safetensors.h"

namespace perigee::policy {
namespace {

namespace fs = std::filesystem;
using namespace kernels;

// From the cases' own description: a float32 implementation lands within these.
constexpr double kLogitTolerance = 2e-4;
// Hidden states and KDA states have no bound of their own there; they are O(1) to O(50), so theirs is relative to the
// largest value of the tensor, at about 200 roundings of 2^-24.
constexpr double kHiddenTolerance = 1.2e-5;
constexpr double kStateTolerance = 1.2e-5;
constexpr double kGradientTolerance = 1e-3;  // of the tensor's norm
constexpr double kAdamTolerance = 2e-5;      // lr 1e-3: an update is about 1e-3, its sign must be right

std::vector<std::string> cases() {
  std::vector<std::string> out;
  const auto scan = [&](const fs::path& directory) {
    for (const auto& entry : fs::directory_iterator(directory))
      if (fs::exists(entry.path() / "expected.safetensors")) out.push_back(entry.path().string());
  };
  scan(fs::path(PERIGEE_SOURCE_DIR) / "tests/golden");
  if (const char* more = std::getenv("PERIGEE_GOLDEN")) scan(more);
  std::sort(out.begin(), out.end());
  return out;
}

class Golden : public ::testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    expected_ = std::make_unique<SafetensorsFile>(GetParam() + "/expected.safetensors");
    model_ = load_model(GetParam(), Dtype::kF32);
    arena_.resize(static_cast<size_t>(layout().weight_bytes()) + 64);
    data_ = arena_.data() + (64 - reinterpret_cast<uintptr_t>(arena_.data()) % 64) % 64;
    layout().flat_to_weights(model_.flat.data(), data_);
  }
  const ParamLayout& layout() const { return *model_.layout; }
  const ModelConfig& config() const { return layout().config(); }
  Weights weights() const { return {&layout(), data_}; }
  std::string name() const { return fs::path(GetParam()).filename().string(); }

  bool has(const std::string& tensor) const { return expected_->find(tensor) != nullptr; }
  std::vector<float> floats(const std::string& tensor) const {
    EXPECT_TRUE(has(tensor)) << tensor;
    return to_float32(*expected_->find(tensor));
  }
  std::vector<int32_t> ints(const std::string& tensor) const {
    EXPECT_TRUE(has(tensor)) << tensor;
    const auto wide = to_int64(*expected_->find(tensor));
    return {wide.begin(), wide.end()};
  }
  std::vector<float> logits_of(const float* hidden, int64_t rows) {
    std::vector<float> out(static_cast<size_t>(rows * config().vocab_size));
    const MatmulTask head{weights().matrix(layout().head()), hidden, config().hidden_size, rows, out.data(), config().vocab_size};
    matmul(ctx_, {&head, 1});
    return out;
  }

  Context ctx_{2};
  std::unique_ptr<SafetensorsFile> expected_;
  LoadedModel model_;
  std::vector<std::byte> arena_;
  std::byte* data_ = nullptr;
};

double largest_difference(const std::vector<float>& got, const std::vector<float>& want) {
  EXPECT_EQ(got.size(), want.size());
  double worst = 0;
  for (size_t i = 0; i < std::min(got.size(), want.size()); ++i) {
    const double d = std::abs(static_cast<double>(got[i]) - want[i]);
    worst = std::isnan(d) ? INFINITY : std::max(worst, d);
  }
  return worst;
}

double relative_difference(const std::vector<float>& got, const std::vector<float>& want) {
  double largest = 0;
  for (float x : want) largest = std::max(largest, std::abs(static_cast<double>(x)));
  return largest_difference(got, want) / largest;
}

// S after the last token, whatever the open chunk holds: Diag(Gamma) S + sum_j K~_j u_jᵀ (kernels/kda/kda.h).
std::vector<float> materialised_state(const float* state, const KdaShape& s, int64_t position) {
  const int64_t open = position % kKdaChunk;
  std::vector<float> out(static_cast<size_t>(s.heads * s.dk * s.dv));
  const float* gamma = state + s.heads * s.dk * s.dv;
  const float* keys = gamma + s.heads * s.dk;
  const float* u = keys + s.heads * kKdaChunk * s.dk;
  for (int64_t h = 0; h < s.heads; ++h)
    for (int64_t i = 0; i < s.dk; ++i)
      for (int64_t j = 0; j < s.dv; ++j) {
        double sum = state[(h * s.dk + i) * s.dv + j];
        if (open > 0) sum *= gamma[h * s.dk + i];
        for (int64_t r = 0; r < open; ++r)
          sum += static_cast<double>(keys[(h * s.dk + i) * kKdaChunk + r]) * u[(h * kKdaChunk + r) * s.dv + j];
        out[static_cast<size_t>((h * s.dk + i) * s.dv + j)] = static_cast<float>(sum);
      }
  return out;
}

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
      const KdaShape shape{config().kda_heads, config().kda_head_dim, config().kda_head_dim};
      const auto got = materialised_state(reinterpret_cast<float*>(slice.recurrent + pool.layout().kda_offset(layer)), shape, rows);
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
  const auto want = ints("greedy.prompt1");
  Engine engine(ctx_, layout(), {});
  engine.set_weights(data_, 0);
  GenerationGroup group;
  group.prompt = ints("prompt.1.ids");
  GenerationRequest request;
  request.id = 1;
  request.max_new_tokens = static_cast<int64_t>(want.size());
  request.sampling.temperature = 0;
  group.members.push_back(request);
  engine.submit(group);
  std::vector<GeneratedToken> tokens;
  while (!engine.idle()) engine.step(tokens);
  std::vector<int32_t> got;
  for (const GeneratedToken& t : tokens) got.push_back(t.token);
  std::printf("golden %s: greedy text, %zu tokens %s\n", name().c_str(), want.size(), got == want ? "equal" : "DIFFERENT");
  EXPECT_EQ(got, want);
}

// L = -(1/M) sum of weights[t] log p(ids[t+1]), through the pass the trainer uses, kept and recomputed.
TEST_P(Golden, GradientsAndAdamW) {
  const int64_t D = config().hidden_size;
  std::vector<int32_t> tokens, targets;
  std::vector<int64_t> lengths, rows;
  std::vector<float> token_weights, want_logprobs;
  for (int s = 0; has("grad.seq" + std::to_string(s) + ".ids"); ++s) {
    const std::string prefix = "grad.seq" + std::to_string(s) + ".";
    const auto ids = ints(prefix + "ids");
    for (size_t t = 0; t + 1 < ids.size(); ++t) {
      rows.push_back(static_cast<int64_t>(tokens.size() + t));
      targets.push_back(ids[t + 1]);
    }
    const auto w = floats(prefix + "weights"), l = floats(prefix + "logprobs");
    token_weights.insert(token_weights.end(), w.begin(), w.end());
    want_logprobs.insert(want_logprobs.end(), l.begin(), l.end());
    lengths.push_back(static_cast<int64_t>(ids.size()));
    tokens.insert(tokens.end(), ids.begin(), ids.end());
  }
  const auto M = static_cast<int64_t>(rows.size());
  std::vector<float> gradient[2];
  for (const bool recompute : {false, true}) {
    std::vector<float>& grad = gradient[recompute];
    grad.assign(static_cast<size_t>(layout().elements()), 0);
    TrainPass pass(ctx_, weights(), recompute);
    const float* hidden = pass.forward(tokens, lengths);
    std::vector<float> x(static_cast<size_t>(M * D)), dx(x.size()), logprob(static_cast<size_t>(M)), lse(logprob), dlogprob(logprob);
    for (int64_t i = 0; i < M; ++i) std::copy_n(hidden + rows[static_cast<size_t>(i)] * D, D, x.data() + i * D);
    const kernels::Weight head = weights().matrix(layout().head());
    vocab_logprob_forward(ctx_, M, x.data(), D, head, 1.0f, targets.data(), logprob.data(), lse.data(), nullptr);
    double loss = 0;
    for (size_t i = 0; i < logprob.size(); ++i) {
      loss -= static_cast<double>(token_weights[i]) * logprob[i] / static_cast<double>(M);
      dlogprob[i] = -token_weights[i] / static_cast<float>(M);
    }
    if (!recompute) {
      EXPECT_NEAR(loss, floats("grad.loss")[0], 1e-5);
      EXPECT_LE(largest_difference(logprob, want_logprobs), kLogitTolerance);
    }
    vocab_logprob_backward(ctx_, M, x.data(), D, head, 1.0f, targets.data(), lse.data(), nullptr, dlogprob.data(), nullptr, dx.data(), D,
                           grad.data() + layout().tensor(layout().head()).element_offset);
    std::vector<float> dhidden(static_cast<size_t>(static_cast<int64_t>(tokens.size()) * D));
    for (int64_t i = 0; i < M; ++i) std::copy_n(dx.data() + i * D, D, dhidden.data() + rows[static_cast<size_t>(i)] * D);
    pass.backward(dhidden.data(), grad.data());
  }
  EXPECT_EQ(gradient[0], gradient[1]) << "recomputed activations must give the same bits";

  double worst = 0;
  std::string worst_name;
  int compared = 0;
  for (const CheckpointTensor& t : layout().checkpoint()) {
    if (!has("grad.d." + t.name)) {
      EXPECT_FALSE(layout().tensor(t.tensor).trained) << "no expected gradient for " << t.name;
      continue;
    }
    const auto want = floats("grad.d." + t.name);
    std::vector<float> got(want.size());
    layout().read_flat(gradient[0].data(), t, got.data());
    double difference = 0, norm = 0;
    for (size_t i = 0; i < want.size(); ++i) {
      difference += (static_cast<double>(got[i]) - want[i]) * (static_cast<double>(got[i]) - want[i]);
      norm += static_cast<double>(want[i]) * want[i];
    }
    const double relative = norm > 0 ? std::sqrt(difference / norm) : std::sqrt(difference);
    if (!(relative <= worst)) {
      worst = relative;
      worst_name = t.name;
    }
    ++compared;
  }

  AdamWParams adam;
  adam.weight_decay = 0.1f;
  std::vector<float> next = model_.flat, m(next.size()), v(next.size());
  adamw_step(ctx_, adam, static_cast<int64_t>(next.size()), next.data(), next.data(), gradient[0].data(), m.data(), v.data());
  double adam_error = 0;
  int adam_tensors = 0;
  for (const CheckpointTensor& t : layout().checkpoint()) {
    if (!has("adamw." + t.name)) continue;
    const auto want = floats("adamw." + t.name);
    std::vector<float> got(want.size());
    layout().read_flat(next.data(), t, got.data());
    adam_error = std::max(adam_error, largest_difference(got, want));
    ++adam_tensors;
  }
  std::printf("golden %s: %d gradients, worst %.2e of its norm (%s); AdamW of %d tensors %.2e\n", name().c_str(), compared, worst, worst_name.c_str(),
              adam_tensors, adam_error);
  EXPECT_GT(compared, 0);
  EXPECT_GT(adam_tensors, 0);
  EXPECT_LE(worst, kGradientTolerance) << worst_name;
  EXPECT_LE(adam_error, kAdamTolerance);
}

INSTANTIATE_TEST_SUITE_P(Cases, Golden, ::testing::ValuesIn(cases()), [](const auto& info) {
  std::string name = fs::path(info.param).filename().string();
  for (char& c : name)
    if (!std::isalnum(static_cast<unsigned char>(c))) c = '_';
  return name + "_" + std::to_string(info.index);
});

}  // namespace
}  // namespace perigee::policy
