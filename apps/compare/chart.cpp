#include "apps/compare/chart.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "apps/output/html.h"

namespace perigee::apps::compare {
namespace {

constexpr double kWidth = 360, kHeight = 230, kLeft = 50, kRight = 10, kTop = 10, kBottom = 38;
constexpr int kColors = 8;

// One axis: a range of values onto a range of units.
class Axis {
 public:
  Axis(double low, double high, bool logarithmic, double from, double to)
      : low_(low), high_(high), log_(logarithmic), from_(from), to_(to) {
    // Ranges of a rounding have no ticks in between.
    if (high_ - low_ > 1e-12 * std::max(std::fabs(low_), std::fabs(high_))) return;
    const double margin = low_ == 0 ? 1 : std::fabs(low_) / 2;
    high_ = low_ + margin;
    low_ = log_ ? low_ / 2 : low_ - margin;
  }
  double at(double v) const {
    const double share = log_ ? std::log(v / low_) / std::log(high_ / low_) : (v - low_) / (high_ - low_);
    return from_ + (to_ - from_) * share;
  }
  std::vector<double> ticks(bool binary) const {
    std::vector<double> out;
    if (log_) {
      const double base = binary ? 2 : 10;
      const double first = std::ceil(std::log(low_) / std::log(base) - 1e-9),
                   last = std::floor(std::log(high_) / std::log(base) + 1e-9);
      const double step = std::max(1.0, std::ceil((last - first) / 6));
      for (double e = first; e <= last; e += step) out.push_back(std::pow(base, e));
      if (out.size() < 2) out = {low_, high_};
      return out;
    }
    const double range = high_ - low_, power = std::pow(10, std::floor(std::log10(range / 3)));
    double step = power;
    for (const double s : {1.0, 2.0, 5.0})
      if (range / (s * power) >= 3) step = s * power;
    for (double t = std::ceil(low_ / step - 1e-9) * step; t <= high_ + step * 1e-9; t += step)
      out.push_back(std::fabs(t) < step / 2 ? 0 : t);
    return out;
  }

