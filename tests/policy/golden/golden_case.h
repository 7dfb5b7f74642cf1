// The cases computed in float64 by an independent program, and how they are compared: shared by the tests of the CPU and of
// a GPU. tests/golden, and every case under the directory in PERIGEE_GOLDEN.
#pragma once
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "kernels/gemm/gemm.h"
#include "kernels/kda/kda.h"
#include "kernels/optim/params.h"
#include "policy/engine/engine.h"
#include "policy/weights/checkpoint.h"
#include "policy/weights/safetensors.h"

namespace perigee::policy::testing {

namespace fs = std::filesystem;
using namespace kernels;

// From the cases' own description: a float32 implementation lands within these.
inline constexpr double kLogitTolerance = 2e-4;
// Hidden states and KDA states have no bound of their own there; they are O(1) to O(50), so theirs is relative to the
// largest value of the tensor, at about 200 roundings of 2^-24.
inline constexpr double kHiddenTolerance = 1.2e-5;
inline constexpr double kStateTolerance = 1.2e-5;
inline constexpr double kGradientTolerance = 1e-3;  // of the tensor's norm
inline constexpr double kAdamTolerance = 2e-5;      // lr 1e-3: an update is about 1e-3, its sign must be right

inline std::vector<std::string> cases() {
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

inline double largest_difference(const std::vector<float>& got, const std::vector<float>& want) {
  EXPECT_EQ(got.size(), want.size());
  double worst = 0;
  for (size_t i = 0; i < std::min(got.size(), want.size()); ++i) {
    const double d = std::abs(static_cast<double>(got[i]) - want[i]);
    worst = std::isnan(d) ? INFINITY : std::max(worst, d);
  }
  return worst;
}

inline double relative_difference(const std::vector<float>& got, const std::vector<float>& want) {
  double largest = 0;
  for (float x : want) largest = std::max(largest, std::abs(static_cast<double>(x)));
  return largest_difference(got, want) / largest;
}

// S after the last token, whatever the open chunk holds: Diag(Gamma) S + sum_j K~_j u_jᵀ (kernels/kda/kda.h).
inline std::vector<float> materialised_state(const float* state, const KdaShape& s, int64_t position) {
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

// The sequences that the expected gradient is of: L = -(1/M) sum of weights[t] log p(ids[t+1]).
struct GradientInput {
  std::vector<int32_t> tokens, targets;
  std::vector<int64_t> lengths, rows;
  std::vector<float> weights, logprobs;
  std::vector<float> dlogprob() const {
    std::vector<float> d;
    for (float w : weights) d.push_back(-w / static_cast<float>(weights.size()));
    return d;
  }
  double loss(std::span<const float> logprob) const {
    double sum = 0;
    for (size_t i = 0; i < weights.size(); ++i) sum -= static_cast<double>(weights[i]) * logprob[i] / static_cast<double>(weights.size());
    return sum;
  }
};

class GoldenCase : public ::testing::TestWithParam<std::string> {
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
  GradientInput gradient_input() const;
  void expect_gradient(const std::vector<float>& gradient) const;  // flat
  void expect_adamw(const std::vector<float>& next) const;         // flat weights after a step with adamw()
  static AdamWParams adamw() {
    AdamWParams p;
    p.weight_decay = 0.1f;
    return p;
  }
  // Asks the engine for the text of prompt 1.
  void expect_greedy_text(Engine& engine) const;
  const std::vector<float>& flat() const { return model_.flat; }
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

inline GradientInput GoldenCase::gradient_input() const {
  GradientInput in;
  for (int s = 0; has("grad.seq" + std::to_string(s) + ".ids"); ++s) {
    const std::string prefix = "grad.seq" + std::to_string(s) + ".";
    const auto ids = ints(prefix + "ids");
    for (size_t t = 0; t + 1 < ids.size(); ++t) {
      in.rows.push_back(static_cast<int64_t>(in.tokens.size() + t));
      in.targets.push_back(ids[t + 1]);
    }
    const auto w = floats(prefix + "weights"), l = floats(prefix + "logprobs");
    in.weights.insert(in.weights.end(), w.begin(), w.end());
    in.logprobs.insert(in.logprobs.end(), l.begin(), l.end());
    in.lengths.push_back(static_cast<int64_t>(ids.size()));
    in.tokens.insert(in.tokens.end(), ids.begin(), ids.end());
  }
  return in;
}

inline void GoldenCase::expect_gradient(const std::vector<float>& gradient) const {
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
    layout().read_flat(gradient.data(), t, got.data());
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
  std::printf("golden %s: %d gradients, worst %.2e of its norm (%s)\n", name().c_str(), compared, worst, worst_name.c_str());
  EXPECT_GT(compared, 0);
  EXPECT_LE(worst, kGradientTolerance) << worst_name;
}

inline void GoldenCase::expect_adamw(const std::vector<float>& next) const {
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
  std::printf("golden %s: AdamW of %d tensors %.2e\n", name().c_str(), adam_tensors, adam_error);
  EXPECT_GT(adam_tensors, 0);
  EXPECT_LE(adam_error, kAdamTolerance);
}

inline void GoldenCase::expect_greedy_text(Engine& engine) const {
  const auto want = ints("greedy.prompt1");
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

inline std::string case_name(const ::testing::TestParamInfo<std::string>& info) {
  std::string name = fs::path(info.param).filename().string();
  for (char& c : name)
    if (!std::isalnum(static_cast<unsigned char>(c))) c = '_';
  return name + "_" + std::to_string(info.index);
}

}  // namespace perigee::policy::testing
