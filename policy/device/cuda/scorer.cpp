#include "policy/device/scorer.h"

#include "kernels/kda/kda_device.h"
#include "kernels/moe/moe_device.h"
#include "kernels/vocab/vocab_device.h"
#include "policy/device/backend.h"
#include "policy/device/products.h"
#include "policy/device/train_pass.h"

namespace perigee::policy {
namespace {

using namespace kernels;

template <class T>
void score(Device& device, const Weights& weights, std::vector<ScoredSequence*> batch) {
  const ModelConfig& c = weights.layout->config();
  DeviceScratch::Mark mark(device.scratch);
  std::vector<int32_t> tokens, rows, targets;
  std::vector<int64_t> lengths;
  for (const ScoredSequence* s : batch) {
    const auto begin = static_cast<int32_t>(tokens.size()), n = static_cast<int32_t>(s->tokens.size());
    tokens.insert(tokens.end(), s->tokens.begin(), s->tokens.end());
    lengths.push_back(n);
    for (int32_t i = 0; i + 1 < n; ++i) {
      rows.push_back(begin + i);
      targets.push_back(s->tokens[static_cast<size_t>(i) + 1]);
    }
  }
  const auto n = static_cast<int64_t>(rows.size());
  device::TrainPass<T> pass(device, weights, true);
  const T* hidden = pass.forward(tokens, lengths);
  auto* device_rows = device.scratch.take<int32_t>(n);
  auto* device_targets = device.scratch.take<int32_t>(n);
  device.copy_in(device_rows, rows.data(), n * 4);
  device.copy_in(device_targets, targets.data(), n * 4);
  T* gathered = device.scratch.take<T>(n * c.hidden_size);
  auto* logprob = device.scratch.take<float>(n);
  auto* lse = device.scratch.take<float>(n);
  auto* entropy = device.scratch.take<float>(n);
  moe_gather<T>(device, n, c.hidden_size, hidden, device_rows, gathered);
  const float temperature = batch[0]->temperature;
  vocab_logprob_forward<T>(device, n, c.hidden_size, gathered, c.hidden_size,
                           weights.table(weights.layout->head()), c.vocab_size,
                           temperature > 0 ? 1.0f / temperature : 1.0f, device_targets, logprob, lse, entropy,
                           device::narrow_weights<T>(weights));
  std::vector<float> l(static_cast<size_t>(n)), e(static_cast<size_t>(n));
  device.copy_out(l.data(), logprob, n * 4);
  device.copy_out(e.data(), entropy, n * 4);
  size_t at = 0;
  for (ScoredSequence* s : batch) {
    const size_t count = s->tokens.size() - 1;
    s->logprobs.assign(l.begin() + static_cast<int64_t>(at), l.begin() + static_cast<int64_t>(at + count));
    s->entropies.assign(e.begin() + static_cast<int64_t>(at), e.begin() + static_cast<int64_t>(at + count));
    at += count;
  }
}

}  // namespace

int64_t device_score_scratch_bytes(const ParamLayout& layout, int64_t rows) {
  const ModelConfig& c = layout.config();
  const int64_t slots = kda_chunk_slots(rows, rows / 16 + 1), act = device::activation_bytes(layout);
  return device_scratch_bytes(layout, rows) + rows * c.hidden_size * (4 * (2 * c.num_layers + 2) + 2 * act) +
         slots * c.linear_heads * c.linear_head_dim * c.linear_head_dim * act + kLogitBytes + rows * 32;
}

void device_score(Device& device, const Weights& weights, int64_t rows, std::vector<ScoredSequence>& sequences) {
  std::vector<ScoredSequence*> batch;
  int64_t held = 0;
  const auto flush = [&] {
    if (batch.empty()) return;
    if (weights.layout->matrices() == MatrixForm::kTiles) {
      score<bf16>(device, weights, batch);
    } else {
      score<float>(device, weights, batch);
    }
    batch.clear();
    held = 0;
  };
  for (ScoredSequence& s : sequences) {
    const auto n = static_cast<int64_t>(s.tokens.size());
    if (held + n > rows || (!batch.empty() && batch[0]->temperature != s.temperature)) flush();
    batch.push_back(&s);
    held += n;
  }
  flush();
}

}  // namespace perigee::policy
