// Charts of several curves for a page without scripts: shapes with attributes and classes alone, so that a strict content
// security policy has nothing to refuse. 360 units wide, so that their text can be read on a telephone.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace perigee::apps::compare {

struct ChartPoint {
  double x = 0, y = 0;
  double low = 0, high = 0;  // the band; equal to y: none
};

struct ChartLine {
  std::string name;
  int color = 0;  // the class "s0" to "s7", and a dash pattern of its own
  std::vector<ChartPoint>
      points;  // by x; those that are not finite (or not above 0 on a logarithmic axis) are left out
};

struct Chart {
  std::string title;  // for those who do not see it
  std::string x_label, y_label;
  bool x_log = false, y_log = false;
  bool percent = false;   // y is a share: the axis goes from 0 to 100 %
  bool binary_x = false;  // ticks at powers of two, written 4k, 1M
  std::vector<ChartLine> lines;
};

// <svg ...>...</svg>; "" when there is nothing to draw.
std::string chart_svg(const Chart& chart);
// The names of its lines with their colours, as HTML.
std::string chart_key(const Chart& chart);

// "4k", "1M", "300": a number of tokens.
std::string tokens_text(int64_t tokens);
// Four digits that count, for people: "0.01234", "12.3 k", "4.5 M".
std::string number_text(double value);

}  // namespace perigee::apps::compare
