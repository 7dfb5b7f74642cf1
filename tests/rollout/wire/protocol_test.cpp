#include "rollout/wire/protocol.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>

#include "base/random.h"

namespace perigee::rollout {
namespace {

Lease sample_lease() {
  Lease lease;
  lease.group_id = 5;
  lease.version = 3;
  lease.max_new_tokens = 64;
  lease.temperature = 0.7f;
  lease.sampling = {{"top_k", 5}};
  lease.prompt = {1, 2, 3};
  lease.task_index = 77;
  lease.held_out = true;
  lease.members = {{{9, 2}, ~uint64_t{0}, 4, {7, 8}, {1, 0}}, {{10, 1}, 5, 0, {}}};
  return lease;
}

Segment sample_segment() {
  Segment s;
  s.episode_id = -4;
  s.attempt = 2;
  s.index = 1;
  s.tokens = {1, 2};
  s.logprobs = {-0.1f, -0.0f};
  s.versions = {3, 4};
  s.mask = {1, 0};
  s.finish = FinishReason::kTurns;
  s.tools = {{2, 1700000000000000, 15, "calc\xff", "{\"a\": 1}", std::string("4\0\x80", 3), "ok", "d1"},
             {2, 1700000000000001, 0, "", "", "no such tool", "error", "d2"}};
  return s;
}

TrainRequest sample_train() {
  TrainRequest t;
  t.step = 4;
  t.version_before = 8;
  t.version_after = 9;
  policy::TrainSequence a;
  a.tokens = {1, 2, 3};
  a.mask = {0, 1, 1};
  a.mu = {0, -0.5f, -0.25f};
  a.temperature = 0.9f;
  a.advantage = 1.0f / 3;
  t.batch = {a, a};
  t.batch[1].tokens = {4};
  t.batch[1].mask = {1};
  t.batch[1].mu = {-1};
  return t;
}

ScoredGroup sample_scored() {
  Reward r;
  r.episode_id = 3;
  r.total = 0.1;
  r.failed = true;
  r.components = {{"numeric", 0.1, 2, "timeout", "slow"}};
  return {7, {r}, {true}};
}

TEST(Protocol, EverythingComesBackAsItWent) {
  const auto lease = decode_lease(encode(sample_lease()));
  ASSERT_TRUE(lease);
  EXPECT_EQ(lease->members[0].seed, ~uint64_t{0});
  EXPECT_EQ(lease->members[0].committed, (std::vector<int32_t>{7, 8}));
  EXPECT_EQ(lease->members[0].mask, (std::vector<uint8_t>{1, 0}));
  EXPECT_TRUE(lease->members[1].mask.empty());
  EXPECT_EQ(lease->task_index, 77);
  EXPECT_TRUE(lease->held_out);
  EXPECT_EQ(lease->members[1].key, (EpisodeKey{10, 1}));
  EXPECT_EQ(lease->temperature, 0.7f);
  EXPECT_EQ(lease->sampling, sample_lease().sampling);

  const auto segment = decode_segment(encode(sample_segment()));
  ASSERT_TRUE(segment);
  EXPECT_EQ(segment->episode_id, -4);
  EXPECT_EQ(segment->tokens, sample_segment().tokens);
  EXPECT_TRUE(std::signbit(segment->logprobs[1]));
  EXPECT_EQ(segment->mask, sample_segment().mask);
  EXPECT_EQ(segment->finish, FinishReason::kTurns);
  EXPECT_EQ(segment->tools, sample_segment().tools);

  const auto train = decode_train(encode(sample_train()));
  ASSERT_TRUE(train);
  ASSERT_EQ(train->batch.size(), 2u);
  EXPECT_EQ(train->batch[0].advantage, 1.0f / 3);
  EXPECT_EQ(train->batch[0].mask, sample_train().batch[0].mask);
  EXPECT_EQ(train->batch[1].mu, sample_train().batch[1].mu);

  const auto scored = decode_scored(encode(sample_scored()));
  ASSERT_TRUE(scored);
  EXPECT_EQ(scored->rewards[0].total, 0.1);
  EXPECT_EQ(scored->rewards[0].components[0].status, "timeout");

  const Stepped stepped{"rl", 3, 9, "ab", {{"loss", 0.1}, {"kl", 0}}};
  const auto again = decode_stepped(encode(stepped));
  ASSERT_TRUE(again);
  EXPECT_EQ(again->metrics, stepped.metrics);

  kernels::SamplingParams p;
  p.temperature = 0.5f;
  p.top_k = 3;
  p.min_p = 0.1f;
  EXPECT_EQ(*sampling_from_json(sampling_to_json(p), 0.5f), p);
  EXPECT_FALSE(sampling_from_json({{"top_q", 1}}, 1));
}

// A number that was cut to the parameter's type would draw other tokens than those that were asked for.
TEST(Protocol, SamplingParametersOutOfRangeAreRefused) {
  for (const char* bad : {R"({"top_k": 4294967297})", R"({"top_k": 1e30})", R"({"top_k": 2.5})", R"({"top_k": -2147483649})",
                          R"({"top_p": 1e300})", R"({"min_p": -1e39})", R"({"repetition_penalty": 1e39})"})
    EXPECT_FALSE(sampling_from_json(Json::parse(bad), 1)) << bad;
  EXPECT_FALSE(sampling_from_json({{"top_p", std::numeric_limits<double>::quiet_NaN()}}, 1));
  EXPECT_EQ(sampling_from_json({{"top_k", 2147483647}}, 1)->top_k, 2147483647);
}

TEST(Protocol, LogitBiasComesBackAsItWas) {
  kernels::SamplingParams p;
  p.logit_bias = {{2, 0.1f}, {10, -std::numeric_limits<float>::infinity()}, {257, -5}};
  const Json sent = Json::parse(sampling_to_json(p).dump());  // as text, which has no infinity
  EXPECT_EQ(sent, Json::parse(R"({"logit_bias": {"2": 0.10000000149011612, "10": "-inf", "257": -5.0}})"));
  EXPECT_EQ(*sampling_from_json(sent, 1), p);
  EXPECT_EQ(*logit_bias_from_json(Json::object()), LogitBias{});
  for (const char* bad : {"3", "[]", "null", R"([[1, 2]])", R"({"x": 1})", R"({"-1": 1})", R"({"07": 1})", R"({"7 ": 1})",
                          R"({"99999999999": 1})", R"({"7": "inf"})", R"({"7": null})", R"({"7": 1e39})", R"({"": 1})"}) {
    EXPECT_FALSE(logit_bias_from_json(Json::parse(bad))) << bad;
    EXPECT_FALSE(sampling_from_json({{"logit_bias", Json::parse(bad)}}, 1)) << bad;
  }
}

// Any field replaced by something else, removed, or a frame cut: nullopt or a value, never an exception or a crash.
TEST(Protocol, DamagedMessagesAreRefusedWithoutException) {
  Random random(11);
  const std::vector<Json> odd{nullptr, -1, 1e300, "x", Json::array(), Json::object(), true, ~uint64_t{0}, int64_t{1} << 40, Json::array({1, "a"})};
  const auto any = [&] { return odd[static_cast<size_t>(random.next_int(0, static_cast<int64_t>(odd.size()) - 1))]; };
  std::function<void(Json&)> damage = [&](Json& j) {
    if (j.empty() || !(j.is_object() || j.is_array()) || random.next_int(0, 3) == 0) {
      j = any();
      return;
    }
    auto it = j.begin();
    std::advance(it, random.next_int(0, static_cast<int64_t>(j.size()) - 1));
    if (j.is_object() && random.next_int(0, 4) == 0)
      j.erase(it);
    else
      damage(*it);
  };
  int refused = 0;
  for (int i = 0; i < 3000; ++i) {
    for (BusMessage m : {encode(sample_lease()), encode(sample_segment()), encode(sample_train()), encode(sample_scored()),
                         encode(Stepped{"rl", 3, 9, "ab", {{"loss", 0.1}}})}) {
      auto it = m.header.begin();
      std::advance(it, random.next_int(0, static_cast<int64_t>(m.header.size()) - 1));
      damage(*it);
      if (!m.frames.empty() && random.next_int(0, 2) == 0) {
        auto& f = m.frames[static_cast<size_t>(random.next_int(0, static_cast<int64_t>(m.frames.size()) - 1))];
        f.resize(f.size() - std::min<size_t>(f.size(), static_cast<size_t>(random.next_int(0, 5))));
      }
      if (!m.frames.empty() && random.next_int(0, 20) == 0) m.frames.pop_back();
      refused += !decode_lease(m);
      refused += !decode_segment(m);
      refused += !decode_train(m);
      refused += !decode_scored(m);
      refused += !decode_stepped(m);
      refused += !decode_score(m);
      refused += !decode_weights(m);
    }
  }
  EXPECT_GT(refused, 0);
}

}  // namespace
}  // namespace perigee::rollout
