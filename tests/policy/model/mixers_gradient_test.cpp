// Backward passes of every mixer against the float64 reference: differences of its loss, and its own reverse mode.
#include <gtest/gtest.h>

#include "policy/learn/trainer.h"
#include "tests/policy/model/mixers_model.h"
#include "tests/policy/model/tape.h"

namespace perigee::policy {
namespace {

using reference::Tape;
using reference::Tensors;
using reference::Var;
using testing::MixersCase;
using testing::MixersModel;

using Sequences = std::vector<std::vector<int32_t>>;

// The gradient of the mean loss, by tensor of the checkpoint.
std::map<std::string, std::vector<float>> by_the_model(MixersModel& model, const Sequences& sequences,
                                                       bool recompute, int threads = 2,
                                                       int64_t micro_batch_tokens = 8192) {
  kernels::Context ctx(threads);
  TrainerConfig config;
  config.recompute = recompute;
  config.micro_batch_tokens = micro_batch_tokens;
  Trainer trainer(ctx, model.layout, config);
  std::vector<TrainSequence> batch;
  for (const auto& s : sequences) {
    TrainSequence q;
    q.tokens = s;
    q.mask.assign(s.size(), 1);
    q.mask[0] = 0;
    q.curated = true;
    batch.push_back(q);
  }
  std::vector<float> flat(static_cast<size_t>(model.layout.elements()));
  trainer.gradients(model.weights(), batch, flat.data());
  std::map<std::string, std::vector<float>> out;
  for (const CheckpointTensor& t : model.layout.checkpoint()) out[t.name] = model.values(t, flat.data());
  return out;
}

template <class T>
Tensors<T> by_tape(const MixersModel& model, const Sequences& sequences) {
  Tape<T> tape;
  const auto tensors = model.tensors<Var<T>>([&](float v) { return tape.leaf(v); });
  reference::Model<Var<T>> reference(model.config, tensors);
  const std::vector<T> d = tape.gradient(testing::mean_loss(reference, sequences));
  Tensors<T> out;
  for (const auto& [name, values] : tensors)
    for (const Var<T>& v : values) out[name].push_back(d[static_cast<size_t>(v.node)]);
  return out;
}

template <class A>
double distance(const std::vector<A>& a, const std::vector<double>& b) {
  EXPECT_EQ(a.size(), b.size());
  double sum = 0;
  for (size_t i = 0; i < b.size(); ++i) sum += (a[i] - b[i]) * (a[i] - b[i]);
  return std::sqrt(sum);
}
double norm(const std::vector<double>& a) {
  return distance(std::vector<double>(a.size(), 0), a);
}

class MixersGradient : public ::testing::TestWithParam<MixersCase> {};
INSTANTIATE_TEST_SUITE_P(Mixers, MixersGradient, ::testing::ValuesIn(testing::mixers_cases()),
                         [](const auto& info) { return info.param.name; });

bool trained(const std::string& name) {
  return !name.ends_with("e_score_correction_bias");
}

// Every element of every tensor, over sequences that cross the boundaries of chunks. The bound is what reverse mode of the
// plain recurrence costs in float32, relative to the tensor's norm: in the same tensor, or in the median one where that is
// more. Seen: up to 2.5 times that, and 4.9 in a tensor of three elements, whose errors are a lottery.
void expect_gradient(MixersModel& model, const std::string& title) {
  const Sequences sequences = {testing::random_tokens(21, model.vocab(), 1),
                               testing::random_tokens(2, model.vocab(), 2),
                               testing::random_tokens(16, model.vocab(), 3)};
  const Tensors<double> truth = by_tape<double>(model, sequences);
  const Tensors<float> plain = by_tape<float>(model, sequences);
  const auto got = by_the_model(model, sequences, false);
  std::vector<double> relative;
  for (const auto& [name, want] : truth) {
    if (!trained(name)) continue;
    ASSERT_GT(norm(want), 0) << name << " has no effect";
    relative.push_back(distance(plain.at(name), want) / norm(want));
  }
  std::nth_element(relative.begin(), relative.begin() + relative.size() / 2, relative.end());
  const double typical = relative[relative.size() / 2];
  double worst = 0;
  std::string where;
  for (const auto& [name, want] : truth) {
    if (!trained(name)) continue;
    const double error = distance(got.at(name), want) / norm(want);
    const double ratio = error / std::max(typical, distance(plain.at(name), want) / norm(want));
    if (ratio > worst) worst = ratio, where = name;
    EXPECT_LT(ratio, 8) << name << ": " << error << " of its norm";
  }
  std::printf("%s: gradients at most %.2f of plain float32's error %.2g (%s)\n", title.c_str(), worst,
              typical, where.c_str());
  EXPECT_EQ(by_the_model(model, sequences, true), got) << "recomputed activations must give the same bits";
}

TEST_P(MixersGradient, IsThatOfTheReference) {
  MixersModel model(GetParam().config, 21);
  expect_gradient(model, GetParam().name);
}

TEST(MixersDecay, HasItsGradientFromNoneToAllAtOnce) {
  for (const char* mixer : {"kda", "gdn", "mamba2", "dplr"}) {
    MixersModel model(testing::mixers_config({mixer}, 1), 28);
    testing::make_decays_extreme(model);
    expect_gradient(model, std::string(mixer) + " with extreme decays");
  }
}

// Long enough that every product and recurrence is shared out.
TEST_P(MixersGradient, BitsDoNotDependOnThreads) {
  MixersModel model(GetParam().config, 24);
  Sequences sequences;
  for (const int64_t n : {130, 70, 200, 2, 17})
    sequences.push_back(testing::random_tokens(n, model.vocab(), 25 + static_cast<uint64_t>(n)));
  const auto two = by_the_model(model, sequences, false);
  EXPECT_EQ(by_the_model(model, sequences, false, 1), two);
  EXPECT_EQ(by_the_model(model, sequences, true, 3), two);
  // A sequence at a time: other sums of the same terms, all of them.
  for (const auto& [name, apart] : by_the_model(model, sequences, false, 2, 1)) {
    const std::vector<double> whole(two.at(name).begin(), two.at(name).end());
    EXPECT_LE(distance(apart, whole), 1e-3 * norm(whole)) << name;
  }
}

// A few elements of every tensor, moved a little to both sides in float64. h = 1e-4: the third derivative costs about
// 1e-8 of the value, rounding 1e-12.
TEST_P(MixersGradient, IsTheSlopeOfTheLoss) {
  MixersModel model(GetParam().config, 22);
  const Sequences sequences = {testing::random_tokens(17, model.vocab(), 4),
                               testing::random_tokens(3, model.vocab(), 5)};
  const auto got = by_the_model(model, sequences, false);
  Tensors<double> tensors = model.tensors<double>();
  reference::Model<double> reference(model.config, tensors);
  Random random(23);
  for (const auto& [name, gradient] : got) {
    if (!trained(name)) continue;
    double size = 0;
    for (const float g : gradient) size = std::max(size, double{std::abs(g)});
    for (int sample = 0; sample < 2; ++sample) {
      const auto i = static_cast<size_t>(random.next_int(0, static_cast<int64_t>(gradient.size()) - 1));
      double& x = tensors[name][i];
      const double at = x, h = 1e-4;
      x = at + h;
      const double above = testing::mean_loss(reference, sequences);
      x = at - h;
      const double below = testing::mean_loss(reference, sequences);
      x = at;
      EXPECT_NEAR(gradient[i], (above - below) / (2 * h), 2e-4 * size) << name << " " << i;
    }
  }
}

}  // namespace
}  // namespace perigee::policy
