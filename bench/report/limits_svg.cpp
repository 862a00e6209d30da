// The bar chart of limits: for each row the percentage of this machine's limit, one bar for each
// number of threads.
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "results.h"
#include "svg.h"

namespace bench {
namespace {

// Pixels. One line of text is 16 high; a row holds its bars and a gap.
constexpr double kLabelPerCharacter = 6.4, kPlotWidth = 560, kBar = 14, kBarGap = 2, kRowGap = 12,
                 kTop = 118, kBottom = 52, kRight = 76;
constexpr double kShownAtMost = 150;  // percent; what lies beyond sits on the edge, with its number

double percent(const RowResult& row) { return 100 * row.floor / ours(row)->timing.median; }

class Chart {
 public:
  explicit Chart(const Results& results) : results_(results) {
    std::size_t longest = 12;
    double largest = 100;
    for (const RowResult& row : results.rows) {
      if (!(row.floor > 0) || ours(row) == nullptr) continue;
      if (names_.empty() || names_.back() != row.name) names_.push_back(row.name);
      longest = std::max(longest, row.name.size());
      largest = std::max(largest, percent(row));
    }
    left_ = 24 + kLabelPerCharacter * static_cast<double>(longest);
    scale_end_ = std::min(kShownAtMost, 25 * std::ceil(largest / 25));
    row_height_ = static_cast<double>(results.limits.size()) * (kBar + kBarGap) + kRowGap;
    plot_height_ = row_height_ * static_cast<double>(names_.size());
  }

  std::string draw() const {
    std::string out =
        svg::begin(left_ + kPlotWidth + kRight, kTop + plot_height_ + kBottom,
                   "eigenformer: percent of this machine's limit", machine_line(results_.machine)) +
        legend() + axis();
    for (std::size_t i = 0; i < names_.size(); ++i) out += row(i);
    return out + svg::end();
  }

 private:
  double x_of(double value) const {
    return left_ + kPlotWidth * std::clamp(value, 0.0, scale_end_) / scale_end_;
  }
  double right_edge() const { return left_ + kPlotWidth + kRight - 16; }

  std::string legend() const {
    std::string out;
    for (std::size_t lane = 0; lane < results_.limits.size(); ++lane) {
      const double x = 16 + 110 * static_cast<double>(lane);
      out += svg::box(x, 68, 22, 12, svg::bar_style(true, lane)) +
             svg::text(x + 28, 78, thread_count(results_.limits[lane].threads));
    }
    return out;
  }

  std::string axis() const {
    const double bottom = kTop + plot_height_;
    std::string out;
    for (int mark = 0; mark <= scale_end_; mark += 25)
      out += svg::grid_line(x_of(mark), kTop - 6, bottom, mark == 100) +
             svg::text(x_of(mark), bottom + 18, std::to_string(mark) + "%", "middle");
    return out + svg::text(left_ + kPlotWidth / 2, bottom + 40,
                           "floor / time: the floor is the row's bytes at the measured bandwidth "
                           "or its operations at the measured peak",
                           "middle grey");
  }

  std::string row(std::size_t index) const {
    const double top = kTop + row_height_ * static_cast<double>(index);
    std::string out =
        svg::text(left_ - 10, top + (row_height_ - kRowGap) / 2 + 4, names_[index], "end");
    for (const RowResult& result : results_.rows) {
      if (result.name != names_[index] || !(result.floor > 0) || ours(result) == nullptr) continue;
      const std::size_t lane = lane_of(results_, result);
      const double y = top + static_cast<double>(lane) * (kBar + kBarGap), value = percent(result);
      out += svg::box(left_, y, x_of(value) - left_, kBar, svg::bar_style(true, lane)) +
             svg::text(right_edge(), y + kBar - 3, format("%.0f%%", value), "end small");
    }
    return out;
  }

  const Results& results_;
  std::vector<std::string> names_;
  double left_ = 0, scale_end_ = 100, row_height_ = 0, plot_height_ = 0;
};

}  // namespace

std::string to_limits_svg(const Results& results) { return Chart(results).draw(); }

}  // namespace bench
