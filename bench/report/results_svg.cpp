// The bar chart: for each row the percentage of this machine's limit, one bar for each number of
// threads, peers as markers.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <sstream>

#include "results.h"

namespace bench {
namespace {

// Pixels. One line of text is 16 high; a row holds its bars and a gap.
constexpr double kLabelPerCharacter = 6.7, kPlotWidth = 560, kBar = 14, kBarGap = 2, kRowGap = 12,
                 kTop = 118, kBottom = 52, kRight = 76;
constexpr double kShownAtMost = 150;  // percent; what lies beyond sits on the edge, with its number

const char* bar_colour(std::size_t index) { return index == 0 ? "#7fb3d5" : "#1f618d"; }

struct MarkerStyle {
  const char* peer;  // empty: those without a column of their own
  const char* label;
  const char* colour;
};
constexpr MarkerStyle kMarkers[] = {{"Eigen", "Eigen by hand", "#c0392b"},
                                    {"oneDNN", "oneDNN", "#d68910"},
                                    {"OpenBLAS", "OpenBLAS", "#1e8449"},
                                    {"", "best other", "#6c3483"}};

/// Circle, diamond, square, triangle: told apart without colour too.
std::string marker(std::size_t kind, double x, double y) {
  std::ostringstream out;
  const char* colour = kMarkers[kind].colour;
  const char* style = " stroke=\"#ffffff\" stroke-width=\"1\"/>";
  if (kind == 0) {
    out << "<circle cx=\"" << x << "\" cy=\"" << y << "\" r=\"4.5\" fill=\"" << colour << "\""
        << style;
  } else if (kind == 2) {
    out << "<rect x=\"" << x - 4 << "\" y=\"" << y - 4 << "\" width=\"8\" height=\"8\" fill=\""
        << colour << "\"" << style;
  } else {
    out << "<path d=\"M" << x << ' ' << y - 5.5
        << (kind == 1 ? " l5.5 5.5 l-5.5 5.5 l-5.5 -5.5 z" : " l5.5 10 h-11 z") << "\" fill=\""
        << colour << "\"" << style;
  }
  return out.str() + "\n";
}

std::string text_at(double x, double y, const std::string& text, const char* anchor = "start",
                    const char* extra = "") {
  std::ostringstream out;
  out << "<text x=\"" << x << "\" y=\"" << y << "\" text-anchor=\"" << anchor << "\" " << extra
      << '>' << escape_xml(text) << "</text>\n";
  return out.str();
}

class Chart {
 public:
  explicit Chart(const Results& results) : results_(results) {
    std::size_t longest = 12;
    double largest = 100;
    for (const RowResult& row : results.rows) {
      if (!(row.floor > 0)) continue;
      if (names_.empty() || names_.back() != row.name) names_.push_back(row.name);
      longest = std::max(longest, row.name.size());
      for (const CallResult& call : row.calls)
        largest = std::max(largest, 100 * row.floor / call.timing.median);
    }
    left_ = 24 + kLabelPerCharacter * static_cast<double>(longest);
    scale_end_ = std::min(kShownAtMost, 25 * std::ceil(largest / 25));
    row_height_ = static_cast<double>(results.limits.size()) * (kBar + kBarGap) + kRowGap;
    plot_height_ = row_height_ * static_cast<double>(names_.size());
  }

  std::string draw() const {
    std::ostringstream out;
    const double width = left_ + kPlotWidth + kRight, height = kTop + plot_height_ + kBottom;
    out << "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 " << width << ' ' << height
        << "\" width=\"" << width << "\" height=\"" << height
        << "\" font-family=\"Helvetica, Arial, sans-serif\" font-size=\"12\" fill=\"#222222\">\n"
        << "<rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n"
        << text_at(16, 28, "eigenformer: percent of this machine's limit", "start",
                   "font-size=\"17\" font-weight=\"bold\"")
        << text_at(16, 48, subtitle(), "start", "fill=\"#666666\"") << legend() << axis();
    for (std::size_t i = 0; i < names_.size(); ++i) out << row(i);
    out << "</svg>\n";
    return out.str();
  }

 private:
  double x_of(double percent) const {
    return left_ + kPlotWidth * std::clamp(percent, 0.0, scale_end_) / scale_end_;
  }

  std::string subtitle() const {
    const Machine& m = results_.machine;
    return m.cpu + ", " + std::to_string(m.cores) + (m.cores == 1 ? " core" : " cores") + ", ISA " +
           m.isa + ", " + m.compiler;
  }

