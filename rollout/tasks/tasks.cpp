#include "rollout/tasks/tasks.h"

#include <array>
#include <cmath>
#include <optional>
#include <set>

#include "base/error.h"
#include "base/hash.h"
#include "base/json.h"
#include "base/text.h"
#include "rollout/tasks/detail.h"
#include "rollout/tasks/long_context.h"

namespace perigee::rollout {
namespace {

constexpr uint64_t kHeldOutShare = 8;
// A side is met within this many draws unless the level has next to no problems on it.
constexpr int kMaxDraws = 4096;

using MakeGenerator = std::unique_ptr<Generator> (*)(JsonReader&, const WorkedStyle&);
using MakeLong = std::unique_ptr<Generator> (*)(JsonReader&, const PromptTokens&);
struct Kind {
  std::string_view name;
  MakeGenerator make_short = nullptr;
  MakeLong make_long = nullptr;
  bool answers_alone = false;  // its worked examples think of nothing
  std::unique_ptr<Generator> make(JsonReader& options, const WorkedStyle& style, const PromptTokens& tokens) const {
    return make_long != nullptr ? make_long(options, tokens) : make_short(options, style);
  }
};
constexpr std::array<Kind, 15> kGenerators{{{"arithmetic", make_arithmetic},
                                           {"countdown", make_countdown_tasks},
                                           {"sort", make_sort},
                                           {"calculate", make_calculate},
                                           {"sql", make_sql_tasks},
                                           {"document", make_document},
                                           {"code", make_code_tasks},
                                           {"palindrome", make_palindrome, nullptr, true},
                                           {"mqar", make_mqar, nullptr, true},
                                           {"stack", make_stack, nullptr, true},
                                           {"needle", nullptr, make_needle, true},
                                           {"variable_tracking", nullptr, make_variable_tracking, true},
                                           {"common_words", nullptr, make_common_words, true},
                                           {"frequent_words", nullptr, make_frequent_words, true},
                                           {"mrcr", nullptr, make_mrcr, true}}};

enum class Side : uint64_t { kTrain = 1, kHeldOut = 2 };

class Generated : public TaskSource {
 public:
  Generated(const Kind& kind, const nlohmann::json& config, JsonReader& reader, std::string_view where, uint64_t seed,
            const PromptTokens& tokens)
      : tokens_(tokens) {
    seed_ = seed;
    for (const char* key : {"think_open", "think_close"})
      if (kind.answers_alone && reader.has(key))
        reader.fail(key, fmt::format("the worked examples of {} are answers alone", kind.name));
    const WorkedStyle style{reader.string("think_open", "<think>"), reader.string("think_close", "</think>")};
    read_curriculum(reader);
    const nlohmann::json* levels = reader.find("levels");
    if (const auto by_length = read_lengths(reader)) {
      if (levels != nullptr) reader.fail("lengths", "either lengths or levels are expected, not both");
      if (reader.find("length") != nullptr) reader.fail("length", "either length or lengths are expected, not both");
      weights_.clear();
      names_.clear();
      for (const auto& level : *by_length) add_level(kind, config, level, level.at("name").get<std::string>(), where, style);
    } else if (levels == nullptr) {
      names_ = {std::string(kind.name)};
      generators_.push_back(kind.make(reader, style, tokens_));
      reader.finish();
    } else {
      if (!levels->is_array() || levels->empty() || levels->size() > kMaxLevels)
        reader.fail("levels", fmt::format("a list of 1 to {} objects is expected", kMaxLevels));
      weights_.clear();
      names_.clear();
      for (size_t i = 0; i < levels->size(); ++i) add_level(kind, config, (*levels)[i], fmt::format("levels[{}]", i), where, style);
      double sum = 0;
      for (const double w : weights_) sum += w;
      if (!(sum > 0)) reader.fail("levels", "at least one level needs a weight above 0");
    }
    // Both sides of every level have problems, or the run would find out late.
    for (uint64_t level = 0; level < this->levels(); ++level) {
      draw_problem(level, Side::kTrain);
      draw_problem(level, Side::kHeldOut);
    }
  }

  Task train(uint64_t index) const override { return draw(index, Side::kTrain); }
  Task held_out(uint64_t index) const override { return draw(index, Side::kHeldOut); }

 private:
  static constexpr size_t kMaxLevels = 100;

  void read_curriculum(JsonReader& reader) {
    const nlohmann::json* curriculum = reader.find("curriculum");
    if (curriculum == nullptr || curriculum->is_null()) return;
    JsonReader options(*curriculum, reader.where(), reader.path("curriculum"));
    floor_ = options.number("floor", 0, 1, floor_);
    options.finish();
    curriculum_ = true;
  }

