#include "policy/device/inputs.h"

#include <algorithm>
#include <unordered_map>

namespace perigee::policy {

using namespace kernels;

int64_t most_pages(std::span<const SequenceSlice> slices) {
  int64_t pages = 0;
  for (const SequenceSlice& s : slices) pages = std::max(pages, static_cast<int64_t>(s.blocks.size()));
  return pages;
}

Inputs place_inputs(InputBlock& block, std::span<const int32_t> tokens, std::span<const SequenceSlice> slices,
                    int64_t rows, int64_t slots, int64_t pages, std::span<const int32_t> last) {
  Inputs in;
  const DeviceSlice* slice_at;
  std::byte *const *recurrent_at, *const *pages_at;
  const int32_t *token_at, *active_at, *last_at;
  DeviceSlice* slice = block.place<DeviceSlice>(slots, &slice_at);
  std::byte** recurrent = block.place<std::byte*>(slots, &recurrent_at);
  int32_t* active = block.place<int32_t>(1, &active_at);
  int32_t* row_of_last = block.place<int32_t>(slots, &last_at);
  int32_t* token = block.place<int32_t>(rows, &token_at);
  std::byte** page = block.place<std::byte*>(slots * pages, &pages_at);

  const auto n = static_cast<int64_t>(slices.size());
  const int64_t begin = n > 0 ? slices[0].slice.begin : 0;
  int64_t longest = 0;
  for (int64_t i = 0; i < slots; ++i) {
    if (i >= n) {
      // Padding: no rows, and memory that nothing reads.
      slice[i] = {static_cast<int32_t>(i < rows ? i : 0), 0, 0, 0};
      recurrent[i] = recurrent[0];
      for (int64_t b = 0; b < pages; ++b) page[i * pages + b] = page[b];
      continue;
    }
    const SequenceSlice& s = slices[static_cast<size_t>(i)];
    slice[i] = {static_cast<int32_t>(s.slice.begin - begin), static_cast<int32_t>(s.slice.count),
                static_cast<int32_t>(s.slice.position), 0};
    longest = std::max(longest, s.slice.count);
    recurrent[i] = s.recurrent;
    for (int64_t b = 0; b < pages; ++b)
      page[i * pages + b] =
          b < static_cast<int64_t>(s.blocks.size()) ? s.blocks[static_cast<size_t>(b)] : nullptr;
  }
  *active = static_cast<int32_t>(tokens.size());
  for (int64_t i = 0; i < slots; ++i)
    row_of_last[i] = i < static_cast<int64_t>(last.size()) ? last[static_cast<size_t>(i)] : 0;
  for (int64_t i = 0; i < rows; ++i) token[i] = i < *active ? tokens[static_cast<size_t>(i)] : -1;

  in.batch.rows = static_cast<int32_t>(rows);
  in.batch.slices = static_cast<int32_t>(slots);
  in.batch.max_count = static_cast<int32_t>(longest);
  in.batch.max_pages = static_cast<int32_t>(pages);
  in.batch.slice = slice_at;
  in.batch.recurrent = recurrent_at;
  in.batch.pages = pages_at;
  in.tokens = token_at;
  in.active = active_at;
  in.last = last_at;
  return in;
}

namespace {

bool penalised(const SamplingParams& p) {
  return p.repetition_penalty != 1 || p.presence_penalty != 0 || p.frequency_penalty != 0;
}

}  // namespace

DrawInputs place_draws(InputBlock& block, std::span<const Backend::Draw> draws, int64_t vocab) {
  const auto n = static_cast<int64_t>(draws.size());
  // What the rows bring along.
  int64_t seen = 0, biases = 0, masks = 0;
  const int64_t words = (vocab + 31) / 32;
  DrawInputs in;
  for (const Backend::Draw& d : draws) {
    const SamplingParams& p = *d.sampling;
    in.plain = in.plain && is_plain(p) && d.allowed.empty();
    masks += d.allowed.empty() ? 0 : 1;
    if (penalised(p)) seen += static_cast<int64_t>(d.prompt.size() + d.generated.size());
    biases += static_cast<int64_t>(p.logit_bias.size());
  }
  block.reserve(n * static_cast<int64_t>(sizeof(DeviceSampling)) +
                seen * static_cast<int64_t>(sizeof(SeenToken)) +
                biases * static_cast<int64_t>(sizeof(TokenBias)) + masks * words * 4 + 5 * 64);
  DeviceSampling* params = block.place<DeviceSampling>(n, &in.params);
  SeenToken* seen_list = block.place<SeenToken>(seen, &in.seen);
  TokenBias* bias_list = block.place<TokenBias>(biases, &in.bias);
  const uint32_t* mask_at;
  uint32_t* mask_list = block.place<uint32_t>(masks * words, &mask_at);
  int32_t seen_used = 0, bias_used = 0;
  for (int64_t i = 0; i < n; ++i) {
    const Backend::Draw& d = draws[static_cast<size_t>(i)];
    params[i] = device_sampling(*d.sampling, d.seed, d.index);
    const SamplingParams& p = *d.sampling;
    if (penalised(p)) {
      params[i].seen_begin = seen_used;
      std::unordered_map<int32_t, int32_t> place;
      const auto add = [&](int32_t token, int32_t generated) {
        const auto [it, fresh] = place.emplace(token, seen_used);
        if (fresh) seen_list[seen_used++] = {token, 0};
        seen_list[it->second].generated += generated;
      };
      for (int32_t token : d.prompt) add(token, 0);
      for (int32_t token : d.generated) add(token, 1);
      params[i].seen_count = seen_used - params[i].seen_begin;
    }
    params[i].bias_begin = bias_used;
    for (const auto& [token, bias] : p.logit_bias) bias_list[bias_used++] = {token, bias};
    params[i].bias_count = bias_used - params[i].bias_begin;
    if (!d.allowed.empty()) {
      PERIGEE_CHECK(static_cast<int64_t>(d.allowed.size()) == words, "a mask of {} words", d.allowed.size());
      params[i].allowed = mask_at;
      std::ranges::copy(d.allowed, mask_list);
      mask_at += words;
      mask_list += words;
    }
  }
  return in;
}

}  // namespace perigee::policy
