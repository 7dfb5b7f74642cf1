#include "reward/rubric.h"

#include <algorithm>
#include <cmath>
#include <exception>

#include "base/error.h"
#include "base/json.h"
#include "base/text.h"
#include "reward/verifiers.h"

namespace perigee::reward {
namespace {

constexpr size_t kMaxDetailBytes = 200;
constexpr double kMaxWeight = 1e6;
constexpr std::string_view kOutcome = "outcome";

// What ended the sample before it was finished, so that no verifier can judge it.
bool finished(FinishReason finish) {
  return finish == FinishReason::kStop || finish == FinishReason::kLength;
}

// One line of well-formed text, whatever the policy wrote. Quotes and backslashes stay as they are: what verifiers quote they have
// quoted already.
std::string shown(std::string_view detail) {
  std::string out;
  for (size_t i = 0, n = 0; i < detail.size(); i += n) {
    if (i >= kMaxDetailBytes) return out + "...";
    const auto c = static_cast<unsigned char>(detail[i]);
    n = utf8_sequence_bytes(detail.substr(i));
    if (n == 0 || c < 0x20 || c == 0x7f) {
      n = 1;
      out += fmt::format("\\x{:02x}", c);
    } else {
      out += detail.substr(i, n);
    }
  }
  return out;
}

}  // namespace

Rubric Rubric::parse(const nlohmann::json& list, std::string_view where) {
  if (!list.is_array() || list.empty())
    throw_input("{}: a list of verifiers is expected, such as [{{\"verifier\": \"exact\"}}], not {}", where,
                json_brief(list));
  Rubric rubric;
  for (size_t i = 0; i < list.size(); ++i) {
    JsonReader entry(list[i], where, fmt::format("[{}]", i));
    const std::string kind = entry.string("verifier");
    const double weight = entry.number("weight", -kMaxWeight, kMaxWeight, 1);
    const std::string name = entry.string("name", kind);
    const int64_t limit_ms = entry.integer("time_limit_ms", 1, 3'600'000, kDefaultTimeLimit.count());
    auto verifier = make_verifier(kind, entry);
    entry.finish();
    if (name == kOutcome) entry.fail("name", "\"outcome\" is the name of the reward of how an episode ended");
    for (const auto& other : rubric.components_)
      if (other.name == name)
        entry.fail("name", fmt::format("{} stands twice; give one of them another \"name\"", quote(name)));
    rubric.add(name, weight, std::move(verifier), std::chrono::milliseconds(limit_ms));
  }
  if (rubric.needs_group() && rubric.judge() < 0)
    throw_input("{}: length_k15 needs a verifier beside it that says which answers are right, such as exact",
                where);
  return rubric;
}

void Rubric::add(std::string name, double weight, std::unique_ptr<Verifier> verifier,
                 std::chrono::milliseconds time_limit) {
  PERIGEE_CHECK(verifier != nullptr && std::isfinite(weight), "{} weight {}", name, weight);
  components_.push_back({std::move(name), weight, std::move(verifier), time_limit});
}

int Rubric::judge() const {
  for (size_t i = 0; i < components_.size(); ++i)
    if (components_[i].verifier->judges()) return static_cast<int>(i);
  return -1;
}

bool Rubric::needs_group() const {
  return std::any_of(components_.begin(), components_.end(),
                     [](const Component& c) { return c.verifier->needs_group(); });
}

RewardComponent Rubric::run(const Component& c, const RewardInput& input, const GroupContext* group) const {
  RewardComponent result{c.name, 0, c.weight, "ok", {}};
  const auto fail = [&](std::string_view status, const std::string& why) {
    result.value = 0;
    result.status = status;
    result.detail = shown(why);
  };
  try {
    if (!finished(input.finish)) {
      fail("failed", fmt::format("the sample ended as {}", finish_name(input.finish)));
    } else if (c.verifier->needs_group() && group == nullptr) {
      fail("failed", "it compares the samples of a group and got one sample alone");
    } else {
      Budget budget(c.time_limit);
      const Verdict verdict = c.verifier->verify(input, group, budget);
      if (!std::isfinite(verdict.value) || verdict.value < c.verifier->lowest() ||
          verdict.value > c.verifier->highest()) {
        fail("failed", fmt::format("the verifier returned {}, outside [{}, {}]", verdict.value,
                                   c.verifier->lowest(), c.verifier->highest()));
      } else {
        result.value = verdict.value;
        result.detail = shown(verdict.detail);
      }
    }
  } catch (const TimedOut&) {
    fail("timeout", fmt::format("no verdict within {} ms", c.time_limit.count()));
  } catch (const std::exception& e) {
    fail("failed", e.what());
  } catch (...) {
    fail("failed", "the verifier threw something that is not an exception");
  }
  return result;
}

void Rubric::add_up(Reward& reward) {
  reward.total = 0;
  reward.failed = false;
  for (const auto& c : reward.components) {
    reward.failed |= c.status != "ok";
    reward.total += c.weight * c.value;
  }
  if (reward.failed) reward.total = 0;
}

std::optional<Reward> Rubric::outcome(FinishReason finish) const {
  const auto it = outcomes_.find(finish);
  if (it == outcomes_.end()) return std::nullopt;
  Reward reward;
  reward.components.push_back({std::string(kOutcome), it->second, 1, "ok", std::string(finish_name(finish))});
  reward.total = it->second;
  return reward;
}

Reward Rubric::score(const RewardInput& input) const {
  if (auto known = outcome(input.finish)) return *known;
  Reward reward;
  for (const auto& c : components_) reward.components.push_back(run(c, input, nullptr));
  add_up(reward);
  return reward;
}

std::vector<Reward> Rubric::score_group(std::span<const RewardInput> inputs) const {
  std::vector<Reward> rewards(inputs.size());
  std::vector<bool> judged_by_outcome(inputs.size());
  GroupContext group;
  bool first = true;
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (auto known = outcome(inputs[i].finish)) {
      rewards[i] = std::move(*known);
      judged_by_outcome[i] = true;
      continue;
    }
    group.min_tokens = first ? inputs[i].response_tokens : std::min(group.min_tokens, inputs[i].response_tokens);
    first = false;
    group.max_tokens = std::max(group.max_tokens, inputs[i].response_tokens);
    rewards[i].components.resize(components_.size());
  }
  // What judges one sample alone first: the others compare by it.
  const int judge_index = judge();
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (judged_by_outcome[i]) continue;
    auto& results = rewards[i].components;
    for (size_t c = 0; c < components_.size(); ++c)
      if (!components_[c].verifier->needs_group()) results[c] = run(components_[c], inputs[i], nullptr);
    const bool judged = judge_index >= 0 && results[static_cast<size_t>(judge_index)].status == "ok";
    group.correct = judged && results[static_cast<size_t>(judge_index)].value >= 1;
    for (size_t c = 0; c < components_.size(); ++c)
      if (components_[c].verifier->needs_group())
        results[c] = run(components_[c], inputs[i], judged ? &group : nullptr);
    add_up(rewards[i]);
  }
  return rewards;
}

bool Rubric::correct(const Reward& reward) const {
  const int index = judge();
  if (index < 0 || reward.failed) return false;
  if (reward.components.size() == 1 && reward.components[0].name == kOutcome) return false;
  PERIGEE_CHECK(reward.components.size() == components_.size(), "{} of {} components",
                reward.components.size(), components_.size());
  return reward.components[static_cast<size_t>(index)].value >= 1;
}

}  // namespace perigee::reward
