#include "agents/host/host.h"

#include <gtest/gtest.h>

#include <atomic>
#include <map>
#include <thread>

#include "tests/agents/host/helpers.h"

namespace perigee::agents {
namespace {

using namespace testing;

// What an engine makes of a request alone.
std::vector<Answer> alone(SmallModel& model, const std::vector<int32_t>& prompt,
                          const std::vector<uint64_t>& seeds, int64_t max_new) {
  kernels::Context ctx(1);
  policy::Engine engine(ctx, model.layout, {});
  engine.set_weights(model.weights(), 1);
  policy::GenerationGroup g;
  g.prompt = prompt;
  g.stop_tokens = many_stops();
  for (size_t i = 0; i < seeds.size(); ++i) {
    policy::GenerationRequest r;
    r.id = i;
    r.seed = seeds[i];
    r.max_new_tokens = max_new;
    g.members.push_back(r);
  }
  engine.submit(g);
  std::vector<Answer> answers(seeds.size());
  std::vector<policy::GeneratedToken> out;
  while (!engine.idle()) engine.step(out);
  for (const auto& t : out) {
    Answer& a = answers[t.id];
    a.tokens.push_back(t.token);
    a.logprobs.push_back(t.logprob);
    a.versions.push_back(t.version);
    a.finish = t.finish;
  }
  return answers;
}

TEST(Host, ManyThreadsGetTheAnswersOfAnEngineAlone) {
  SmallModel model(1);
  HostConfig config;
  config.engine.max_running = 7;
  config.engine.prefill_chunk = 50;
  config.engine.prefix_cache_bytes = 1 << 20;
  config.engine.prefix_chunk = 32;
  Host host(model.layout, config, engine_of(model), nullptr);
  std::vector<std::thread> threads;
  std::atomic<int> wrong = 0;
  for (uint64_t t = 0; t < 4; ++t)
    threads.emplace_back([&, t] {
      Random random(t);
      for (int i = 0; i < 12; ++i) {
        HostRequest r = request(random_tokens(random, 1, 60), 0);
        r.seeds.clear();
        for (int64_t n = random.next_int(1, 4); n > 0; --n) r.seeds.push_back(random.next_u64());
        const auto want = alone(model, r.prompt, r.seeds, r.max_new_tokens);
        const auto sink = std::make_shared<Listener>(static_cast<int>(r.seeds.size()));
        const auto prompt = static_cast<int64_t>(r.prompt.size());
        host.start(std::move(r), sink);
        const auto& got = sink->wait();
        if (got != want || got[0].usage.prompt != prompt) ++wrong;
      }
    });
  for (auto& t : threads) t.join();
  EXPECT_EQ(wrong, 0);
  EXPECT_TRUE(host.alive(std::chrono::seconds(20)));  // the last round is counted
  const HostStats s = host.stats();
  EXPECT_EQ(s.requests, 48);
  EXPECT_EQ(s.queued, 0);
  EXPECT_GT(s.done_stop, 0);
  EXPECT_GT(s.done_length, 0);
  EXPECT_GT(s.steps, 0);
  int64_t in_buckets = 0;
  for (int64_t b : s.step_buckets) in_buckets += b;
  EXPECT_EQ(in_buckets, s.steps);
  EXPECT_EQ(s.generated_tokens, s.engine.generated_tokens);
}

TEST(Host, PromptLogprobsComeBeforeTheFirstToken) {
  SmallModel model(2);
  Host host(model.layout, {}, engine_of(model), nullptr);
  Random random(1);
  HostRequest r = request(random_tokens(random, 40, 40), 5);
  r.prompt_logprobs = true;
  r.top_logprobs = 3;
  const auto prompt = r.prompt;
  const auto sink = std::make_shared<Listener>();
  host.start(std::move(r), sink);
  sink->one();
  ASSERT_EQ(sink->prompt().size(), 40u);
  for (size_t i = 0; i < prompt.size(); ++i) {
    EXPECT_EQ(sink->prompt()[i].token, prompt[i]);
    if (i > 0) {
      EXPECT_LT(sink->prompt()[i].logprob, 0.0f);
    }
  }
}

TEST(Host, ASinkEndsItsChoiceWhereATextStopWasCompleted) {
  SmallModel model(3);
  Host host(model.layout, {}, engine_of(model), nullptr);
  Random random(2);
  HostRequest r = request(random_tokens(random, 10, 10), 0, 30);
  r.stop_tokens.clear();
  r.seeds = {1, 2, 3};
  const auto want = [&] {
    const auto sink = std::make_shared<Listener>(3);
    HostRequest copy;
    copy.prompt = r.prompt;
    copy.seeds = r.seeds;
    copy.max_new_tokens = 30;
    host.start(std::move(copy), sink);
    return sink->wait();
  }();
  const auto sink = std::make_shared<Listener>(3);
  sink->stop = [](int choice, const Answer& so_far) {
    return so_far.tokens.size() == 5u + static_cast<size_t>(choice);
  };
  host.start(std::move(r), sink);
  const auto& got = sink->wait();
  for (size_t c = 0; c < 3; ++c) {
    EXPECT_EQ(got[c].finish, FinishReason::kStop);
    ASSERT_EQ(got[c].tokens.size(), 5 + c);
    EXPECT_TRUE(std::equal(got[c].tokens.begin(), got[c].tokens.end(), want[c].tokens.begin()));
  }
}

// H1 under threads that start, cancel, pause and resume at random.
TEST(Host, EveryChoiceEndsOnceWhateverHappens) {
  SmallModel model(4);
  MemoryLog log;
  HostConfig config;
  config.engine.max_running = 5;
  config.engine.memory_bytes = 1 << 20;
  config.max_queued = 12;
  std::vector<std::shared_ptr<Listener>> all;
  std::mutex all_mutex;
  std::atomic<int> overloaded = 0, conflicts = 0;
  {
    Host host(model.layout, config, engine_of(model), &log);
    host.open_session({"s"});
    std::vector<std::thread> threads;
    for (uint64_t t = 0; t < 4; ++t)
      threads.emplace_back([&, t] {
        Random random(10 + t);
        std::vector<uint64_t> tickets;
        for (int i = 0; i < 80; ++i) {
          const int64_t what = random.next_int(0, 9);
          if (what <= 6) {
            HostRequest r = request(random_tokens(random, 1, 40), random.next_u64());
            if (what == 6) r.session = "s";
            if (what == 5) r.seeds = {1, 2, 3};
            const auto sink = std::make_shared<Listener>(static_cast<int>(r.seeds.size()));
            try {
              tickets.push_back(host.start(std::move(r), sink));
              const std::lock_guard lock(all_mutex);
              all.push_back(sink);
            } catch (const Overloaded&) {
              ++overloaded;
              EXPECT_TRUE(host.alive(std::chrono::seconds(20)));
            } catch (const Conflict&) {
              ++conflicts;
            }
          } else if (what <= 8 && !tickets.empty()) {
            host.cancel(
                tickets[static_cast<size_t>(random.next_int(0, static_cast<int64_t>(tickets.size()) - 1))]);
          } else if (t == 0) {
            host.pause(static_cast<PauseMode>(random.next_int(0, 2)));
            EXPECT_TRUE(host.alive(std::chrono::seconds(20))) << "also while paused";
            host.resume();
          }
        }
      });
    for (auto& t : threads) t.join();
    host.stop(PauseMode::kWait);
    EXPECT_THROW(host.start(request({5}, 1), std::make_shared<Listener>()), Overloaded);
    EXPECT_FALSE(host.alive(std::chrono::milliseconds(10)));
    const HostStats s = host.stats();
    EXPECT_EQ(s.queued, 0);
    EXPECT_EQ(s.failed, 0);
  }
  for (const auto& sink : all) EXPECT_TRUE(sink->done());
  EXPECT_GT(all.size(), 50u);
  EXPECT_GT(overloaded + conflicts, 0);
}

TEST(Host, DestroyedWhileItRunsCancelsAll) {
  SmallModel model(5);
  std::vector<std::shared_ptr<Listener>> sinks;
  {
    Host host(model.layout, {}, engine_of(model), nullptr);
    for (uint64_t i = 0; i < 10; ++i) {
      sinks.push_back(std::make_shared<Listener>());
      HostRequest r = request({30, 31}, i, 4000);
      r.stop_tokens.clear();
      host.start(std::move(r), sinks.back());
    }
    sinks[0]->wait_tokens(3);
  }
  for (const auto& sink : sinks) EXPECT_EQ(sink->one().finish, FinishReason::kCancelled);
}

TEST(Host, PauseKeepsWaitsOrAborts) {
  SmallModel model(6);
  Host host(model.layout, {}, engine_of(model), nullptr);
  const auto begin = [&](int64_t max_new) {
    const auto sink = std::make_shared<Listener>();
    HostRequest r = request({30, 31, 32}, 7, max_new);
    r.stop_tokens.clear();
    host.start(std::move(r), sink);
    return sink;
  };
  const auto whole = begin(60)->one();

  auto sink = begin(60);
  sink->wait_tokens(5);
  host.pause(PauseMode::kKeep);
  const int64_t steps = host.stats().steps;
  const auto came_later = begin(60);
  EXPECT_TRUE(host.alive(std::chrono::seconds(20)));
  EXPECT_EQ(host.stats().steps, steps);
  host.resume();
  EXPECT_EQ(sink->one(), whole);
  EXPECT_EQ(came_later->one(), whole);

  sink = begin(200);
  sink->wait_tokens(1);
  host.pause(PauseMode::kWait);
  EXPECT_TRUE(sink->done());
  EXPECT_EQ(sink->one().finish, FinishReason::kLength);
  const auto next = begin(60);
  EXPECT_TRUE(host.alive(std::chrono::seconds(20)));
  EXPECT_FALSE(next->done());
  host.resume();
  EXPECT_EQ(next->one(), whole);

  sink = begin(3000);
  sink->wait_tokens(1);
  host.pause(PauseMode::kAbort);
  EXPECT_TRUE(sink->done());
  EXPECT_EQ(sink->one().finish, FinishReason::kCancelled);
  host.resume();
}

TEST(Host, NewWeightsComeBetweenTwoSteps) {
  SmallModel a(7), b(8);
  Host host(a.layout, {}, engine_of(a), nullptr);
  const auto sink = std::make_shared<Listener>();
  HostRequest r = request({30, 31}, 7, 2000);
  r.stop_tokens.clear();
  host.start(std::move(r), sink);
  sink->wait_tokens(5);
  host.set_weights(b.weights(), 2);
  const Answer& answer = sink->one();
  EXPECT_EQ(answer.versions.front(), 1u);
  EXPECT_EQ(answer.versions.back(), 2u);
  EXPECT_TRUE(std::ranges::is_sorted(answer.versions));
  EXPECT_EQ(host.stats().weights_version, 2u);
}

TEST(Host, BadRequestsAreRefusedBeforeTheyBegin) {
  SmallModel model(9);
  HostConfig config;
  config.engine.memory_bytes = 300 << 10;
  Host host(model.layout, config, engine_of(model), nullptr);
  const auto sink = std::make_shared<Listener>();
  const auto refused = [&](auto change) {
    HostRequest r = request({30, 31}, 1);
    change(r);
    EXPECT_THROW(host.start(std::move(r), sink), Error);
  };
  refused([](HostRequest& r) { r.prompt.clear(); });
  refused([](HostRequest& r) { r.prompt = {97}; });
  refused([](HostRequest& r) { r.prompt = {-1}; });
  refused([](HostRequest& r) { r.max_new_tokens = 0; });
  refused([](HostRequest& r) { r.max_new_tokens = INT64_MAX; });
  refused([](HostRequest& r) { r.max_new_tokens = 4000; });
  refused([](HostRequest& r) { r.seeds.clear(); });
  refused([](HostRequest& r) { r.top_logprobs = 21; });
  refused([](HostRequest& r) { r.sampling.top_p = 2; });
  refused([](HostRequest& r) { r.session = "unknown"; });
  EXPECT_THROW(host.open_session({"a"}), Error) << "no log";
  EXPECT_EQ(host.stats().requests, 0);
  EXPECT_FALSE(sink->done());
}

TEST(Host, WhatAStepThrowsEndsEverythingWithTheReason) {
  SmallModel model(10);
  Host host(model.layout, {}, engine_of(model), nullptr);
  const auto other = std::make_shared<Listener>(), bad = std::make_shared<Listener>();
  HostRequest r = request({30, 31}, 1, 4000);
  r.stop_tokens.clear();
  host.start(std::move(r), other);
  other->wait_tokens(2);
  bad->stop = [](int, const Answer&) -> bool { throw std::runtime_error("the sky fell"); };
  host.start(request({30, 31}, 1), bad);
  EXPECT_NE(other->one().error.find("the sky fell"), std::string::npos);
  EXPECT_NE(bad->one().error.find("the sky fell"), std::string::npos);
  EXPECT_NE(host.broken().find("the sky fell"), std::string::npos);
  EXPECT_THROW(host.start(request({30}, 1), bad), Error);
  EXPECT_FALSE(host.alive(std::chrono::seconds(5)));
}

TEST(Host, AnEngineThatCanNotBeMadeIsSaidAtOnce) {
  SmallModel model(11);
  EXPECT_THROW(Host(
                   model.layout, {},
                   [](const policy::EngineConfig&) -> std::unique_ptr<policy::Engine> {
                     throw_environment("no device");
                   },
                   nullptr),
               Error);
}

TEST(Host, RunsBetweenStepsAndGivesBackWhatItThrows) {
  SmallModel model(12);
  Host host(model.layout, {}, engine_of(model), nullptr);
  uint32_t version = 0;
  host.run_between_steps([&](policy::Engine& e) { version = e.version(); });
  EXPECT_EQ(version, 1u);
  EXPECT_THROW(host.run_between_steps([](policy::Engine&) { throw_input("no"); }), Error);
  EXPECT_TRUE(host.alive(std::chrono::seconds(20)));
}

}  // namespace
}  // namespace perigee::agents