  // lengths and held_out_lengths as levels.
  static std::optional<std::vector<nlohmann::json>> read_lengths(JsonReader& reader) {
    const nlohmann::json* lists[2] = {reader.find("lengths"), reader.find("held_out_lengths")};
    if (lists[0] == nullptr && lists[1] == nullptr) return std::nullopt;
    if (lists[0] == nullptr) reader.fail("held_out_lengths", "they go with lengths, those that are trained on");
    std::vector<nlohmann::json> levels;
    std::set<int64_t> seen;
    for (const int i : {0, 1}) {
      if (lists[i] == nullptr) continue;
      const char* key = i == 0 ? "lengths" : "held_out_lengths";
      if (!lists[i]->is_array() || lists[i]->empty() || lists[i]->size() > kMaxLevels)
        reader.fail(key, fmt::format("a list of 1 to {} lengths is expected", kMaxLevels));
      for (const auto& item : *lists[i]) {
        if (!item.is_number_integer()) reader.fail(key, "whole numbers are expected");
        const auto length = item.get<int64_t>();
        if (!seen.insert(length).second) reader.fail(key, fmt::format("{} stands there twice", length));
        levels.push_back({{"name", fmt::format("length {}", length)}, {"length", length}, {"weight", i == 0 ? 1 : 0}});
      }
    }
    return levels;
  }

  void add_level(const Kind& kind, const nlohmann::json& config, const nlohmann::json& level, const std::string& prefix,
                 std::string_view where, const WorkedStyle& style) {
    JsonReader own(level, where, prefix);
    weights_.push_back(own.number("weight", 0, 1e6, 1));
    names_.push_back(own.string("name", fmt::format("{} {}", kind.name, names_.size() + 1)));
    nlohmann::json merged = config;
    for (const char* key : {"kind", "levels", "lengths", "held_out_lengths", "curriculum", "think_open", "think_close"}) merged.erase(key);
    for (const auto& [key, value] : level.items())
      if (key != "weight" && key != "name") merged[key] = value;
    JsonReader options(merged, where, prefix);
    generators_.push_back(kind.make(options, style, tokens_));
    options.finish();
  }

  Task draw(uint64_t index, Side side) const {
    Problem problem = draw_problem(index, side);
    Task task = problem.finish ? problem.finish() : std::move(problem.task);
    task.index = index;
    task.difficulty = names_[level_of(index)];
    return task;
  }

  Problem draw_problem(uint64_t index, Side side) const {
    const uint64_t level = level_of(index);
    Random random(derive_seed(seed_, index, static_cast<uint64_t>(side)));
    for (int i = 0; i < kMaxDraws; ++i) {
      Problem problem = generators_[level]->draw(random);
      if (is_held_out(problem.canonical) == (side == Side::kHeldOut)) return problem;
    }
    throw_input(
        "tasks: level {} has too few different problems to keep some out of training; widen its options",
        quote(names_[level]));
  }

  const PromptTokens tokens_;
  std::vector<std::unique_ptr<Generator>> generators_;  // by level
};

}  // namespace

uint64_t TaskSource::train_index(uint64_t ordinal, std::span<const double> weights) const {
  PERIGEE_CHECK(weights.size() == levels(), "{} weights for {} levels", weights.size(), levels());
  double sum = 0;
  for (const double w : weights) {
    PERIGEE_CHECK(w >= 0 && std::isfinite(w), "weight {}", w);
    sum += w;
  }
  PERIGEE_CHECK(sum > 0, "weights sum to {}", sum);
  const double point = uniform_float(philox(derive_seed(seed_, 0x6c6576656cull), ordinal)[0]) * sum;
  uint64_t level = 0, chosen = 0;
  double below = 0;
  for (; level < levels(); ++level) {
    if (weights[level] == 0) continue;
    chosen = level;  // rounding may put the point at the very end: the last level with a weight takes it
    below += weights[level];
    if (point < below) break;
  }
  return ordinal * levels() + chosen;
}

std::vector<double> curriculum_weights(std::span<const double> base, std::span<const LevelRecord> records,
                                       double floor) {
  PERIGEE_CHECK(base.size() == records.size(), "{} weights, {} records", base.size(), records.size());
  PERIGEE_CHECK(floor >= 0 && floor <= 1, "floor {}", floor);
  std::vector<double> weights(base.size());
  for (size_t i = 0; i < base.size(); ++i) {
    const double p = (records[i].successes + 1) / (records[i].attempts + 2);
    weights[i] = base[i] * (floor + (1 - floor) * 4 * p * (1 - p));
  }
  return weights;
}

bool is_held_out(std::string_view canonical_problem) {
  return hash128(canonical_problem).low % kHeldOutShare == 0;
}

std::unique_ptr<TaskSource> make_task_source(const nlohmann::json& config, std::string_view where, uint64_t seed,
                                             const PromptTokens& tokens) {
  JsonReader reader(config, where);
  const std::string name = reader.string("kind");
  if (name == "jsonl") {
    auto source = make_jsonl(reader, seed);
    reader.finish();
    return source;
  }
  std::vector<std::string> names = {"jsonl"};
  for (const auto& kind : kGenerators) {
    if (kind.name == name) return std::make_unique<Generated>(kind, config, reader, where, seed, tokens);
    names.emplace_back(kind.name);
  }
  reader.fail("kind", fmt::format("one of {} is expected, not {}{}", join(names), quote(name),
                                  did_you_mean(name, names)));
}

}  // namespace perigee::rollout
