// What the repetitions of a run with other seeds have in common.
#pragma once
#include <cstdint>
#include <optional>
#include <vector>

namespace perigee::apps::compare {

// The middle one; of an even number the mean of the two in the middle. REQUIRES at least one; an infinite one counts as the
// greatest.
double median(std::vector<double> values);

struct Spread {
  int64_t n = 0;
  double median = 0, mean = 0, min = 0, max = 0;
};
std::optional<Spread> spread_of(const std::vector<double>& values);  // nullopt: no values

// A quantity over steps, ascending.
struct Curve {
  std::vector<double> x, y;  // as many
  bool complete = true;      // the run is over: what it ended with holds for every later step
};

struct BandPoint {
  double x = 0, median = 0, min = 0, max = 0;
  int64_t n = 0;  // runs that have a value here
};

// At every x that some curve has: the values of all curves that reach it. A complete curve that ended before counts with its
// last value (a run that ends early because it is right about everything stays right); one that is not complete does not.
// Between its own points a curve counts with the last one before.
std::vector<BandPoint> band_of(const std::vector<Curve>& curves);

// The first x at which the curve is at least `level`; nullopt: never.
std::optional<double> reached(const Curve& curve, double level);

// Of repetitions: how many reached the level, and the median of their x, where a run that did not counts as later than all
// others; nullopt when that makes the median infinite.
struct Reached {
  int64_t n = 0, of = 0;
  std::optional<double> median;
  std::optional<double> first, last;  // of those that did
};
Reached reached(const std::vector<Curve>& curves, double level);

}  // namespace perigee::apps::compare
