// What a run's curves are: the same names, order and numbers in `perigee watch`, exports and charts.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "storage/store.h"

namespace perigee::apps {

// One curve over the steps of a phase.
struct Series {
  std::string key;    // of the metric, or "accuracy" with ":NAME" of the held-out set after it when there are several
  std::string title;  // for people
  std::string phase;  // "warmup" | "rl"
  std::vector<int64_t> steps;   // ascending
  std::vector<double> values;   // as many; not necessarily finite
};

// Those that have a point, in this order: reward, held-out accuracy (its point 0 is the last of the warm-up), KL (where the run
// has a reference), mismatch, entropy, length, tokens/s, lag, loss, gradient norm, clipped share, groups without a difference, and
// of the warm-up loss and held-out accuracy.
std::vector<Series> run_series(StoreQueries& store, const std::string& run_id);

// The run measures its distance from a reference. Without one the KL is recorded as 0, and a curve of zeros would say that the
// policy stays where it was. config: of the RunRecord.
bool has_reference(const std::string& config);

// A number for people: 4 digits that count, percent for shares ("accuracy", "correct").
std::string metric_text(std::string_view key, double value);

// How far a run is, from its record and its policy versions.
struct RunProgress {
  RunRecord run;
  std::string phase;       // "starting", "warmup", "rl"
  int64_t step = 0;        // done in that phase
  int64_t steps = 0;       // of that phase in all; 0: not known
  uint32_t version = 0;    // of the weights
  int64_t started_us = 0, last_us = 0;  // the run's beginning, its newest version
  bool over() const { return run.state != "running"; }
};
RunProgress run_progress(StoreQueries& store, const std::string& run_id);

}  // namespace perigee::apps