  std::string legend() const {
    std::ostringstream out;
    double x = 16;
    for (std::size_t i = 0; i < results_.limits.size(); ++i) {
      const int threads = results_.limits[i].threads;
      out << "<rect x=\"" << x << "\" y=\"68\" width=\"22\" height=\"12\" fill=\"" << bar_colour(i)
          << "\"/>\n"
          << text_at(x + 28, 78,
                     "eigenformer, " + std::to_string(threads) +
                         (threads == 1 ? " thread" : " threads"));
      x += 178;
    }
    for (std::size_t kind = 0; kind < std::size(kMarkers); ++kind) {
      if (std::none_of(results_.rows.begin(), results_.rows.end(),
                       [&](const RowResult& r) { return peer(r, kMarkers[kind].peer) != nullptr; }))
        continue;
      out << marker(kind, x + 6, 74) << text_at(x + 17, 78, kMarkers[kind].label);
      x += 110;
    }
    return out.str();
  }

  std::string axis() const {
    std::ostringstream out;
    for (double percent = 0; percent <= scale_end_; percent += 25) {
      const double x = x_of(percent);
      out << "<line x1=\"" << x << "\" y1=\"" << kTop - 6 << "\" x2=\"" << x << "\" y2=\""
          << kTop + plot_height_ << "\" stroke=\""
          << (percent == 100 ? "#222222\" stroke-dasharray=\"5 3" : "#dddddd") << "\"/>\n";
      out << text_at(x, kTop + plot_height_ + 18, std::to_string(static_cast<int>(percent)) + "%",
                     "middle");
    }
    out << text_at(left_ + kPlotWidth + kRight - 16, kTop - 12, "ours", "end",
                   "font-size=\"11\" fill=\"#666666\"");
    out << text_at(left_ + kPlotWidth / 2, kTop + plot_height_ + 40,
                   "floor / time: the floor is the row's bytes at the measured bandwidth or its "
                   "operations at the measured peak",
                   "middle", "fill=\"#666666\"");
    return out.str();
  }

  std::string row(std::size_t index) const {
    std::ostringstream out;
    const double top = kTop + row_height_ * static_cast<double>(index);
    out << text_at(left_ - 10, top + (row_height_ - kRowGap) / 2 + 4, names_[index], "end");
    for (const RowResult& result : results_.rows) {
      if (result.name != names_[index] || !(result.floor > 0)) continue;
      const auto at = std::find_if(results_.limits.begin(), results_.limits.end(),
                                   [&](const Limits& l) { return l.threads == result.threads; });
      const std::size_t lane = static_cast<std::size_t>(at - results_.limits.begin());
      const double y = top + static_cast<double>(lane) * (kBar + kBarGap);
      const auto percent = [&](const CallResult& call) {
        return 100 * result.floor / call.timing.median;
      };
      if (const CallResult* mine = ours(result)) {
        char number[32];
        std::snprintf(number, sizeof number, "%.0f%%", percent(*mine));
        out << "<rect x=\"" << left_ << "\" y=\"" << y << "\" width=\""
            << x_of(percent(*mine)) - left_ << "\" height=\"" << kBar << "\" fill=\""
            << bar_colour(lane) << "\"/>\n"
            << text_at(left_ + kPlotWidth + kRight - 16, y + kBar - 3, number, "end",
                       "font-size=\"11\"");
      }
      for (std::size_t kind = 0; kind < std::size(kMarkers); ++kind)
        if (const CallResult* theirs = peer(result, kMarkers[kind].peer))
          out << marker(kind, x_of(percent(*theirs)), y + kBar / 2);
    }
    return out.str();
  }

  const Results& results_;
  std::vector<std::string> names_;
  double left_ = 0, scale_end_ = 100, row_height_ = 0, plot_height_ = 0;
};

}  // namespace

std::string escape_xml(const std::string& text) {
  std::string escaped;
  for (char c : text) {
    switch (c) {
      case '&':
        escaped += "&amp;";
        break;
      case '<':
        escaped += "&lt;";
        break;
      case '>':
        escaped += "&gt;";
        break;
      case '"':
        escaped += "&quot;";
        break;
      default:
        escaped +=
            static_cast<unsigned char>(c) < 0x20 ? ' ' : c;  // control characters are not XML
    }
  }
  return escaped;
}

std::string to_svg(const Results& results) { return Chart(results).draw(); }

}  // namespace bench
