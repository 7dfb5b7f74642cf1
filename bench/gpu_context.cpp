// Long contexts on a GPU: a model beside the same model with latent attention in every layer.
//
// The contexts are of random latents, which take as long as real ones: a sequence's pages are filled with random numbers
// and its position set, and the backend's passes are timed behind that.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <optional>

#include "base/error.h"
#include "base/random.h"
#include "bench/gpu.h"
#include "bench/work.h"
#include "policy/device/backend.h"

namespace perigee::bench {

using namespace policy;

namespace {

constexpr int64_t kLong = 1 << 20, kShort = 1 << 17;  // tokens of context
constexpr int64_t kSteps = 24, kChunk = 8192, kLateChunk = 2048, kMostSequences = 256;

struct Measured {
  double time_ms = 0;                          // of a token at kLong, batch 1
  double rate_long = 0, rate_short = 0;        // tokens/s of the largest batch
  double prefill_long = 0, prefill_short = 0;  // tokens/s
};

class LongContext {
 public:
  LongContext(Rig& rig, const ModelConfig& config, const std::string& suffix, double copy)
      : rig_(rig),
        suffix_(suffix),
        copy_(copy),
        gpu_(config, [](const ParamLayout& layout) { return device_scratch_bytes(layout, kChunk); }),
        state_(device_state_layout(gpu_.layout)) {
    EngineConfig engine;
    engine.max_running = kMostSequences;
    backend_ = device_backend(gpu_.device, gpu_.layout, engine, gpu_.weights);
    Random random(1);
    std::vector<uint16_t> values(static_cast<size_t>(std::max<int64_t>(state_.block_bytes() / 2, 1)));
    for (uint16_t& v : values) {
      const float x = 2 * random.next_float() - 1;
      uint32_t bits;
      std::memcpy(&bits, &x, 4);
      v = static_cast<uint16_t>(bits >> 16);
    }
    block_ = static_cast<std::byte*>(gpu_.device.allocate(static_cast<int64_t>(values.size() * 2)));
    gpu_.device.copy_in(block_, values.data(), static_cast<int64_t>(values.size() * 2));
    constexpr int64_t kSpare = int64_t{2} << 30;  // graphs, page tables, the end of the last piece of pages
    budget_ = gpu_.device.info().free_bytes - gpu_.device.allocated_bytes() - kSpare;
    if (budget_ < state_.recurrent_bytes() + state_.blocks_for(kLong) * state_.block_bytes())
      throw_environment("gpu-context: {:.1f} GB are left for states, and {} tokens take {:.1f}",
                        static_cast<double>(budget_) * 1e-9, kLong,
                        static_cast<double>(state_.blocks_for(kLong) * state_.block_bytes()) * 1e-9);
  }
  ~LongContext() {
    states_.clear();
    backend_.reset();
    gpu_.device.release(block_);
  }

  Measured measure() {
    Measured m;
    if (rig_.wants("gpu-context-time")) m.time_ms = decode_time();
    if (rig_.wants("gpu-context-prefill")) prefill(m);
    if (rig_.wants("gpu-context-rate")) {
      m.rate_long = decode_rate(kLong);
      m.rate_short = decode_rate(kShort);
    }
    return m;
  }

 private:
  // `sequences` of them, kSteps and a few tokens short of `depth`.
  void set_states(int64_t sequences, int64_t depth) {
    states_.clear();
    for (int64_t i = 0; i < sequences; ++i) {
      SequenceState s = backend_->pool().create();
      const int64_t begin = depth - kSteps - 8;
      for (std::byte* block : s.extend(0, begin).blocks)
        gpu_.device.copy(block, block_, state_.block_bytes());
      s.advance(begin);
      states_.push_back(std::move(s));
    }
    tokens_ = random_tokens(gpu_.layout.config(), sequences, 7);
  }

