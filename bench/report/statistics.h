/// \file
/// Median and quartiles of timings, and how numbers are written.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdio>
#include <string>
#include <vector>

namespace bench {

/// Seconds of one call: the median, and the middle half of the samples as its spread.
struct Timing {
  double median = 0, lower_quartile = 0, upper_quartile = 0;
  std::size_t samples = 0;
};

/// The q-quantile of sorted values by linear interpolation; 0 where there are none.
inline double quantile(const std::vector<double>& sorted, double q) {
  if (sorted.empty()) return 0;
  const double at = q * static_cast<double>(sorted.size() - 1);
  const std::size_t below = static_cast<std::size_t>(at),
                    above = std::min(below + 1, sorted.size() - 1);
  return sorted[below] + (sorted[above] - sorted[below]) * (at - static_cast<double>(below));
}

inline Timing timing_of(std::vector<double> samples) {
  std::sort(samples.begin(), samples.end());
  return {quantile(samples, 0.5), quantile(samples, 0.25), quantile(samples, 0.75), samples.size()};
}

inline double median(std::vector<double> samples) { return timing_of(std::move(samples)).median; }

/// std::printf of one number.
inline std::string format(const char* pattern, double value) {
  char text[64];
  std::snprintf(text, sizeof text, pattern, value);
  return text;
}

/// 1.23 us, 45.6 ms, 7.89 s.
inline std::string format_seconds(double seconds) {
  if (seconds < 1e-3) return format("%.2f us", seconds * 1e6);
  if (seconds < 1) return format("%.2f ms", seconds * 1e3);
  return format("%.2f s", seconds);
}

}  // namespace bench
