// What is to be compared: one comparison file (docs/compare.md), or several configurations of runs.
#pragma once
#include <nlohmann/json.hpp>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace perigee::apps::compare {

// A name, and keys of a run's configuration with their values: {"model.config.token_mixers": ["gdn"], "warmup.lr": 0.003}.
struct Setting {
  std::string name;
  nlohmann::json set = nlohmann::json::object();
};

// One point of an accuracy by length or level: held-out tasks of these settings, answered by a finished run.
struct EvaluationPoint {
  std::string name;
  double x = 0;  // where it stands in the chart
  nlohmann::json set = nlohmann::json::object();
  int64_t tasks = 100;
};

struct TaskAxis {
  Setting setting;
  std::vector<EvaluationPoint> evaluate;
};

struct ContextMeasure {
  std::vector<int64_t> lengths;  // tokens, ascending; empty: not measured
  int64_t steps = 9;             // of which the median is taken
  double memory_gib = 0;         // at most; 0: half of what is free
  nlohmann::json set =
      nlohmann::json::object();  // of every variant, for this measurement alone: a larger model
};

struct Tolerance {
  std::optional<double> parameters, operations;  // largest / smallest - 1; nullopt: only reported
  int64_t context = 1024;                        // tokens before the one whose operations are counted
};

struct Comparison {
  std::string name, about;
  std::string where;      // the file, for messages
  std::string directory;  // relative paths in settings count from here
  nlohmann::json base = nlohmann::json::object();
  bool train = true;
  std::vector<Setting> variants;
  std::vector<TaskAxis> tasks;  // at least one; one without a name where there is no such axis
  std::vector<int64_t> seeds;
  double reach = 0.9;  // the accuracy whose first step is reported
  Tolerance match;
  ContextMeasure context;
};

// ERRORS (input): one line with the file and the key.
Comparison load_comparison(const std::vector<std::string>& files);

// The base with a variant's settings, then a task's; `more` ("KEY=VALUE") last. ERRORS (input): a path into something that is no
// object or list.
nlohmann::json configuration(const Comparison& comparison, const Setting& variant, const Setting& task,
                             const std::vector<std::string>& more = {});

// Puts settings into a configuration. A key below model.config opens the file whose path stands there; relative paths count
// from `directory`.
void apply(nlohmann::json& config, const nlohmann::json& set, const std::string& directory,
           const std::string& where);

// Puts a value at a dotted key, through objects and lists, with objects made where they lack. where names it in messages.
void assign(nlohmann::json& config, const std::string& key, const nlohmann::json& value,
            const std::string& where);

}  // namespace perigee::apps::compare
