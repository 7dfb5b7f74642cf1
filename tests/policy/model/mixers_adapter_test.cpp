// Adapters beside every mixer, against the reference of the model that they are merged into.
#include <gtest/gtest.h>

#include "policy/learn/backend.h"
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
using testing::SmallAdapters;

constexpr int64_t kRank = 4;

std::vector<MixersCase> adapter_cases() {
  std::vector<MixersCase> out;
  for (const char* mixer : {"kda", "gdn", "mamba2", "dplr", "mla", "mla_rope", "attention"})
    out.push_back(testing::mixers_case(mixer, {mixer}, 1, R"({"intermediate_size": 64})"));
  out.push_back(testing::mixers_case("everything", {"mamba2", "dplr", "mla_rope", "attention"}, 4,
                                     R"({"intermediate_size": 64})"));
  out.push_back(testing::mixers_case(
      "no_gate", {"gdn", "attention"}, 2,
      R"({"intermediate_size": 64, "linear_attn_config": {"output_gate": "none", "short_conv_kernel_size": 0}})"));
  return out;
}

class MixersAdapters : public ::testing::TestWithParam<MixersCase> {
 protected:
  SmallAdapters adapters(double deviation) {
    return {model_.layout, deviation, testing::lora_config(kRank, testing::adaptable(model_.layout))};
  }
  std::vector<float> values(const SmallAdapters& of, int tensor, const float* flat) {
    const ParamSpec& t = of.layout.tensor(tensor);
    std::vector<float> out(static_cast<size_t>(t.n * t.k));
    of.layout.read_flat(flat, tensor, out.data());
    return out;
  }

  // The gradients of a product y = W x + s B A x follow from that of the merged matrix: dA = s Bᵀ dW, dB = s dW Aᵀ.
  template <class T>
  std::map<std::string, std::vector<double>> by_reference(const SmallAdapters& of) {
    Tensors<double> merged = model_.tensors<double>();
    const double s = of.layout.scale();
    for (const auto& t : of.layout.adapters()) {
      const std::vector<float> a = values(of, t.a, of.flat.data()), b = values(of, t.b, of.flat.data());
      std::vector<double>& w = merged.at(t.module + ".weight");
      for (int64_t i = 0; i < t.n; ++i)
        for (int64_t j = 0; j < t.k; ++j)
          for (int64_t r = 0; r < kRank; ++r)
            w[static_cast<size_t>(i * t.k + j)] +=
                s * b[static_cast<size_t>(i * kRank + r)] * a[static_cast<size_t>(r * t.k + j)];
    }
    Tape<T> tape;
    Tensors<Var<T>> leaves;
    for (const auto& [name, x] : merged)
      for (const double v : x) leaves[name].push_back(tape.leaf(v));
    reference::Model<Var<T>> reference(model_.config, leaves);
    const std::vector<T> d = tape.gradient(testing::mean_loss(reference, sequences_));
    std::map<std::string, std::vector<double>> out;
    for (const auto& t : of.layout.adapters()) {
      const std::vector<float> a = values(of, t.a, of.flat.data()), b = values(of, t.b, of.flat.data());
      std::vector<double> da(a.size()), db(b.size());
      for (int64_t i = 0; i < t.n; ++i)
        for (int64_t j = 0; j < t.k; ++j) {
          const double dw =
              d[static_cast<size_t>(leaves.at(t.module + ".weight")[static_cast<size_t>(i * t.k + j)].node)];
          for (int64_t r = 0; r < kRank; ++r) {
            da[static_cast<size_t>(r * t.k + j)] += s * dw * b[static_cast<size_t>(i * kRank + r)];
            db[static_cast<size_t>(i * kRank + r)] += s * dw * a[static_cast<size_t>(r * t.k + j)];
          }
        }
      out[t.module + " A"] = da;
      out[t.module + " B"] = db;
    }
    return out;
  }

  MixersModel model_{GetParam().config, 51};
  const std::vector<std::vector<int32_t>> sequences_ = {testing::random_tokens(21, model_.vocab(), 52),
                                                        testing::random_tokens(9, model_.vocab(), 53)};
};
INSTANTIATE_TEST_SUITE_P(Mixers, MixersAdapters, ::testing::ValuesIn(adapter_cases()),
                         [](const auto& info) { return info.param.name; });

TEST_P(MixersAdapters, EveryModuleMayBeNamedAsATarget) {
  const std::vector<std::string> modules = testing::adaptable(model_.layout);
  const LoraConfig config = parse_lora_config({{"targets", modules}}, "run.json");
  EXPECT_EQ(config.targets, modules);
  const AdapterLayout layout(model_.layout, config);
  size_t matrices = 0;
  for (const CheckpointTensor& t : model_.layout.checkpoint())
    matrices += t.shape.size() == 2 && t.name.find("_proj") != std::string::npos &&
                !t.name.ends_with("kv_b_proj.weight");
  EXPECT_EQ(layout.adapters().size(), matrices);
}

TEST_P(MixersAdapters, OfZerosKeepTheBitsOfTheModel) {
  SmallAdapters none = adapters(0), some = adapters(0.1);
  const std::vector<int32_t> tokens = testing::random_tokens(70, model_.vocab(), 54);
  const auto hidden = [&](const Weights& w) {
    kernels::Context ctx(2);
    TrainPass pass(ctx, w, false);
    const float* h = pass.forward(tokens, {{70}});
    return std::vector<float>(h, h + 70 * model_.layout.config().hidden_size);
  };
  const std::vector<float> plain = hidden(model_.view());
  EXPECT_EQ(hidden({&model_.layout, model_.weights(), &none.layout, none.weights()}), plain);
  EXPECT_NE(hidden({&model_.layout, model_.weights(), &some.layout, some.weights()}), plain);
}

TEST_P(MixersAdapters, GradientsAreThoseOfTheMergedModel) {
  SmallAdapters of = adapters(0.1);
  const auto truth = by_reference<double>(of), plain = by_reference<float>(of);
  kernels::Context ctx(2);
  Trainer trainer(host_learn_backend(ctx, of.layout, model_.weights(), false), of.layout, {});
  std::vector<TrainSequence> batch;
  for (const auto& s : sequences_) {
    TrainSequence q;
    q.tokens = s;
    q.mask.assign(s.size(), 1);
    q.mask[0] = 0;
    q.curated = true;
    batch.push_back(q);
  }
  std::vector<float> flat(static_cast<size_t>(of.layout.elements()));
  trainer.gradients(of.weights(), batch, flat.data());
  ASSERT_EQ(truth.size(), 2 * of.layout.adapters().size());
  for (const auto& t : of.layout.adapters())
    for (const bool down : {true, false}) {
      const std::string name = t.module + (down ? " A" : " B");
      const std::vector<double>&want = truth.at(name), &float32 = plain.at(name);
      const std::vector<float> got = values(of, down ? t.a : t.b, flat.data());
      double error = 0, bound = 0, norm = 0;
      for (size_t i = 0; i < want.size(); ++i) {
        error += (got[i] - want[i]) * (got[i] - want[i]);
        bound += (float32[i] - want[i]) * (float32[i] - want[i]);
        norm += want[i] * want[i];
      }
      ASSERT_GT(norm, 0) << name;
      EXPECT_LT(std::sqrt(error), 8 * std::sqrt(bound))
          << name << ": " << std::sqrt(error / norm) << " of its norm";
    }
}

}  // namespace
}  // namespace perigee::policy
