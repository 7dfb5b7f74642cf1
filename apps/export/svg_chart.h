// A curve as an SVG element for a page without scripts: drawn here, by attributes alone, so that a strict content security
// policy has nothing to refuse.
#pragma once
#include <string>

#include "apps/runs/run_metrics.h"

namespace perigee::apps {

// At most this many points are drawn; of more, the least and the greatest of each stretch, so that no spike is lost.
inline constexpr size_t kChartPoints = 1200;

// <svg ...>...</svg>, 640 by 200 units, colours by the classes "axis", "tick" and "line". Numbers that are not finite leave gaps.
std::string svg_chart(const Series& series);

// The points that are drawn: indices into the series, ascending.
std::vector<size_t> chart_points(const Series& series);

}  // namespace perigee::apps
