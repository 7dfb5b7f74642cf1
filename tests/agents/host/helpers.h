// A host over a small random policy, and a sink that remembers.
#pragma once
#include <gtest/gtest.h>

#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "agents/host/host.h"
#include "base/random.h"
#include "tests/policy/small_model.h"

namespace perigee::agents::testing {

using policy::testing::SmallModel;

struct Answer {
  std::vector<int32_t> tokens;
  std::vector<float> logprobs;
  std::vector<uint32_t> versions;
  FinishReason finish = FinishReason::kNone;
  HostUsage usage;
  std::string error;

  bool operator==(const Answer& o) const {
    return tokens == o.tokens && logprobs == o.logprobs && versions == o.versions && finish == o.finish;
  }
};

class Listener : public HostSink {
 public:
  explicit Listener(int choices = 1) : answers_(static_cast<size_t>(choices)), ended_(answers_.size()) {}

  // Called for each token, on the engine's thread: what on_token answers.
  std::function<bool(int choice, const Answer& so_far)> stop;

  bool on_token(int choice, const HostToken& t) override {
    const std::lock_guard lock(mutex_);
    EXPECT_FALSE(ended_.at(static_cast<size_t>(choice))) << "a token after on_done";
    Answer& a = answers_.at(static_cast<size_t>(choice));
    a.tokens.push_back(t.token);
    a.logprobs.push_back(t.logprob);
    a.versions.push_back(t.version);
    changed_.notify_all();
    return stop && stop(choice, a);
  }
  void on_prompt(std::vector<HostToken> prompt) override {
    const std::lock_guard lock(mutex_);
    EXPECT_TRUE(answers_[0].tokens.empty()) << "the prompt comes first";
    EXPECT_TRUE(prompt_.empty()) << "once";
    prompt_ = std::move(prompt);
  }
  void on_done(int choice, FinishReason finish, const HostUsage& usage, const std::string& error) override {
    const std::lock_guard lock(mutex_);
    EXPECT_FALSE(ended_.at(static_cast<size_t>(choice))) << "on_done twice";
    ended_[static_cast<size_t>(choice)] = true;
    Answer& a = answers_[static_cast<size_t>(choice)];
    a.finish = finish;
    a.usage = usage;
    a.error = error;
    EXPECT_EQ(error.empty(), finish != FinishReason::kError);
    EXPECT_EQ(usage.generated, static_cast<int64_t>(a.tokens.size()));
    ++done_;
    changed_.notify_all();
  }

  // Until every choice has ended.
  const std::vector<Answer>& wait() {
    std::unique_lock lock(mutex_);
    EXPECT_TRUE(changed_.wait_for(lock, std::chrono::seconds(60), [&] { return done_ == answers_.size(); }));
    return answers_;
  }
  const Answer& one() { return wait()[0]; }
  void wait_tokens(size_t n) {
    std::unique_lock lock(mutex_);
    EXPECT_TRUE(changed_.wait_for(lock, std::chrono::seconds(60), [&] {
      return answers_[0].tokens.size() >= n || done_ == answers_.size();
    }));
  }
  bool done() {
    const std::lock_guard lock(mutex_);
    return done_ == answers_.size();
  }
  const std::vector<HostToken>& prompt() const { return prompt_; }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<Answer> answers_;
  std::vector<bool> ended_;
  std::vector<HostToken> prompt_;
  size_t done_ = 0;
};

inline Host::MakeEngine engine_of(SmallModel& model, uint32_t version = 1) {
  const auto ctx = std::make_shared<kernels::Context>(1);
  return [ctx, &model, version](const policy::EngineConfig& config) {
    auto engine = std::make_unique<policy::Engine>(*ctx, model.layout, config);
    engine->set_weights(model.weights(), version);
    return engine;
  };
}

inline std::vector<int32_t> random_tokens(Random& random, int64_t least, int64_t most) {
  std::vector<int32_t> t;
  for (int64_t n = random.next_int(least, most); n > 0; --n)
    t.push_back(static_cast<int32_t>(random.next_int(21, 96)));
  return t;
}

// A fifth of the vocabulary ends a turn, so that turns are short.
inline std::vector<int32_t> many_stops() {
  std::vector<int32_t> t;
  for (int32_t i = 1; i <= 20; ++i) t.push_back(i);
  return t;
}

inline HostRequest request(std::vector<int32_t> prompt, uint64_t seed, int64_t max_new = 20) {
  HostRequest r;
  r.prompt = std::move(prompt);
  r.seeds = {seed};
  r.max_new_tokens = max_new;
  r.stop_tokens = many_stops();
  return r;
}

// A turn of a session, to its end.
inline Answer turn(Host& host, const std::string& session, std::vector<int32_t> tokens, uint64_t seed,
                   int64_t max_new = 20, std::vector<ToolEvent> tools = {}) {
  HostRequest r = request(std::move(tokens), seed, max_new);
  r.session = session;
  r.tools = std::move(tools);
  const auto sink = std::make_shared<Listener>();
  host.start(std::move(r), sink);
  return sink->one();
}

}  // namespace perigee::agents::testing
