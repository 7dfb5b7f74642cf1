#include "apps/compare/context_time.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <memory>

#include "apps/compare/chart.h"
#include "apps/compare/statistics.h"
#include "apps/model/memory_plan.h"
#include "base/error.h"
#include "base/random.h"
#include "base/text.h"
#include "kernels/context.h"
#include "kernels/mla/mla.h"
#include "policy/engine/backend.h"

namespace perigee::apps::compare {
namespace {

using namespace policy;

constexpr int64_t kWarm = 3;  // steps before those that count

void fill(std::byte* memory, const std::vector<float>& values, int64_t bytes) {
  const auto whole = static_cast<int64_t>(values.size() * sizeof(float));
  for (int64_t at = 0; at < bytes; at += whole)
    std::memcpy(memory + at, values.data(), static_cast<size_t>(std::min(whole, bytes - at)));
}

std::vector<float> random_values(float scale) {
  Random random(1);
  std::vector<float> values(16384);
  for (float& v : values) v = scale * (2 * random.next_float() - 1);
  return values;
}

double processor_seconds() {
  timespec t{};
  ::clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

struct Free {
  void operator()(std::byte* p) const { std::free(p); }
};

std::unique_ptr<std::byte, Free> memory(int64_t bytes) {
  auto* p = static_cast<std::byte*>(std::aligned_alloc(64, (static_cast<size_t>(bytes) + 63) / 64 * 64));
  if (p == nullptr)
    throw_environment("out of memory: {} for the weights of a model",
                      human_bytes(static_cast<uint64_t>(bytes)));
  return std::unique_ptr<std::byte, Free>(p);
}

class OneSequence {
 public:
  OneSequence(const ModelConfig& config, const ContextOptions& options)
      : options_(options),
        ctx_(static_cast<int>(options.threads)),
        layout_(config, Dtype::kF32),
        weights_(memory(layout_.weight_bytes())) {
    initialize(
        layout_, 1,
        reinterpret_cast<float*>(weights_.get()));  // in float32 the flat arena and the weights lie alike
    backend_ = host_backend(ctx_, layout_, options.memory_bytes);
    backend_->set_weights(weights_.get());
    state_ = backend_->pool().create();
    // A state that has seen much text is small and dense.
    const SequenceSlice first = state_.extend(0, 1);
    fill(first.recurrent, random_values(0.05f), backend_->pool().layout().recurrent_bytes());
  }

  void measure(ContextPoint& point) {
    // From the end of a page on, so that no part of a state is an open chunk of tokens that were never there; the steps end
    // within the context's length.
    grow(std::max<int64_t>(0, point.tokens - options_.steps - kWarm) / kernels::kLatentPage *
         kernels::kLatentPage);
    for (int64_t i = -kWarm; i < options_.steps; ++i) {
      const double processor = processor_seconds(), seconds = step();
      if (i < 0) continue;
      point.seconds.push_back(seconds);
      point.processor_s.push_back(processor_seconds() - processor);
    }
    point.summarize();
  }

 private:
  void grow(int64_t position) {
    const int64_t from = state_.position();
    if (position <= from) return;
    const SequenceSlice slice = state_.extend(0, position - from);
    const std::vector<float> values = random_values(1);
    for (auto i = static_cast<size_t>(from / kernels::kLatentPage); i < slice.blocks.size(); ++i)
      fill(slice.blocks[i], values, backend_->pool().layout().block_bytes());
    state_.advance(position - from);
  }

  double step() {
    using Clock = std::chrono::steady_clock;
    const kernels::SamplingParams sampling;
    const uint8_t wanted = 1;
    const Clock::time_point start = Clock::now();
    const SequenceSlice slice = state_.extend(0, 1);
    const float* logits = backend_->forward({&token_, 1}, {&slice, 1}, {&wanted, 1}, {});
    state_.advance(1);
    Backend::Draw draw;
    draw.logits = logits;
    draw.sampling = &sampling;
    draw.index = steps_++;
    backend_->draw({&draw, 1});
    PERIGEE_CHECK(std::isfinite(logits[draw.token]), "a logit is {}", logits[draw.token]);
    token_ = draw.token;
    backend_->end_step();
    return std::chrono::duration<double>(Clock::now() - start).count();
  }

  const ContextOptions& options_;
  kernels::Context ctx_;
  ParamLayout layout_;
  std::unique_ptr<std::byte, Free> weights_;
  std::unique_ptr<Backend> backend_;
  SequenceState state_;
  int32_t token_ = 1;
  int64_t steps_ = 0;
};

}  // namespace

void ContextPoint::summarize() {
  if (const auto s = spread_of(seconds)) median_s = s->median, min_s = s->min, max_s = s->max;
  if (const auto s = spread_of(processor_s)) processor_median_s = s->median;
}

int64_t context_memory_bytes() {
  const MachineMemory m = machine_memory();
  uint64_t bytes = m.available;
  if (m.limit > 0) bytes = std::min(bytes, m.limit);
  return static_cast<int64_t>(bytes / 2);
}

std::vector<ContextPoint> measure_context(const ModelConfig& config, const ContextOptions& options) {
  const StateLayout state(config);
  std::vector<ContextPoint> points;
  std::unique_ptr<OneSequence> sequence;
  for (const int64_t tokens : options.lengths) {
    ContextPoint point;
    point.tokens = tokens;
    point.bytes = state.recurrent_bytes() + state.blocks_for(tokens) * state.block_bytes();
    if (tokens > config.max_length)
      point.left_out = fmt::format("the model ends at {} tokens", tokens_text(config.max_length));
    else if (point.bytes > options.memory_bytes)
      point.left_out =
          fmt::format("it takes {} and {} may be used", human_bytes(static_cast<uint64_t>(point.bytes)),
                      human_bytes(static_cast<uint64_t>(options.memory_bytes)));
    if (point.left_out.empty()) {
      if (options.on_length) options.on_length(tokens);
      if (!sequence) sequence = std::make_unique<OneSequence>(config, options);
      sequence->measure(point);
    }
    points.push_back(std::move(point));
  }
  return points;
}

}  // namespace perigee::apps::compare
