// A step of training adapters beside a frozen model on a GPU.
#include <algorithm>
#include <cstring>
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

void bench_gpu_train_lora(Rig& rig) {
  if (!rig.wants("gpu-train-lora")) return;
  constexpr int64_t kSequences = 4, kLength = 4096, kPrompt = 64, kRows = kSequences * kLength;
  constexpr double kGiB = 0x1p30;
  const ModelConfig config = load_model_config(rig.options().model);
  LoraConfig lora;  // rank 16 on q, k, v, o
  lora.alpha = 32;
  const auto scratch = [&](const ParamLayout& l) {
    return device_learn_scratch_bytes(AdapterLayout(l, lora), kRows, true);
  };
  Gpu gpu(config, scratch);
  const double started = now_s();
  const AdapterLayout adapter(gpu.layout, lora);
  std::vector<float> flat(static_cast<size_t>(adapter.elements()));
  initialize_adapter(adapter, flat.data());
  std::vector<std::byte> weights(static_cast<size_t>(adapter.weight_bytes())), next(weights.size());
  adapter.flat_to_weights(flat.data(), weights.data());

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
  trainer_config.schedule.lr = 1e-4;
  trainer_config.micro_batch_tokens = kRows;
  std::unique_ptr<LearnBackend> made = device_learn_backend(gpu.device, adapter, true, gpu.weights);
  LearnBackend& backend = *made;
  Trainer trainer(std::move(made), adapter, trainer_config);
  trainer.step(weights.data(), next.data(), batch);
  const double first_s = now_s() - started;
  std::swap(weights, next);
  // On-policy, as the sampler would have reported it.
  const std::vector<float> logprobs = trainer.logprobs(weights.data(), batch);
  for (int64_t i = 0; i < kSequences; ++i)
    std::copy_n(logprobs.begin() + i * kLength, kLength, batch[static_cast<size_t>(i)].mu.begin());
  PERIGEE_CHECK(trainer.step(weights.data(), next.data(), batch).mismatch_max == 0);

  std::vector<double> rates;
  for (int turn = 0; turn < 5; ++turn) {
    const double t0 = now_s();
    trainer.step(weights.data(), next.data(), batch);
    rates.push_back(static_cast<double>(kRows) / (now_s() - t0));
  }
  std::vector<const TrainSequence*> sequences;
  for (const TrainSequence& s : batch) sequences.push_back(&s);
  const std::vector<MicroBatch> micro = pack(sequences, kRows, false);
  std::vector<double> pass_s, forward_s;
  for (int turn = 0; turn < 4; ++turn) {
    backend.zero_gradient();
    backend.gradient_sum_of_squares();  // waits
    const double t0 = now_s();
    for (const MicroBatch& m : micro) {
      backend.forward(m, true);
      forward_s.push_back(now_s() - t0);
      const std::vector<float> dlogprob(static_cast<size_t>(m.entries()), -1.0f / static_cast<float>(kRows));
      backend.backward(m, dlogprob.data(), nullptr);
    }
    gpu.device.synchronize();
    pass_s.push_back(now_s() - t0);
  }
  const double held = static_cast<double>(gpu.device.allocated_bytes()) / kGiB;
  const double used = held - static_cast<double>(gpu.device.scratch.capacity_bytes() - gpu.device.scratch.peak_bytes()) / kGiB;
  // Forward, forward again, and the inputs' half of a backward.
  const double flops = 6 * active_elements(gpu.layout);
  rig.report(rate_figure(
      "gpu-train-lora", "tokens/s", Bound::kFma, flops, kMatrixRate, 0, rates,
      fmt::format("rank 16 on q, k, v, o; {} sequences of {} tokens, AdamW: {:.0f} ms a step, passes {:.0f}, of which "
                  "forward {:.0f}",
                  kSequences, kLength, 1e3 * static_cast<double>(kRows) / median(rates), 1e3 * median(pass_s),
                  1e3 * median(forward_s))));
  rig.report(plain_figure("gpu-train-lora-memory", "GiB", held, 115,
                          fmt::format("allocated; {:.1f} ever in use at once, weights {:.1f}", used,
                                      static_cast<double>(gpu.layout.weight_bytes()) / kGiB)));
  rig.report(plain_figure("gpu-train-lora-first", "s", first_s, 5,
                          "from the model's weights on the device to the end of the first step"));
}

}  // namespace perigee::bench
