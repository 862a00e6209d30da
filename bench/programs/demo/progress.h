/// \file
/// Progress of long work: a bar that is rewritten on a terminal, a plain line every few seconds
/// elsewhere.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <string>

namespace demo {

using Clock = std::chrono::steady_clock;

inline double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

class Progress {
 public:
  Progress(std::string title, double plain_interval)
      : title_(std::move(title)), interval_(plain_interval) {}

  /// `fraction` of the work is done; `status` is what to say besides.
  void update(double fraction, const std::string& status) {
    const double elapsed = seconds_since(start_);
    const bool last = fraction >= 1.0;
    if (!last && elapsed - shown_ < (terminal_ ? 0.1 : interval_)) return;
    shown_ = elapsed;
    const double left = fraction > 0 ? elapsed * (1.0 - fraction) / fraction : 0.0;
    if (terminal_) {
      constexpr int width = 30;
      const int full = static_cast<int>(std::clamp(fraction, 0.0, 1.0) * width);
      std::printf("\r%s [%s%s] %3.0f%%  %s  %.0f s left \033[K%s", title_.c_str(),
                  std::string(static_cast<std::size_t>(full), '#').c_str(),
                  std::string(static_cast<std::size_t>(width - full), '.').c_str(), 100 * fraction,
                  status.c_str(), left, last ? "\n" : "");
    } else {
      std::printf("%s %3.0f%%  %s  %.0f s left\n", title_.c_str(), 100 * fraction, status.c_str(),
                  left);
    }
    std::fflush(stdout);
  }

 private:
  std::string title_;
  double interval_;
  double shown_ = -1e9;
  bool terminal_ = ::isatty(STDOUT_FILENO) != 0;
  Clock::time_point start_ = Clock::now();
};

}  // namespace demo
