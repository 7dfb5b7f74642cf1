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

// The bound is what float32 costs when the same equations are computed plainly, token by token: the model's own order of
// operations (chunks, absorbed matrices, blocks of keys) is another, and about as good. Seen over all cases: up to 1.2
// times that error by root mean square, 2.3 times at the worst place. A wrong term is off by 10^4 times as much.
TEST_P(Mixers, ComputeTheirEquations) {
  MixersModel model(GetParam().config, 11);
  const std::vector<int32_t> tokens = testing::random_tokens(131, model.vocab(), 12);
  const Computed truth = by_reference<double>(model, tokens), plain = by_reference<float>(model, tokens),
                 got = by_the_model(model, tokens);
  const auto compare = [&](const char* what, const std::vector<double> Computed::*of) {
    const double bound = root_mean_square(plain.*of, truth.*of), error = root_mean_square(got.*of, truth.*of);
    const double ratio = error / bound, peak = largest(got.*of, truth.*of) / largest(plain.*of, truth.*of);
    std::printf("%s %s: error %.2g, %.2f of plain float32's; largest %.2f of its\n", GetParam().name.c_str(),
                what, error, ratio, peak);
    EXPECT_LT(ratio, 2) << what;
    EXPECT_LT(peak, 4) << what;
  };
  compare("layers", &Computed::layers);
  compare("hidden", &Computed::hidden);
  compare("logprobs", &Computed::logprobs);
}

}  // namespace
}  // namespace perigee::policy
