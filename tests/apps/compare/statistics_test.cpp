// Medians, bands and steps to a level, against values worked out by hand.
#include "apps/compare/statistics.h"

#include <gtest/gtest.h>

#include <cmath>

#include "apps/compare/chart.h"

namespace perigee::apps::compare {
namespace {

TEST(CompareStatistics, MedianOfOddAndEvenAndInfinite) {
  EXPECT_EQ(median({3}), 3);
  EXPECT_EQ(median({9, 1, 5}), 5);
  EXPECT_EQ(median({4, 1, 3, 10}), 3.5);
  EXPECT_EQ(median({INFINITY, 2, 7}), 7);
  EXPECT_EQ(median({INFINITY, 2}), INFINITY) << "half of the runs never got there";
}

TEST(CompareStatistics, Spread) {
  EXPECT_FALSE(spread_of({}));
  const Spread s = *spread_of({0.5, 0.25, 1.0, 0.75});
  EXPECT_EQ(s.n, 4);
  EXPECT_EQ(s.median, 0.625);
  EXPECT_EQ(s.mean, 0.625);
  EXPECT_EQ(s.min, 0.25);
  EXPECT_EQ(s.max, 1.0);
}

// Two seeds: one was right about everything at step 20 and ended, the other went on.
TEST(CompareStatistics, BandGoesOnWithWhatACompleteRunEndedWith) {
  const std::vector<Curve> curves = {{{0, 10, 20}, {0, 0.5, 1.0}, true},
                                     {{0, 10, 20, 30}, {0.2, 0.3, 0.4, 0.6}, true}};
  const std::vector<BandPoint> band = band_of(curves);
  ASSERT_EQ(band.size(), 4u);
  EXPECT_EQ(band[0].median, 0.1);
  EXPECT_EQ(band[1].median, 0.4);
  EXPECT_EQ(band[1].min, 0.3);
  EXPECT_EQ(band[1].max, 0.5);
  EXPECT_EQ(band[3].x, 30);
  EXPECT_EQ(band[3].n, 2);
  EXPECT_EQ(band[3].median, 0.8);
  EXPECT_EQ(band[3].max, 1.0);
}

TEST(CompareStatistics, BandLeavesOutWhatIsNotThereYet) {
  const std::vector<Curve> curves = {
      {{0, 10}, {0.1, 0.2}, false}, {{0, 10, 20}, {0.3, 0.4, 0.5}, true}, {{20}, {0.9}, true}};
  const std::vector<BandPoint> band = band_of(curves);
  ASSERT_EQ(band.size(), 3u);
  EXPECT_EQ(band[0].n, 2) << "the third begins at 20";
  EXPECT_EQ(band[2].n, 2) << "the first is not complete and ends at 10";
  EXPECT_EQ(band[2].min, 0.5);
  EXPECT_EQ(band[2].max, 0.9);
}

TEST(CompareStatistics, StepsToALevel) {
  const Curve fast{{10, 20, 30}, {0.2, 0.9, 0.8}, true}, slow{{10, 20, 30}, {0.1, 0.5, 0.95}, true},
      never{{10, 20}, {0.1, 0.2}, true};
  EXPECT_EQ(reached(fast, 0.9), 20) << "the first step counts, whatever comes after";
  EXPECT_FALSE(reached(never, 0.9));
  const Reached all = reached(std::vector<Curve>{fast, slow, never}, 0.9);
  EXPECT_EQ(all.n, 2);
  EXPECT_EQ(all.of, 3);
  EXPECT_EQ(all.median, 30);
  EXPECT_EQ(all.first, 20);
  EXPECT_EQ(all.last, 30);
  const Reached half = reached(std::vector<Curve>{fast, never}, 0.9);
  EXPECT_FALSE(half.median) << "one of two";
  EXPECT_EQ(reached(std::vector<Curve>{}, 0.9).of, 0);
}

TEST(CompareChart, LeavesOutWhatCannotBeDrawnAndEscapes) {
  Chart chart;
  chart.title = "<b>\"'&";
  chart.x_log = chart.y_log = chart.binary_x = true;
  chart.lines.push_back(
      {"</svg><script>", 0, {{4096, 1, 0.5, 2}, {8192, NAN, NAN, NAN}, {0, 1, 1, 1}, {16384, 4, 4, 4}}});
  const std::string svg = chart_svg(chart), key = chart_key(chart);
  EXPECT_EQ(svg.find("nan"), std::string::npos) << svg;
  EXPECT_EQ(svg.find("inf"), std::string::npos) << svg;
  EXPECT_EQ((svg + key).find("<b>"), std::string::npos);
  EXPECT_EQ((svg + key).find("<script>"), std::string::npos);
  EXPECT_NE(svg.find(">4k<"), std::string::npos) << svg;
  EXPECT_NE(svg.find("class=\"band s0\""), std::string::npos);
  EXPECT_NE(svg.find(">0.5<"), std::string::npos) << "not 0.5000: " << svg;
  // Two points: one line from the left edge to the right one.
  EXPECT_NE(svg.find("class=\"line s0\" d=\"M50.0 "), std::string::npos) << svg;
  EXPECT_NE(svg.find("L350.0 "), std::string::npos) << svg;
  EXPECT_EQ(chart_svg({}), "");
}

TEST(CompareChart, OnePointAndEqualValuesAreDrawn) {
  Chart chart;
  chart.lines.push_back({"one", 0, {{5, 2, 2, 2}}});
  EXPECT_NE(chart_svg(chart).find("h0"), std::string::npos);
  chart.y_log = chart.x_log = true;
  EXPECT_EQ(chart_svg(chart).find("nan"), std::string::npos);
}

// An axis from a number to the next one that there is has no room for steps.
TEST(CompareChart, ValuesThatDifferInTheLastBitAreDrawn) {
  Chart chart;
  const double next = std::nextafter(0.3, 1);
  chart.lines.push_back({"one", 0, {{5, 0.3, 0.3, 0.3}, {6, next, next, next}}});
  EXPECT_LT(chart_svg(chart).size(), 4000u);
}

TEST(CompareChart, NumbersForPeople) {
  EXPECT_EQ(tokens_text(4096), "4k");
  EXPECT_EQ(tokens_text(1048576), "1M");
  EXPECT_EQ(tokens_text(1000), "1000");
  EXPECT_EQ(number_text(0), "0");
  EXPECT_EQ(number_text(0.0123), "0.01230");
  EXPECT_EQ(number_text(12345678), "12.3 M");
  EXPECT_EQ(number_text(123456), "123 k");
  EXPECT_EQ(number_text(NAN), "-");
}

}  // namespace
}  // namespace perigee::apps::compare