  // Seconds of each of kSteps steps: a pass and the draw of the next tokens, which ends with their copy to the host.
  std::vector<double> steps() {
    const kernels::SamplingParams sampling;
    const int64_t vocab = gpu_.layout.config().vocab_size;
    std::vector<SequenceSlice> slices(states_.size());
    const std::vector<uint8_t> wanted(states_.size(), 1);
    std::vector<Backend::Draw> draws(states_.size());
    std::vector<double> seconds;
    for (int64_t step = -4; step < kSteps; ++step) {
      const double t0 = now_s();
      for (size_t i = 0; i < states_.size(); ++i) slices[i] = states_[i].extend(static_cast<int64_t>(i), 1);
      const float* logits = backend_->forward(tokens_, slices, wanted, {});
      for (size_t i = 0; i < states_.size(); ++i) {
        states_[i].advance(1);
        draws[i].logits = logits + static_cast<int64_t>(i) * vocab;
        draws[i].sampling = &sampling;
        draws[i].seed = i;
        draws[i].index = step + 4;
      }
      backend_->draw(draws);
      backend_->end_step();
      for (size_t i = 0; i < states_.size(); ++i) tokens_[i] = draws[i].token;
      if (step >= 0) seconds.push_back(now_s() - t0);
    }
    return seconds;
  }

  double decode_time() {
    set_states(1, kLong);
    const std::vector<double> seconds = steps();
    const Figure f = time_figure(fmt::format("gpu-context-time{}", suffix_), "ms", Bound::kMemory,
                                 decode_step_bytes(gpu_.layout, state_, 1, kLong), copy_, 0, seconds,
                                 fmt::format("a token at {} tokens of context, batch 1", kLong));
    rig_.report(f);
    return f.value;
  }

  double decode_rate(int64_t depth) {
    const int64_t each = state_.recurrent_bytes() + state_.blocks_for(depth) * state_.block_bytes();
    const int64_t sequences = std::min(kMostSequences, budget_ / each);
    set_states(sequences, depth);
    std::vector<double> rates = steps();
    for (double& r : rates) r = static_cast<double>(sequences) / r;
    const double bytes = decode_step_bytes(gpu_.layout, state_, sequences, depth);
    const Figure f =
        rate_figure(fmt::format("gpu-context-rate-{}{}", depth, suffix_), "tokens/s", Bound::kMemory,
                    bytes / static_cast<double>(sequences), copy_, 0, rates,
                    fmt::format("{} sequences of {} tokens in {:.1f} GB: {:.2f} ms per step, floor {:.2f}",
                                sequences, depth, static_cast<double>(budget_) * 1e-9,
                                1e3 * static_cast<double>(sequences) / median(rates), 1e3 * bytes / copy_));
    rig_.report(f);
    return f.value;
  }

  // Seconds of a pass over `rows` tokens of a prompt behind `depth` others.
  double chunk(int64_t rows, int64_t depth) {
    SequenceSlice s = states_[0].extend(0, 1);
    s.slice = {0, rows, depth};
    const std::vector<int32_t> tokens =
        random_tokens(gpu_.layout.config(), rows, static_cast<uint64_t>(depth));
    const uint8_t wanted = 1;
    gpu_.device.synchronize();
    const double t0 = now_s();
    backend_->forward(tokens, {&s, 1}, {&wanted, 1}, {});
    gpu_.device.synchronize();
    return now_s() - t0;
  }

