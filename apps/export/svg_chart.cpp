#include "apps/export/svg_chart.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "apps/output/html.h"

namespace perigee::apps {
namespace {

constexpr double kWidth = 640, kHeight = 200, kLeft = 64, kRight = 8, kTop = 8, kBottom = 22;

// A step of 1, 2 or 5 times a power of ten that cuts the range into three to six parts.
double nice_step(double range) {
  const double power = std::pow(10, std::floor(std::log10(range / 3)));
  for (const double step : {5.0, 2.0, 1.0})
    if (range / (step * power) >= 3) return step * power;
  return power;
}

std::string tick_text(double value, double step) {
  if (std::fabs(value) < step / 2) return "0";
  if (std::fabs(value) >= 1e6 || std::fabs(value) < 1e-3) return fmt::format("{:.1e}", value);
  const int digits = std::clamp(static_cast<int>(std::ceil(-std::log10(step) - 1e-9)), 0, 6);
  return fmt::format("{:.{}f}", value, digits);
}

}  // namespace

std::vector<size_t> chart_points(const Series& series) {
  const size_t n = series.values.size();
  std::vector<size_t> out;
  if (n <= kChartPoints) {
    for (size_t i = 0; i < n; ++i) out.push_back(i);
    return out;
  }
  const size_t stretches = kChartPoints / 2;
  for (size_t b = 0; b < stretches; ++b) {
    const size_t begin = n * b / stretches, end = n * (b + 1) / stretches;
    size_t least = begin, most = begin;
    for (size_t i = begin; i < end; ++i) {
      const double x = series.values[i];
      // A gap is seen as a gap where all of a stretch is one.
      if (!std::isfinite(x)) continue;
      if (!std::isfinite(series.values[least]) || x < series.values[least]) least = i;
      if (!std::isfinite(series.values[most]) || x > series.values[most]) most = i;
    }
    out.push_back(std::min(least, most));
    if (least != most) out.push_back(std::max(least, most));
  }
  return out;
}

std::string svg_chart(const Series& s) {
  double low = INFINITY, high = -INFINITY;
  for (const double v : s.values)
    if (std::isfinite(v)) low = std::min(low, v), high = std::max(high, v);
  if (!(low <= high)) low = 0, high = 1;
  if (high - low <= 1e-12 * std::max(std::fabs(low), std::fabs(high)) || high == low) {
    const double margin = low == 0 ? 1 : std::fabs(low) / 2;
    low -= margin;
    high += margin;
  }
  const double first = s.steps.empty() ? 0 : static_cast<double>(s.steps.front());
  const double last = s.steps.empty() ? 0 : static_cast<double>(s.steps.back());
  const auto x_of = [&](double step) {
    return kLeft + (kWidth - kLeft - kRight) * (last > first ? (step - first) / (last - first) : 0.5);
  };
  const auto y_of = [&](double value) { return kTop + (kHeight - kTop - kBottom) * (high - value) / (high - low); };

  std::string out = fmt::format(
      "<svg viewBox=\"0 0 {} {}\" role=\"img\" aria-label=\"{} by step\" data-x0=\"{}\" data-x1=\"{}\">", kWidth, kHeight,
      escape_html(s.title), kLeft, kWidth - kRight);
  const double step = nice_step(high - low);
  for (double tick = std::ceil(low / step) * step; tick <= high + step * 1e-9; tick += step)
    out += fmt::format(
        "<line class=\"tick\" x1=\"{}\" x2=\"{}\" y1=\"{:.2f}\" y2=\"{:.2f}\"/><text x=\"{}\" y=\"{:.2f}\" "
        "text-anchor=\"end\">{}</text>",
        kLeft, kWidth - kRight, y_of(tick), y_of(tick), kLeft - 6, y_of(tick) + 4, tick_text(tick, step));
  out += fmt::format("<text x=\"{}\" y=\"{}\">{}</text>", kLeft, kHeight - 6, s.steps.empty() ? 0 : s.steps.front());
  if (last > first)
    out += fmt::format("<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{}</text>", kWidth - kRight, kHeight - 6,
                       s.steps.back());

  std::string path;
  bool down = false;
  const std::vector<size_t> points = chart_points(s);
  for (size_t k = 0; k < points.size(); ++k) {
    const size_t i = points[k];
    if (!std::isfinite(s.values[i])) {
      down = false;
      continue;
    }
    const double x = x_of(static_cast<double>(s.steps[i])), y = y_of(s.values[i]);
    path += fmt::format("{}{:.2f} {:.2f}", down ? "L" : "M", x, y);
    const bool alone = !down && (k + 1 == points.size() || !std::isfinite(s.values[points[k + 1]]));
    if (alone) path += "h0";  // a dot, with round caps
    down = true;
  }
  if (!path.empty()) out += "<path class=\"line\" d=\"" + path + "\"/>";
  return out + "</svg>";
}

}  // namespace perigee::apps
