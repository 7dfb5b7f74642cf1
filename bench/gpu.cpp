// What a GPU does with a model of random weights, beside the bytes and operations that the model takes.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>

#include "base/error.h"
#include "base/random.h"
#include "bench/gpu.h"
#include "bench/work.h"
#include "policy/device/backend.h"
#include "policy/device/initialize.h"
#include "policy/device/scorer.h"
#include "policy/engine/engine.h"

namespace perigee::bench {

using namespace policy;
using kernels::Device;

Gpu::Gpu(const ModelConfig& config, const std::function<int64_t(const ParamLayout&)>& scratch_bytes)
    : layout(config, kernels::Dtype::kBf16, MatrixForm::kTiles), device(0, scratch_bytes(layout)) {
  weights = static_cast<std::byte*>(device.allocate(layout.weight_bytes()));
  device_initialize(device, layout, 1, weights);
  device.synchronize();
}

double copy_rate(Device& device) {
  constexpr int64_t kBytes = int64_t{4} << 30;
  void *from = device.allocate(kBytes), *to = device.allocate(kBytes);
  device.zero(from, kBytes);
  std::vector<double> rates;
  for (int i = 0; i < 6; ++i) {
    device.synchronize();
    const double t0 = now_s();
    for (int k = 0; k < 4; ++k) device.copy(to, from, kBytes);
    device.synchronize();
    if (i > 0) rates.push_back(8.0 * static_cast<double>(kBytes) / (now_s() - t0));
  }
  device.release(from);
  device.release(to);
  return median(rates);
}

std::vector<int32_t> random_tokens(const ModelConfig& c, int64_t n, uint64_t seed) {
  Random random(seed);
  std::vector<int32_t> tokens;
  for (int64_t i = 0; i < n; ++i)
    tokens.push_back(static_cast<int32_t>(random.next_u64() % static_cast<uint64_t>(c.vocab_size)));
  return tokens;
}

std::vector<double> replays(Device& device, int64_t count, int turns,
                            const std::function<void(int64_t)>& work) {
  const kernels::DeviceGraph graph(device, [&] {
    for (int64_t i = 0; i < count; ++i) work(i);
  });
  std::vector<double> seconds;
  for (int t = -2; t < turns; ++t) {
    device.synchronize();
    const double t0 = now_s();
    graph.launch(device);
    device.synchronize();
    if (t >= 0) seconds.push_back((now_s() - t0) / static_cast<double>(count));
  }
  return seconds;
}

Figure rate_figure(const std::string& name, const std::string& unit, Bound bound, double work, double ceiling,
                   double aim, std::vector<double> values, const std::string& note) {
  std::sort(values.begin(), values.end());
  Figure f;
  f.name = name;
  f.unit = unit;
  f.value = median(values);
  f.low = values[values.size() / 4];
  f.high = values[values.size() * 3 / 4];
  f.bound = bound;
  f.work = work;
  f.ceiling = ceiling;
  f.limit = work > 0 ? ceiling / work : 0;
  f.share = f.limit > 0 ? f.value / f.limit : 0;
  f.aim = aim;
  f.turns = static_cast<int>(values.size());
  f.note = note;
  return f;
}

Figure time_figure(const std::string& name, const std::string& unit, Bound bound, double work, double ceiling,
                   double target, std::vector<double> seconds, const std::string& note) {
  const double scale = unit == "us" ? 1e6 : 1e3;
  for (double& s : seconds) s *= scale;
  Figure f = rate_figure(name, unit, bound, work, ceiling, 0, std::move(seconds), note);
  f.time = true;
  f.limit = bound == Bound::kNone ? 0 : scale * work / ceiling;
  f.share = f.value > 0 ? f.limit / f.value : 0;
  f.target = target;
  return f;
}

Figure plain_figure(const std::string& name, const std::string& unit, double value, double target,
                    const std::string& note) {
  Figure f = rate_figure(name, unit, Bound::kNone, 0, 0, 0, {value}, note);
  f.target = target;
  return f;
}

namespace {

// Prompts of their own for every member: each token then chooses its own experts, as different texts do.
std::vector<GenerationGroup> singles(const ModelConfig& c, int64_t members, int64_t prompt,
                                     int64_t new_tokens) {
  std::vector<GenerationGroup> groups;
  for (int64_t i = 0; i < members; ++i) {
    GenerationGroup g;
    g.prompt = random_tokens(c, prompt, static_cast<uint64_t>(i) + 1);
    GenerationRequest r;
    r.id = static_cast<uint64_t>(i);
    r.seed = r.id;
    r.max_new_tokens = new_tokens;
    g.members.push_back(r);
    groups.push_back(std::move(g));
  }
  return groups;
}

EngineConfig engine_config(const Gpu& gpu, int64_t members, int64_t tokens) {
  EngineConfig e;
  const StateLayout state = device_state_layout(gpu.layout);
  e.memory_bytes =
      2 * members * (state.recurrent_bytes() + (state.blocks_for(tokens) + 2) * state.block_bytes());
  e.max_running = members;
  e.prefill_chunk = 8192;
  return e;
}

// configs/model/kimi-linear-48b.json, which the targets of decoding are for.
bool is_48b(const ModelConfig& c) {
  return c.num_layers == 27 && c.hidden_size == 2304 && c.num_experts == 256;
}

void decode(Rig& rig, Gpu& gpu, double copy, int64_t batch) {
  const std::string name = fmt::format("gpu-decode-{}", batch);
  if (!rig.wants(name)) return;
  const ModelConfig& c = gpu.layout.config();
  constexpr int64_t kPrompt = 64, kSteps = 160;
  const EngineConfig config = engine_config(gpu, batch, kPrompt + kSteps + 80);
  Engine engine(device_backend(gpu.device, gpu.layout, config, gpu.weights), gpu.layout, config);
  engine.set_weights(gpu.weights, 1);
  for (GenerationGroup& g : singles(c, batch, kPrompt, kSteps + 64)) engine.submit(std::move(g));
  std::vector<GeneratedToken> out;
  for (int i = 0; i < 20 || engine.stats().running < batch; ++i) engine.step(out);
  std::vector<double> rates;
  const double begin = now_s();
  for (int64_t i = 0; i < kSteps && now_s() - begin < 4 * rig.options().seconds; ++i) {
    out.clear();
    const double t0 = now_s();
    engine.step(out);
    const double seconds = now_s() - t0;
    if (static_cast<int64_t>(out.size()) != batch) break;
    rates.push_back(static_cast<double>(batch) / seconds);
  }
  const double bytes =
      decode_step_bytes(gpu.layout, device_state_layout(gpu.layout), batch, kPrompt + kSteps / 2);
  Figure f = rate_figure(name, "tokens/s", Bound::kMemory, bytes / static_cast<double>(batch), copy, 0, rates,
                         fmt::format("batch {}: {:.2f} ms per step, floor {:.2f}", batch,
                                     1e3 * static_cast<double>(batch) / median(rates), 1e3 * bytes / copy));
  if (is_48b(c)) {  // a step of at most 2, 29, 40 ms
    const double step_s = batch == 1 ? 2e-3 : batch == 64 ? 29e-3 : batch == 256 ? 40e-3 : 0;
    if (step_s > 0) f.target = static_cast<double>(batch) / step_s;
  }
  rig.report(f);
}

void prefill(Rig& rig, Gpu& gpu, int64_t tokens, Numerics numerics) {
  const std::string name =
      fmt::format("gpu-prefill-{}{}", tokens, numerics == Numerics::kFast ? "-fast" : "");
  if (!rig.wants(name)) return;
  const ModelConfig& c = gpu.layout.config();
  EngineConfig config = engine_config(gpu, 2, tokens + 64);
  config.numerics = numerics;
  std::vector<double> rates;
  uint64_t id = 100;
  Engine engine(device_backend(gpu.device, gpu.layout, config, gpu.weights), gpu.layout, config);
  engine.set_weights(gpu.weights, 1);
  for (int i = 0; i < 4; ++i) {
    GenerationGroup g;
    g.prompt = random_tokens(c, tokens, id);
    GenerationRequest r;
    r.id = id++;
    r.max_new_tokens = 1;
    g.members.push_back(r);
    engine.submit(std::move(g));
    std::vector<GeneratedToken> out;
    const double t0 = now_s();
    while (!engine.idle()) engine.step(out);
    if (i > 0) rates.push_back(static_cast<double>(tokens) / (now_s() - t0));
  }
  const double flops = prefill_flops(gpu.layout, tokens) / static_cast<double>(tokens);
  rig.report(
      rate_figure(name, "tokens/s", Bound::kFma, flops, kMatrixRate, 0.45, rates,
                  fmt::format("{} tokens in {:.3f} s", tokens, static_cast<double>(tokens) / median(rates))));
}

// Tokens generated in batches that grow and shrink, scored by the learner's forward pass. Under `fast` after longer
// prompts, which is where it is not exact.
void mismatch(Rig& rig, Gpu& gpu, Numerics numerics) {
  const bool fast = numerics == Numerics::kFast;
  const std::string name = fast ? "gpu-fast" : "gpu-exact";
  if (!rig.wants(name)) return;
  const ModelConfig& c = gpu.layout.config();
  constexpr int64_t kMembers = 256;
  Random random(5);
  std::vector<GenerationGroup> groups;
  uint64_t id = 0;
  while (id < kMembers) {
    GenerationGroup g;
    g.prompt = random_tokens(c, fast ? random.next_int(200, 1200) : random.next_int(1, 200), id + 1);
    const int64_t members = std::min<int64_t>(random.next_int(1, 8), kMembers - static_cast<int64_t>(id));
    for (int64_t m = 0; m < members; ++m) {
      GenerationRequest r;
      r.id = id++;
      r.seed = r.id;
      r.max_new_tokens = fast ? random.next_int(10, 100) : random.next_int(10, 800);
      g.members.push_back(r);
    }
    groups.push_back(g);
  }
  EngineConfig config = engine_config(gpu, kMembers, fast ? 1300 : 1000);
  config.numerics = numerics;
  config.memory_bytes /= 2;
  config.prefill_chunk = 777;
  std::vector<ScoredSequence> sequences(kMembers);
  for (const GenerationGroup& g : groups)
    for (const GenerationRequest& r : g.members) sequences[r.id].tokens = g.prompt;
  std::vector<std::vector<float>> sampled(kMembers);
  {
    Engine engine(device_backend(gpu.device, gpu.layout, config, gpu.weights), gpu.layout, config);
    engine.set_weights(gpu.weights, 1);
    for (GenerationGroup& g : groups) engine.submit(std::move(g));
    std::vector<GeneratedToken> out;
    while (!engine.idle()) {
      out.clear();
      engine.step(out);
      for (const GeneratedToken& t : out) {
        sequences[t.id].tokens.push_back(t.token);
        sampled[t.id].push_back(t.logprob);
      }
    }
  }
  device_score(gpu.device, {&gpu.layout, gpu.weights}, 8192, sequences);
  int64_t tokens = 0, differ = 0;
  double largest = 0, kl = 0;
  for (size_t i = 0; i < sequences.size(); ++i) {
    const std::vector<float>& all = sequences[i].logprobs;
    const size_t offset = all.size() - sampled[i].size();
    for (size_t t = 0; t < sampled[i].size(); ++t) {
      ++tokens;
      const double difference = static_cast<double>(all[offset + t]) - sampled[i][t];
      if (std::memcmp(&sampled[i][t], &all[offset + t], 4) != 0) {
        ++differ;
        largest = std::max(largest, std::abs(difference));
      }
      kl += std::expm1(difference) - difference;
    }
  }
  rig.report(rate_figure(
      name, "differ", Bound::kNone, 0, 0, 0, {static_cast<double>(differ)},
      fmt::format("of {} tokens, batch 1 to 256: engine against learner; largest difference {:.2g}, mean k3 {:.2g}",
                  tokens, largest, kl / static_cast<double>(tokens))));
}

}  // namespace

// Those that one model in memory serves.
constexpr const char* kModelFigures[] = {
    "gpu-exact",      "gpu-fast",         "gpu-decode-1",          "gpu-decode-16",    "gpu-decode-64",
    "gpu-decode-256", "gpu-prefill-8192", "gpu-prefill-8192-fast", "gpu-prefill-32768", "gpu-prefill-32768-fast"};

std::vector<std::string> gpu_figure_names() {
  std::vector<std::string> names = {"gpu-copy"};
  for (std::string& name : gpu_kernel_figure_names()) names.push_back(std::move(name));
  names.emplace_back("gpu-train");
  names.emplace_back("gpu-train-lora");
  for (const char* name : kModelFigures) names.emplace_back(name);
  for (std::string& name : gpu_context_figure_names()) names.push_back(std::move(name));
  return names;
}

void bench_gpu(Rig& rig) {
  const auto wants_any = [&](const std::vector<std::string>& names) {
    return std::any_of(names.begin(), names.end(), [&](const std::string& n) { return rig.wants(n); });
  };
  if (!wants_any(gpu_figure_names())) return;
  if (Device::count() == 0) {
    if (rig.options().what.empty()) return;
    throw_environment("{}: the gpu figures need one", Device::why_none());
  }
  double copy = 0;
  {
    Device device(0, 1 << 20);
    copy = copy_rate(device);
    rig.used_gpu(device.info().name);
    if (rig.wants("gpu-copy"))
      rig.report(plain_figure("gpu-copy", "GB/s", copy * 1e-9, 0,
                              fmt::format("{}, read and written", device.info().name)));
  }
  bench_gpu_kda(rig, copy);
  bench_gpu_mla(rig, copy);
  bench_gpu_train(rig);
  bench_gpu_train_lora(rig);
  if (wants_any({std::begin(kModelFigures), std::end(kModelFigures)})) {
    constexpr int64_t kRows = 8192;
    Gpu gpu(load_model_config(rig.options().model),
            [](const ParamLayout& layout) { return device_score_scratch_bytes(layout, kRows); });
    mismatch(rig, gpu, Numerics::kExact);
    mismatch(rig, gpu, Numerics::kFast);
    for (int64_t batch : {1, 16, 64, 256}) decode(rig, gpu, copy, batch);
    for (int64_t tokens : {8192, 32768})
      for (Numerics numerics : {Numerics::kExact, Numerics::kFast}) prefill(rig, gpu, tokens, numerics);
  }
  bench_gpu_context(rig, copy);
}

}  // namespace perigee::bench
