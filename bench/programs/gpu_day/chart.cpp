#include "chart.h"

#include <algorithm>
#include <cmath>

#include "../../report/statistics.h"
#include "../../report/svg.h"

namespace gpu_day {
namespace {

namespace svg = bench::svg;

// Pixels. A row holds its bars, ours above the fastest peer's, and a gap.
constexpr double kLeft = 440, kPlotWidth = 480, kRight = 300, kTop = 118, kBottom = 52, kBar = 12,
                 kRow = 2 * kBar + 14;
constexpr double kShownAtMost = 1.25;

double x_of(double share) {
  return kLeft + kPlotWidth * std::clamp(share, 0.0, kShownAtMost) / kShownAtMost;
}

std::string percent(double share) { return std::to_string(std::lround(100 * share)) + "%"; }

std::string row(const Bar& bar, double top) {
  std::string out = svg::text(kLeft - 10, top + kBar + 4, bar.name, "end");
  out += svg::box(kLeft, top, x_of(bar.share) - kLeft, kBar, svg::bar_style(true, 1));
  out += svg::text(kLeft + kPlotWidth + 8, top + kBar - 2,
                   percent(bar.share) + ", " + bench::format_seconds(bar.seconds), "small");
  if (bar.peer.empty()) return out;
  out += svg::box(kLeft, top + kBar + 2, x_of(bar.peer_share) - kLeft, kBar,
                  svg::bar_style(bar.peer_share <= bar.share, 0));
  return out + svg::text(kLeft + kPlotWidth + 8, top + 2 * kBar,
                         percent(bar.peer_share) + ", " + bar.peer, "small grey");
}

}  // namespace

std::string to_svg(const std::string& machine, const std::vector<Bar>& bars) {
  const double bottom = kTop + kRow * static_cast<double>(bars.size());
  std::string out = svg::begin(kLeft + kPlotWidth + kRight, bottom + kBottom,
                               "eigenformer on a GPU: percent of this machine's limit", machine);
  out += svg::box(16, 68, 22, 12, svg::bar_style(true, 1)) + svg::text(44, 78, "eigenformer") +
         svg::box(146, 68, 22, 12, svg::bar_style(true, 0)) + svg::text(174, 78, "a slower peer") +
         svg::box(296, 68, 22, 12, svg::bar_style(false, 0)) + svg::text(324, 78, "a faster one");
  for (int mark = 0; mark <= 125; mark += 25)
    out += svg::grid_line(x_of(mark / 100.0), kTop - 6, bottom, mark == 100) +
           svg::text(x_of(mark / 100.0), bottom + 18, std::to_string(mark) + "%", "middle");
  for (std::size_t i = 0; i < bars.size(); ++i)
    out += row(bars[i], kTop + kRow * static_cast<double>(i));
  return out +
         svg::text(kLeft + kPlotWidth / 2, bottom + 40,
                   "floor / time: bytes at the bandwidth of copies or operations at the peak, both "
                   "measured in the same run",
                   "middle grey") +
         svg::end();
}

}  // namespace gpu_day
