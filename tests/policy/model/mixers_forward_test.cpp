// What every mixer computes, against the float64 reference of whole models.
#include <gtest/gtest.h>

#include "policy/learn/trainer.h"
#include "tests/policy/model/mixers_model.h"

namespace perigee::policy {
namespace {

using testing::MixersCase;
using testing::MixersModel;

struct Computed {
  std::vector<double> hidden, layers, logprobs;  // of all positions; of every token but the first
};

template <class T>
Computed by_reference(const MixersModel& model, const std::vector<int32_t>& tokens) {
  const reference::Tensors<T> tensors = model.tensors<T>();
  reference::Model<T> reference(model.config, tensors);
  Computed out;
  for (size_t t = 0; t < tokens.size(); ++t) {
    const std::vector<T> next = reference.step(tokens[t]);
    out.hidden.insert(out.hidden.end(), reference.hidden().begin(), reference.hidden().end());
    for (const auto& x : reference.layers()) out.layers.insert(out.layers.end(), x.begin(), x.end());
    if (t + 1 < tokens.size()) out.logprobs.push_back(next[static_cast<size_t>(tokens[t + 1])]);
  }
  return out;
}

Computed by_the_model(MixersModel& model, const std::vector<int32_t>& tokens) {
  kernels::Context ctx(2);
  const auto n = static_cast<int64_t>(tokens.size()), D = model.layout.config().hidden_size,
             L = model.layout.config().num_layers;
  Computed out;
  out.layers.resize(static_cast<size_t>(n * L * D));
  TrainPass pass(ctx, model.view(), false);
  const float* hidden = pass.forward(tokens, {{n}}, [&](int64_t layer, const float* x, const int32_t*) {
    for (int64_t t = 0; t < n; ++t)
      for (int64_t i = 0; i < D; ++i) out.layers[static_cast<size_t>((t * L + layer) * D + i)] = x[t * D + i];
  });
  out.hidden.assign(hidden, hidden + n * D);
  Trainer trainer(ctx, model.layout, {});
  TrainSequence q;
  q.tokens = tokens;
  q.mask.assign(tokens.size(), 0);
  q.curated = true;
  const std::vector<float> logprobs = trainer.logprobs(model.weights(), {q});
  out.logprobs.assign(logprobs.begin() + 1, logprobs.end());
  return out;
}

double root_mean_square(const std::vector<double>& a, const std::vector<double>& b) {
  EXPECT_EQ(a.size(), b.size());
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += (a[i] - b[i]) * (a[i] - b[i]);
  return std::sqrt(sum / static_cast<double>(a.size()));
}
double largest(const std::vector<double>& a, const std::vector<double>& b) {
  double worst = 0;
  for (size_t i = 0; i < a.size(); ++i) worst = std::max(worst, std::abs(a[i] - b[i]));
  return worst;
}

class Mixers : public ::testing::TestWithParam<MixersCase> {};
INSTANTIATE_TEST_SUITE_P(Forward, Mixers, ::testing::ValuesIn(testing::mixers_cases()),
                         [](const auto& info) { return info.param.name; });

// Heads as models have them.
std::vector<MixersCase> wide_cases() {
  std::vector<MixersCase> out;
  for (const char* mixer : {"kda", "gdn", "mamba2", "dplr", "mla_rope", "attention"})
    out.push_back(testing::mixers_case(
        std::string("wide_") + mixer, {mixer}, 1,
        R"({"linear_attn_config": {"num_heads": 2, "head_dim": 128}, "head_dim": 128, "kv_lora_rank": 96,
                                           "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128})"));
  return out;
}
INSTANTIATE_TEST_SUITE_P(Wide, Mixers, ::testing::ValuesIn(wide_cases()),
                         [](const auto& info) { return info.param.name; });

// The bound is what float32 costs when the same equations are computed plainly, token by token: the model's own order of
// operations (chunks, absorbed matrices, blocks of keys) is another, and about as good. Seen over all cases: up to 1.2
// times that error by root mean square, 2.3 times at the worst place. A wrong term is off by 10^4 times as much.
void expect_equations(MixersModel& model, const std::string& name) {
  const std::vector<int32_t> tokens = testing::random_tokens(131, model.vocab(), 12);
  const Computed truth = by_reference<double>(model, tokens), plain = by_reference<float>(model, tokens),
                 got = by_the_model(model, tokens);
  const auto compare = [&](const char* what, const std::vector<double> Computed::*of) {
    const double bound = root_mean_square(plain.*of, truth.*of), error = root_mean_square(got.*of, truth.*of);
    const double ratio = error / bound, peak = largest(got.*of, truth.*of) / largest(plain.*of, truth.*of);
    std::printf("%s %s: error %.2g, %.2f of plain float32's; largest %.2f of its\n", name.c_str(), what,
                error, ratio, peak);
    EXPECT_LT(ratio, 2) << what;
    EXPECT_LT(peak, 4) << what;
  };
  compare("layers", &Computed::layers);
  compare("hidden", &Computed::hidden);
  compare("logprobs", &Computed::logprobs);
}

TEST_P(Mixers, ComputeTheirEquations) {
  MixersModel model(GetParam().config, 11);
  expect_equations(model, GetParam().name);
}

TEST(MixersDecay, FromNoneToAllAtOnce) {
  for (const char* mixer : {"kda", "gdn", "mamba2", "dplr"}) {
    MixersModel model(testing::mixers_config({mixer}, 1), 18);
    testing::make_decays_extreme(model);
    expect_equations(model, std::string(mixer) + " with extreme decays");
  }
}

std::vector<float> values_of(MixersModel& model, const std::string& name) {
  std::vector<float> out;
  model.change("self_attn." + name, [&](std::vector<float>& x) { out = x; });
  return out;
}

constexpr size_t kHead = 16;  // channels

// Every channel of a head as its first: rows of `row` values.
void one_a_head(std::vector<float>& x, size_t row) {
  for (size_t i = 0; i < x.size(); ++i) x[i] = x[i / (kHead * row) * kHead * row + i % row];
}
// The rows of W_b W_a that stand for the heads.
std::vector<float> product(MixersModel& model, const std::string& a_name, const std::string& b_name) {
  const std::vector<float> a = values_of(model, a_name), b = values_of(model, b_name);
  const size_t D = a.size() / kHead;
  std::vector<float> out;
  for (size_t row = 0; row < b.size() / kHead; row += kHead)
    for (size_t j = 0; j < D; ++j) {
      double sum = 0;
      for (size_t i = 0; i < kHead; ++i) sum += double{b[row * kHead + i]} * a[i * D + j];
      out.push_back(static_cast<float>(sum));
    }
  return out;
}

void expect_the_same(MixersModel& a, MixersModel& b) {
  const std::vector<int32_t> tokens = testing::random_tokens(90, a.vocab(), 15);
  const std::vector<double> x = by_the_model(a, tokens).hidden, y = by_the_model(b, tokens).hidden;
  EXPECT_LT(root_mean_square(x, y), 4e-6);  // float32, by other operations; the errors above are up to 1e-6
}

// docs/mixers.md says which mixer is another with some of its numbers alike.
TEST(MixersContain, DplrOfOneStrengthAHeadWithoutDecayIsTheDeltaRule) {
  MixersModel dplr(testing::mixers_config({"dplr"}, 1), 14), gdn(testing::mixers_config({"gdn"}, 1), 14);
  dplr.change("self_attn.e_b_proj.weight", [](std::vector<float>& x) { one_a_head(x, kHead); });
  const std::vector<float> strength = product(dplr, "e_a_proj.weight", "e_b_proj.weight");
  gdn.change("self_attn.b_proj.weight", [&](std::vector<float>& x) { x = strength; });
  for (MixersModel* m : {&dplr, &gdn})
    m->change("self_attn.dt_bias", [](std::vector<float>& x) { x.assign(x.size(), -200.0f); });
  expect_the_same(dplr, gdn);
}

TEST(MixersContain, KdaOfOneDecayAHeadIsGdn) {
  MixersModel kda(testing::mixers_config({"kda"}, 1), 16), gdn(testing::mixers_config({"gdn"}, 1), 16);
  kda.change("self_attn.f_b_proj.weight", [](std::vector<float>& x) { one_a_head(x, kHead); });
  kda.change("self_attn.dt_bias", [](std::vector<float>& x) { one_a_head(x, 1); });
  const std::vector<float> decay = product(kda, "f_a_proj.weight", "f_b_proj.weight"),
                           bias = values_of(kda, "dt_bias");
  gdn.change("self_attn.a_proj.weight", [&](std::vector<float>& x) { x = decay; });
  gdn.change("self_attn.dt_bias", [&](std::vector<float>& x) {
    for (size_t head = 0; head < x.size(); ++head) x[head] = bias[head * kHead];
  });
  expect_the_same(kda, gdn);
}

}  // namespace
}  // namespace perigee::policy
