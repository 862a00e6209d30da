/// \file
/// What the charts share: text, boxes, and a style that is readable on light and on dark pages.
#pragma once

#include <cmath>
#include <cstddef>
#include <sstream>
#include <string>

namespace bench::svg {

/// Text as it may stand in XML.
inline std::string escape(const std::string& text) {
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
        // control characters are not XML
        escaped += static_cast<unsigned char>(c) < 0x20 ? ' ' : c;
    }
  }
  return escaped;
}

/// A coordinate, to a tenth of a pixel.
inline double px(double value) { return std::round(10 * value) / 10; }

/// `style` is a list of classes of the style sheet: start, middle or end for the anchor, and grey,
/// bold, large, small.
inline std::string text(double x, double y, const std::string& text, const char* style = "") {
  std::ostringstream out;
  out << "<text x=\"" << px(x) << "\" y=\"" << px(y) << "\" class=\"" << style << "\">"
      << escape(text) << "</text>\n";
  return out.str();
}

inline std::string box(double x, double y, double width, double height, const std::string& style) {
  std::ostringstream out;
  out << "<rect class=\"" << style << "\" x=\"" << px(x) << "\" y=\"" << px(y) << "\" width=\""
      << px(width) << "\" height=\"" << px(height) << "\"/>\n";
  return out.str();
}

/// A line of the grid from top to bottom; the one that figures are held against is stronger.
inline std::string grid_line(double x, double top, double bottom, bool strong) {
  std::ostringstream out;
  out << "<path class=\"" << (strong ? "strong" : "grid") << "\" d=\"M" << px(x) << ' ' << px(top)
      << "V" << px(bottom) << "\"/>\n";
  return out.str();
}

/// The style of bars: the better side of 1 or the other, paler on one thread than on all.
inline std::string bar_style(bool good, std::size_t lane) {
  return std::string(good ? "good" : "bad") + (lane == 0 ? "0" : "1");
}

/// The head of a chart of this size in pixels, its style sheet, a background and two lines of text.
inline std::string begin(double width, double height, const std::string& title,
                         const std::string& machine) {
  std::ostringstream out;
  out << "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 " << px(width) << ' '
      << px(height) << "\" width=\"" << px(width) << "\" height=\"" << px(height) << "\">\n"
      << R"(<style>
text{font:12px system-ui,-apple-system,"Segoe UI",Helvetica,Arial,sans-serif;fill:#1f2328}
.middle{text-anchor:middle}.end{text-anchor:end}
.bold{font-weight:600}.large{font-size:17px}.small{font-size:10px}.grey{fill:#59636e}
.back{fill:#fff}.grid{stroke:#d1d9e0}.strong{stroke:#1f2328;stroke-width:1.5}
.good0{fill:#79b8e8}.good1{fill:#1f6fb2}.bad0{fill:#f0ae6b}.bad1{fill:#c4611a}
@media (prefers-color-scheme:dark){
text{fill:#f0f6fc}.grey{fill:#9198a1}.back{fill:#0d1117}.grid{stroke:#3d444d}.strong{stroke:#f0f6fc}
.good0{fill:#3b82c4}.good1{fill:#8cc8f5}.bad0{fill:#b5651d}.bad1{fill:#f5b573}}
</style>
)"
      << "<rect class=\"back\" width=\"100%\" height=\"100%\"/>\n"
      << text(16, 28, title, "bold large") << text(16, 48, machine, "grey");
  return out.str();
}

inline std::string end() { return "</svg>\n"; }

}  // namespace bench::svg