  // A chunk's time is a constant and a multiple of its depth: the chunks of a prompt take their number times the mean of
  // the first and the last.
  void prefill(Measured& m) {
    if (states_.size() != 1 || states_[0].position() < kLong - kSteps - 8) set_states(1, kLong);
    chunk(kChunk, 0);
    const double first = chunk(kChunk, 0), last_short = chunk(kChunk, kShort - kChunk);
    const double end = static_cast<double>(kLong - kSteps - 8 - kLateChunk);
    chunk(kLateChunk, 0);
    const double slope = (chunk(kLateChunk, static_cast<int64_t>(end)) - chunk(kLateChunk, 0)) / end;
    const double last_long =
        first + slope * (static_cast<double>(kChunk) / kLateChunk) * static_cast<double>(kLong - kChunk);
    const auto report = [&](int64_t tokens, double last, const std::string& how) {
      const auto n = static_cast<double>(tokens);
      const double seconds = n / kChunk * (first + last) / 2;
      rig_.report(
          rate_figure(fmt::format("gpu-context-prefill-{}{}", tokens, suffix_), "tokens/s", Bound::kFma,
                      prefill_flops(gpu_.layout, tokens) / n, kMatrixRate, 0, {n / seconds},
                      fmt::format("{:.1f} s, computed: chunks of {} take {:.3f} s at the start and {:.3f} {}",
                                  seconds, kChunk, first, last, how)));
      return n / seconds;
    };
    m.prefill_short = report(kShort, last_short, "at the end");
    m.prefill_long = report(kLong, last_long, fmt::format("at the end, from one of {} there", kLateChunk));
    states_.clear();  // overwritten
  }

  Rig& rig_;
  std::string suffix_;
  double copy_;
  Gpu gpu_;
  StateLayout state_;
  std::unique_ptr<Backend> backend_;
  std::vector<SequenceState> states_;
  std::vector<int32_t> tokens_;
  std::byte* block_ = nullptr;
  int64_t budget_ = 0;
};

}  // namespace

std::vector<std::string> gpu_context_figure_names() {
  return {"gpu-context-bytes", "gpu-context-time", "gpu-context-rate", "gpu-context-prefill"};
}

void bench_gpu_context(Rig& rig, double copy) {
  const std::vector<std::string> names = gpu_context_figure_names();
  if (std::none_of(names.begin(), names.end(), [&](const std::string& n) { return rig.wants(n); })) return;
  const ModelConfig hybrid = load_model_config(rig.options().model);
  ModelConfig attention = hybrid;
  std::fill(attention.layers.begin(), attention.layers.end(), LayerKind::kMla);
  const auto per_token = [](const ModelConfig& c) {
    const ParamLayout layout(c, kernels::Dtype::kBf16, MatrixForm::kTiles);
    return static_cast<double>(device_state_layout(layout).block_bytes()) / 64.0;
  };
  if (rig.wants("gpu-context-bytes")) {
    const double a = per_token(hybrid), b = per_token(attention);
    const ParamLayout layout(hybrid, kernels::Dtype::kBf16, MatrixForm::kTiles);
    rig.report(plain_figure(
        "gpu-context-bytes", "% less", 100 * (1 - a / b), 74,
        fmt::format("{:.0f} bytes of cache a token, and {:.0f} with MLA in every layer; states of a "
                    "sequence, once: {:.1f} MB",
                    a, b, static_cast<double>(device_state_layout(layout).recurrent_bytes()) * 1e-6)));
  }
  if (std::none_of(names.begin() + 1, names.end(), [&](const std::string& n) { return rig.wants(n); }))
    return;
  const Measured h = LongContext(rig, hybrid, "-hybrid", copy).measure();
  const Measured m = LongContext(rig, attention, "-mla", copy).measure();
  const auto ratio = [&](const std::string& name, double value, double target, const char* note) {
    if (std::isfinite(value)) rig.report(plain_figure(name, "x", value, target, note));
  };
  ratio("gpu-context-time-ratio", m.time_ms / h.time_ms, 2.2, "time of a token: MLA in every layer / hybrid");
  ratio("gpu-context-rate-1048576-ratio", h.rate_long / m.rate_long, 6.3,
        "tokens/s of the largest batch: hybrid / MLA");
  ratio("gpu-context-rate-131072-ratio", h.rate_short / m.rate_short, 0,
        "tokens/s of the largest batch: hybrid / MLA");
  ratio("gpu-context-prefill-131072-ratio", h.prefill_short / m.prefill_short, 0, "hybrid / MLA");
  ratio("gpu-context-prefill-1048576-ratio", h.prefill_long / m.prefill_long, 2.9, "hybrid / MLA");
}

}  // namespace perigee::bench
