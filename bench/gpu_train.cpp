// A step of full-parameter training on a GPU.
#include <algorithm>
#include <memory>
#include <utility>

#include "base/error.h"
#include "bench/gpu.h"
#include "bench/work.h"
#include "policy/device/learn.h"
#include "policy/learn/backend.h"
#include "policy/learn/trainer.h"

namespace perigee::bench {

using namespace policy;

void bench_gpu_train(Rig& rig) {
  if (!rig.wants("gpu-train")) return;
  constexpr int64_t kSequences = 32, kLength = 1024, kPrompt = 64, kRows = kSequences * kLength;
  const ModelConfig config = load_model_config(rig.options().model);
  const auto scratch = [](const ParamLayout& l) { return device_learn_scratch_bytes(l, kRows, false); };
  {
    // Weights (three times: in use, next, and the bench's own), masters, moments and the gradient.
    const ParamLayout layout(config, kernels::Dtype::kBf16, MatrixForm::kTiles);
    const double need =
        static_cast<double>(3 * layout.weight_bytes() + 16 * layout.elements() + scratch(layout));
    const double have = static_cast<double>(kernels::Device(0, 1 << 20).info().free_bytes);
    if (need > have) {
      const auto& what = rig.options().what;
      if (std::find(what.begin(), what.end(), "gpu-train") == what.end()) return;
      throw_environment("gpu-train: full-parameter training of {} takes {:.0f} GB, and {:.0f} are free",
                        rig.options().model, need * 1e-9, have * 1e-9);
    }
  }
  Gpu gpu(config, scratch);
  std::vector<std::byte> weights(static_cast<size_t>(gpu.layout.weight_bytes())), next(weights.size());
  gpu.device.copy_out(weights.data(), gpu.weights, gpu.layout.weight_bytes());

  std::vector<TrainSequence> batch;
  for (int64_t i = 0; i < kSequences; ++i) {
    TrainSequence s;
    s.tokens = random_tokens(config, kLength, static_cast<uint64_t>(i));
    s.mask.assign(s.tokens.size(), 1);
    std::fill_n(s.mask.begin(), kPrompt, uint8_t{0});
    s.mu.assign(s.tokens.size(), 0);
    s.advantage = i % 2 == 0 ? 1.0f : -1.0f;
    batch.push_back(std::move(s));
  }
  TrainerConfig trainer_config;
  trainer_config.schedule.lr = 1e-6;
  trainer_config.micro_batch_tokens = kRows;
  std::unique_ptr<LearnBackend> made = device_learn_backend(gpu.device, gpu.layout, false);
  LearnBackend& backend = *made;
  Trainer trainer(std::move(made), gpu.layout, trainer_config);
  // On-policy, as the sampler would have reported it.
  const std::vector<float> logprobs = trainer.logprobs(weights.data(), batch);
  for (int64_t i = 0; i < kSequences; ++i)
    std::copy_n(logprobs.begin() + i * kLength, kLength, batch[static_cast<size_t>(i)].mu.begin());

  std::vector<double> rates;
  StepMetrics metrics;
  for (int turn = -2; turn < 8; ++turn) {
    const double t0 = now_s();
    metrics = trainer.step(weights.data(), next.data(), batch);
    if (turn >= 0) rates.push_back(static_cast<double>(kRows) / (now_s() - t0));
    if (turn == -2)
      PERIGEE_CHECK(metrics.mismatch_max == 0, "the learner differs from itself by {}", metrics.mismatch_max);
    weights.swap(next);  // as a run does
  }

  // What of it are the weights' way to the device and back, and what the passes alone.
  double t0 = now_s();
  backend.set_weights(next.data());  // not those that the device still has
  const double in_s = now_s() - t0;
  t0 = now_s();
  gpu.device.copy_out(next.data(), gpu.weights, gpu.layout.weight_bytes());
  const double out_s = now_s() - t0;
  std::vector<const TrainSequence*> sequences;
  for (const TrainSequence& s : batch) sequences.push_back(&s);
  const std::vector<MicroBatch> micro = pack(sequences, kRows, false);
  std::vector<double> pass_rates, forward_s;
  for (int turn = -1; turn < 8; ++turn) {
    backend.zero_gradient();
    backend.gradient_sum_of_squares();  // waits
    t0 = now_s();
    for (const MicroBatch& m : micro) {
      backend.forward(m, true);
      if (turn >= 0) forward_s.push_back(now_s() - t0);
      const std::vector<float> dlogprob(static_cast<size_t>(m.entries()), -1.0f / static_cast<float>(kRows));
      backend.backward(m, dlogprob.data(), nullptr);
    }
    gpu.device.synchronize();
    if (turn >= 0) pass_rates.push_back(static_cast<double>(kRows) / (now_s() - t0));
  }
  const double flops = 6 * active_elements(gpu.layout);
  rig.report(rate_figure(
      "gpu-train", "tokens/s", Bound::kFma, flops, kMatrixRate, 0, rates,
      fmt::format(
          "{} sequences of {} tokens, AdamW: {:.0f} ms a step; weights from the host {:.0f}, to it {:.0f}",
          kSequences, kLength, 1e3 * static_cast<double>(kRows) / median(rates), 1e3 * in_s, 1e3 * out_s)));
  rig.report(rate_figure(
      "gpu-train-passes", "tokens/s", Bound::kFma, flops, kMatrixRate, 0, pass_rates,
      fmt::format("the same, forward and backward alone: {:.0f} ms, of which forward {:.0f}",
                  1e3 * static_cast<double>(kRows) / median(pass_rates), 1e3 * median(forward_s))));
}

}  // namespace perigee::bench
