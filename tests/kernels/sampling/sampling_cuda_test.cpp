// The device draws the tokens of the CPU from the same logits, whatever the parameters and the other rows.
#include <cfloat>
#include <map>

#include "base/random.h"
#include "kernels/sampling/sampling_device.h"
#include "kernels/vocab/stats.h"
#include "tests/kernels/device_fixture.h"
#include "tests/kernels/mla/testing.h"

namespace perigee {
namespace {

using kernels::Device;
using kernels::DeviceArray;
using kernels::DeviceSampling;
using kernels::SamplingParams;
using testing::Floats;
using testing::normals;
using Tokens = std::vector<int32_t>;

class SamplingDevice : public kernels::DeviceTest {};

struct Row {
  SamplingParams params;
  uint64_t seed = 0;
  int64_t position = 0;
  Tokens prompt, generated;
};
struct Drawn {
  Tokens tokens;
  Floats logprob, entropy;
};

Drawn draw_on_device(Device& d, const Floats& logits, int64_t vocab, int64_t ld, const std::vector<Row>& rows,
                     bool plain) {
  std::vector<DeviceSampling> params;
  std::vector<kernels::SeenToken> seen(1);
  std::vector<kernels::TokenBias> bias(1);
  for (const Row& r : rows) {
    DeviceSampling s = kernels::device_sampling(r.params, r.seed, r.position);
    std::map<int32_t, int32_t> count;
    for (int32_t t : r.prompt) count[t];
    for (int32_t t : r.generated) ++count[t];
    s.seen_begin = static_cast<int32_t>(seen.size());
    s.seen_count = static_cast<int32_t>(count.size());
    for (const auto& [token, n] : count) seen.push_back({token, n});
    s.bias_begin = static_cast<int32_t>(bias.size());
    s.bias_count = static_cast<int32_t>(r.params.logit_bias.size());
    for (const auto& [token, b] : r.params.logit_bias) bias.push_back({token, b});
    params.push_back(s);
  }
  const auto n = static_cast<int64_t>(rows.size());
  DeviceArray<float> z(d, logits), logprob(d, n), entropy(d, n);
  DeviceArray<DeviceSampling> p(d, params);
  DeviceArray<kernels::SeenToken> s(d, seen);
  DeviceArray<kernels::TokenBias> b(d, bias);
  DeviceArray<int32_t> tokens(d, n);
  kernels::sample_tokens(d, n, vocab, z, ld, p, s, b, plain, tokens, logprob, entropy);
  return {tokens.get(), logprob.get(), entropy.get()};
}

void expect_the_tokens_of_the_cpu(Device& d, const Floats& logits, int64_t vocab, int64_t ld,
                                  const std::vector<Row>& rows, bool plain) {
  const Drawn got = draw_on_device(d, logits, vocab, ld, rows, plain);
  for (size_t t = 0; t < rows.size(); ++t) {
    const Row& r = rows[t];
    const float* const z = logits.data() + static_cast<int64_t>(t) * ld;
    const int32_t want = kernels::sample_token(z, vocab, r.params, r.seed, r.position, r.prompt, r.generated);
    const auto& p = r.params;
    EXPECT_EQ(got.tokens[t], want) << "row " << t << " of " << rows.size() << ", vocab " << vocab
                                   << ": temperature " << p.temperature << " top_k " << p.top_k << " top_p "
                                   << p.top_p << " min_p " << p.min_p << " repetition "
                                   << p.repetition_penalty << " biases " << p.logit_bias.size() << " seed "
                                   << r.seed << " position " << r.position;
    kernels::vocab::RunningStats stats;
    for (int64_t i = 0; i < vocab; i += kernels::kVocabBlock)
      kernels::vocab::add_block(z + i, std::min(kernels::kVocabBlock, vocab - i), p.inv_temperature(), stats);
    const auto done = kernels::vocab::finish(stats);
    const float logprob = kernels::logit_logprob(z[want], p.inv_temperature(), done.lse);
    EXPECT_EQ(std::memcmp(&got.logprob[t], &logprob, 4), 0) << got.logprob[t] << " against " << logprob;
    EXPECT_EQ(std::memcmp(&got.entropy[t], &done.entropy, 4), 0)
        << got.entropy[t] << " against " << done.entropy;
  }
}

std::vector<Row> plain_rows(int64_t n, uint64_t seed) {
  Random random(seed);
  std::vector<Row> rows(static_cast<size_t>(n));
  for (Row& r : rows) {
    r.seed = random.next_u64();
    r.position = random.next_int(0, 100000);
    r.params.temperature = random.next_float() < 0.2f ? 0.0f : 0.2f + 1.5f * random.next_float();
  }
  return rows;
}

TEST_F(SamplingDevice, plain_rows_draw_the_tokens_of_the_cpu) {
  for (const int64_t vocab : {1, 2, 15, 255, 256, 300, 2500, 20480, 50257}) {
    const int64_t rows = 300, ld = vocab + 3;
    expect_the_tokens_of_the_cpu(device(), normals(rows * ld, static_cast<uint64_t>(vocab), 2.0f), vocab, ld,
                                 plain_rows(rows, 7), true);
  }
  for (const int64_t vocab : {163840, 163841, 300001, 410000}) {
    const int64_t rows = vocab == 163840 ? 24 : 10;
    expect_the_tokens_of_the_cpu(device(), normals(rows * vocab, 3, 2.0f), vocab, vocab, plain_rows(rows, 8),
                                 true);
    expect_the_tokens_of_the_cpu(device(), normals(vocab, 4, 1.0f), vocab, vocab, plain_rows(1, 9), true);
  }
}

TEST_F(SamplingDevice, greedy_takes_the_lowest_of_equals) {
  const int64_t vocab = 5000;
  Floats z = normals(4 * vocab, 1);
  for (const int64_t i : {4999, 3000, 2999, 700}) z[static_cast<size_t>(i)] = 9.0f;
  std::fill(z.begin() + vocab, z.begin() + 2 * vocab, -INFINITY);
  std::fill(z.begin() + 2 * vocab, z.begin() + 3 * vocab, -INFINITY);
  z[static_cast<size_t>(2 * vocab + 4000)] = -FLT_MAX;
  std::vector<Row> rows(4);
  for (Row& r : rows) r.params.temperature = 0;
  const Drawn got = draw_on_device(device(), z, vocab, vocab, rows, true);
  for (size_t t = 0; t < rows.size(); ++t)
    EXPECT_EQ(got.tokens[t], kernels::sample_token(z.data() + static_cast<int64_t>(t) * vocab, vocab,
                                                   rows[t].params, 0, 0, {}, {}));
  EXPECT_EQ(got.tokens[0], 700);
}

TEST_F(SamplingDevice, rows_without_a_distribution_fall_back_to_greedy) {
  const int64_t vocab = 3000;
  Floats z = normals(2 * vocab, 1);
  z[17] = NAN;
  z[static_cast<size_t>(vocab + 50)] = INFINITY;
  const std::vector<Row> rows(2);
  const Drawn got = draw_on_device(device(), z, vocab, vocab, rows, true);
  for (size_t t = 0; t < 2; ++t)
    EXPECT_EQ(got.tokens[t],
              kernels::sample_token(z.data() + static_cast<int64_t>(t) * vocab, vocab, {}, 0, 0, {}, {}));
}

std::vector<Row> mixed_rows(int64_t n, int64_t vocab, uint64_t seed) {
  std::vector<Row> rows = plain_rows(n, seed);
  Random random(seed + 1);
  const auto chance = [&](float p) { return random.next_float() < p; };
  const auto token = [&] { return static_cast<int32_t>(random.next_int(0, vocab - 1)); };
  for (Row& r : rows) {
    SamplingParams& p = r.params;
    if (chance(0.2f)) continue;
    if (chance(0.4f)) p.top_k = static_cast<int32_t>(random.next_int(1, chance(0.5f) ? 50 : vocab + 5));
    if (chance(0.4f)) p.top_p = chance(0.3f) ? 0.999f : 0.05f + 0.9f * random.next_float();
    if (chance(0.3f)) p.min_p = 0.2f * random.next_float();
    if (chance(0.3f)) {
      p.repetition_penalty = 0.8f + random.next_float();
      p.presence_penalty = random.next_float() - 0.3f;
      p.frequency_penalty = random.next_float() - 0.3f;
      for (int i = 0; i < 40; ++i) r.prompt.push_back(token());
      for (int i = 0; i < 60; ++i) r.generated.push_back(i % 3 == 0 && i > 0 ? r.generated[0] : token());
    }
    if (chance(0.3f))
      for (int i = 0; i < 30; ++i)
        p.logit_bias.emplace_back(token(), i % 7 == 0 ? -INFINITY : 6 * random.next_float());
    if (chance(0.2f) && !p.logit_bias.empty()) p.logit_bias.push_back(p.logit_bias[1]);
  }
  return rows;
}

TEST_F(SamplingDevice, filters_penalties_and_biases_draw_the_tokens_of_the_cpu) {
  for (const int64_t vocab : {1, 7, 300, 2500, 33333}) {
    const int64_t rows = vocab > 10000 ? 60 : 300;
    expect_the_tokens_of_the_cpu(device(), normals(rows * vocab, static_cast<uint64_t>(vocab), 2.0f), vocab,
                                 vocab, mixed_rows(rows, vocab, 20), false);
  }
  expect_the_tokens_of_the_cpu(device(), normals(10 * 163840, 5, 1.5f), 163840, 163840,
                               mixed_rows(10, 163840, 30), false);
}

// Many equal logits: what a filter keeps among them is decided by the token. A flat row makes top_p keep thousands.
TEST_F(SamplingDevice, filters_cut_between_equals_as_the_cpu_does) {
  const int64_t vocab = 9000, rows = 120;
  Floats z = normals(rows * vocab, 6);
  for (float& x : z) x = std::round(x * 2) / 2;
  std::fill_n(z.begin(), 20 * vocab, 0.0f);
  expect_the_tokens_of_the_cpu(device(), z, vocab, vocab, mixed_rows(rows, vocab, 40), false);
}

}  // namespace
}  // namespace perigee
