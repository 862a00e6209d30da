// The bar chart of peers: for each case the time of a peer over ours, a panel for each peer. One
// line is a case, on it one bar for each number of threads; bars to the right of 1 are cases where
// we are faster. The axis is logarithmic, so that twice as fast and half as fast are equally long.
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "results.h"
#include "svg.h"

namespace bench {
namespace {

// Pixels.
constexpr double kLabelPerCharacter = 6.2, kBar = 10, kLineGap = 5, kHeading = 24, kTop = 132,
                 kBottom = 34, kPanel = 124, kPanelGap = 40;  // the gap holds a bar's number
constexpr double kSmallest = 0.25, kLargest = 8;  // what lies beyond ends here, with its number

struct Panel {
  std::string peer;  // as peer() takes it
  std::string title;
};

double ratio(const RowResult& row, const CallResult& theirs) {
  return theirs.timing.median / ours(row)->timing.median;
}

std::string format_ratio(double value) {
  return format(value < 0.095   ? "%.1g"
                : value < 9.995 ? "%.2f"
                : value < 99.95 ? "%.1f"
                                : "%.0f",
                value);
}

/// "linear 1 x 4096 float" of operator linear needs no first word under its heading.
std::string label_of(const RowResult& row) {
  const std::string prefix = row.operator_name + " ";
  return row.name.rfind(prefix, 0) == 0 ? row.name.substr(prefix.size()) : row.name;
}

/// "oneDNN 3.14.0" for oneDNN. The peers without a column of their own go by their name where it
/// is one, and are "others" where they are several.
std::string title_of(const Results& results, const std::string& name) {
  if (name == "Eigen") return "Eigen " + results.machine.eigen;
  if (!name.empty()) {
    for (const std::string& full : results.machine.peers)
      if (full.rfind(name, 0) == 0) return full.substr(0, full.find(" ("));
    return name;
  }
  std::string only;
  for (const RowResult& row : results.rows)
    if (const CallResult* other = peer(row, name)) {
      if (!only.empty() && only != other->name) return "others";
      only = other->name;
    }
  return only;
}

class Chart {
 public:
  explicit Chart(const Results& results) : results_(results) {
    std::vector<std::string> columns = peer_columns();
    columns.emplace_back();
    double least = 1, largest = 2;
    std::size_t longest = 12;
    for (const std::string& name : columns) {
      bool any = false;
      for (const RowResult& row : results.rows) {
        const CallResult* theirs = peer(row, name);
        if (ours(row) == nullptr || theirs == nullptr) continue;
        any = true;
        least = std::min(least, ratio(row, *theirs));
        largest = std::max(largest, ratio(row, *theirs));
        longest = std::max(longest, label_of(row).size());
      }
      if (any) panels_.push_back({name, title_of(results, name)});
    }
    first_ = std::floor(std::log2(std::max(least, kSmallest)));
    last_ = std::ceil(std::log2(std::min(largest, kLargest)));
    left_ = 40 + kLabelPerCharacter * static_cast<double>(longest);
  }

  std::string draw() const {
    double y = kTop;
    const std::string lines = all_lines(y);
    const double width =
        std::max(832.0, left_ + static_cast<double>(panels_.size()) * (kPanel + kPanelGap));
    std::string out =
        svg::begin(width, y + kBottom, "eigenformer against its peers: time of the peer / our time",
                   machine_line(results_.machine)) +
        legend();
    for (std::size_t panel = 0; panel < panels_.size(); ++panel) out += axis(panel, y);
    return out + lines + svg::end();
  }

 private:
  double panel_left(std::size_t panel) const {
    return left_ + static_cast<double>(panel) * (kPanel + kPanelGap);
  }
  /// Where log2(ratio) is in a panel.
  double x_of(std::size_t panel, double logarithm) const {
    return panel_left(panel) +
           kPanel * (std::clamp(logarithm, first_, last_) - first_) / (last_ - first_);
  }
  bool has_bar(const RowResult& row) const {
    return ours(row) != nullptr &&
           std::any_of(panels_.begin(), panels_.end(),
                       [&](const Panel& panel) { return peer(row, panel.peer) != nullptr; });
  }

  std::string legend() const {
    std::string out;
    double x = 16;
    for (bool faster : {true, false})
      for (std::size_t lane = 0; lane < results_.limits.size(); ++lane) {
        out += svg::box(x, 64, 22, kBar, svg::bar_style(faster, lane)) +
               svg::text(x + 28, 73,
                         std::string(faster ? "we are faster, " : "the peer is faster, ") +
                             thread_count(results_.limits[lane].threads));
        x += faster ? 188 : 212;
      }
    return out;
  }

  /// Title, grid and marks of a panel whose lines end at `bottom`.
  std::string axis(std::size_t panel, double bottom) const {
    std::string out =
        svg::text(panel_left(panel) + kPanel / 2, kTop - 26, panels_[panel].title, "middle bold");
    for (double mark = first_; mark <= last_; ++mark) {
      const double x = x_of(panel, mark);
      const std::string number =
          mark < 0 ? "1/" + format("%.0f", std::exp2(-mark)) : format("%.0f", std::exp2(mark));
      out += svg::grid_line(x, kTop - 4, bottom, mark == 0) +
             svg::text(x, kTop - 9, number, "middle small grey") +
             svg::text(x, bottom + 14, number, "middle small grey");
    }
    return out;
  }

  /// The lines of all operators from `y` on, which moves on to their end.
  std::string all_lines(double& y) const {
    std::string out, operator_name, name;
    double line = y;
    for (const RowResult& row : results_.rows) {
      if (!has_bar(row)) continue;
      if (row.operator_name != operator_name) {
        operator_name = row.operator_name;
        name.clear();
        out += svg::text(16, y + kHeading - 8, operator_name, "bold");
        y += kHeading;
      }
      if (row.name != name) {
        name = row.name;
        line = y;
        const double bars = kBar * static_cast<double>(results_.limits.size());
        out += svg::text(left_ - 10, y + bars / 2 + 4, label_of(row), "end");
        y += bars + kLineGap;
      }
      out += bars_of(row, line + kBar * static_cast<double>(lane_of(results_, row)));
    }
    return out;
  }

  std::string bars_of(const RowResult& row, double y) const {
    std::string out;
    for (std::size_t panel = 0; panel < panels_.size(); ++panel) {
      const CallResult* theirs = peer(row, panels_[panel].peer);
      if (theirs == nullptr) continue;
      const double value = ratio(row, *theirs), logarithm = std::log2(value), one = x_of(panel, 0),
                   end = x_of(panel, logarithm);
      const char* beyond = logarithm > last_ ? "\u00bb " : logarithm < first_ ? "\u00ab " : "";
      out += svg::box(std::min(one, end), y + 1, std::max(std::abs(end - one), 0.5), kBar - 1,
                      "bar " + svg::bar_style(value >= 1, lane_of(results_, row))) +
             svg::text(std::max(one, end) + 4, y + kBar - 1, beyond + format_ratio(value), "small");
    }
    return out;
  }

  const Results& results_;
  std::vector<Panel> panels_;
  double first_ = 0, last_ = 1;  // log2 of the axis' ends
  double left_ = 0;
};

}  // namespace

std::string to_peers_svg(const Results& results) { return Chart(results).draw(); }

}  // namespace bench