 private:
  double low_, high_;
  bool log_;
  double from_, to_;
};

bool drawable(const Chart& chart, const ChartPoint& p) {
  return std::isfinite(p.x) && std::isfinite(p.y) && std::isfinite(p.low) && std::isfinite(p.high) &&
         (!chart.x_log || p.x > 0) && (!chart.y_log || p.low > 0);
}

// Without zeros that say nothing: ticks are round.
std::string tick_text(double value) {
  std::string text = number_text(value);
  const size_t unit = std::min(text.find(' '), text.size());
  size_t end = unit;
  if (text.substr(0, unit).find('.') != std::string::npos && text.find('e') == std::string::npos) {
    while (text[end - 1] == '0') --end;
    if (text[end - 1] == '.') --end;
  }
  return text.substr(0, end) + text.substr(unit);
}

std::string line_path(const std::vector<ChartPoint>& points, const Axis& x, const Axis& y) {
  std::string path;
  for (size_t i = 0; i < points.size(); ++i)
    path += fmt::format("{}{:.1f} {:.1f}", i == 0 ? "M" : "L", x.at(points[i].x), y.at(points[i].y));
  return points.size() == 1 ? path + "h0" : path;
}

std::string band_path(const std::vector<ChartPoint>& points, const Axis& x, const Axis& y) {
  std::string path;
  for (size_t i = 0; i < points.size(); ++i)
    path += fmt::format("{}{:.1f} {:.1f}", i == 0 ? "M" : "L", x.at(points[i].x), y.at(points[i].high));
  for (size_t i = points.size(); i-- > 0;)
    path += fmt::format("L{:.1f} {:.1f}", x.at(points[i].x), y.at(points[i].low));
  return path + "Z";
}

}  // namespace

std::string tokens_text(int64_t tokens) {
  if (tokens >= 1048576 && tokens % 1048576 == 0) return fmt::format("{}M", tokens / 1048576);
  if (tokens >= 1024 && tokens % 1024 == 0) return fmt::format("{}k", tokens / 1024);
  return std::to_string(tokens);
}

std::string number_text(double value) {
  if (!std::isfinite(value)) return "-";
  const double size = std::fabs(value);
  if (size == 0) return "0";
  for (const auto& [unit, name] : {std::pair{1e12, " T"}, {1e9, " G"}, {1e6, " M"}, {1e4, " k"}}) {
    if (size < unit) continue;
    const double v = value / (unit == 1e4 ? 1e3 : unit);
    return fmt::format("{:.{}f}{}", v, std::fabs(v) >= 100 ? 0 : std::fabs(v) >= 10 ? 1 : 2, name);
  }
  if (size >= 1000 || value == std::round(value)) return fmt::format("{:.0f}", value);
  if (size < 1e-4) return fmt::format("{:.2e}", value);
  return fmt::format("{:.{}f}", value,
                     size >= 100   ? 1
                     : size >= 10  ? 2
                     : size >= 1   ? 3
                     : size >= 0.1 ? 4
                                   : 5);
}

std::string chart_svg(const Chart& chart) {
  double x0 = INFINITY, x1 = -INFINITY, y0 = INFINITY, y1 = -INFINITY;
  std::vector<std::vector<ChartPoint>> lines;
  for (const ChartLine& line : chart.lines) {
    auto& points = lines.emplace_back();
    for (const ChartPoint& p : line.points) {
      if (!drawable(chart, p)) continue;
      points.push_back(p);
      x0 = std::min(x0, p.x), x1 = std::max(x1, p.x);
      y0 = std::min(y0, p.low), y1 = std::max(y1, p.high);
    }
  }
  if (!(x0 <= x1)) return "";
  if (chart.percent) y0 = 0, y1 = 1;
  const Axis x(x0, x1, chart.x_log, kLeft, kWidth - kRight), y(y0, y1, chart.y_log, kHeight - kBottom, kTop);

  std::string out = fmt::format("<svg viewBox=\"0 0 {} {}\" role=\"img\" aria-label=\"{}\">", kWidth, kHeight,
                                escape_html(chart.title));
  for (const double t : y.ticks(false))
    out += fmt::format(
        "<line class=\"tick\" x1=\"{}\" x2=\"{}\" y1=\"{:.1f}\" y2=\"{:.1f}\"/><text x=\"{}\" y=\"{:.1f}\" "
        "text-anchor=\"end\">{}</text>",
        kLeft, kWidth - kRight, y.at(t), y.at(t), kLeft - 5, y.at(t) + 4,
        chart.percent ? fmt::format("{:.0f} %", 100 * t) : tick_text(t));
  for (const double t : x.ticks(chart.binary_x))
    out += fmt::format("<text x=\"{:.1f}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
                       std::clamp(x.at(t), kLeft, kWidth - 16.0), kHeight - kBottom + 15,
                       chart.binary_x ? tokens_text(std::llround(t)) : tick_text(t));
  out += fmt::format("<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{}</text>", kWidth - kRight, kHeight - 6,
                     escape_html(chart.x_label));
  for (size_t i = 0; i < lines.size(); ++i) {
    const bool wide =
        std::any_of(lines[i].begin(), lines[i].end(), [](const ChartPoint& p) { return p.low != p.high; });
    if (wide)
      out += fmt::format("<path class=\"band s{}\" d=\"{}\"/>", chart.lines[i].color % kColors,
                         band_path(lines[i], x, y));
  }
  for (size_t i = 0; i < lines.size(); ++i)
    if (!lines[i].empty())
      out += fmt::format("<path class=\"line s{}\" d=\"{}\"/>", chart.lines[i].color % kColors,
                         line_path(lines[i], x, y));
  return out + "</svg>";
}

std::string chart_key(const Chart& chart) {
  std::string out = "<p class=\"key\">";
  for (const ChartLine& line : chart.lines)
    out += fmt::format(
        "<span><svg class=\"mark\" viewBox=\"0 0 26 8\" aria-hidden=\"true\"><path class=\"line s{}\" d=\"M1 "
        "4L25 4\"/></svg>{}</span> ",
        line.color % kColors, escape_html(line.name));
  return out + "</p>";
}

}  // namespace perigee::apps::compare
