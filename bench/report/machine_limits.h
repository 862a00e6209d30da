/// \file
/// What this machine can do, measured at start in a few seconds: bandwidths out of L2, out of L3
/// and out of DRAM, and arithmetic peaks, for a number of threads that start together. Figures are
/// medians; between machines, and between runs, they differ: compare within one run.
#pragma once

#include <functional>
#include <string>

#include "harness.h"

namespace bench {

/// Bytes per second with the data in a core's L2, in the last-level cache, in DRAM.
struct Bandwidth {
  double l2 = 0, l3 = 0, dram = 0;
};

struct Limits {
  int threads = 1;
  double l2_bytes = 0;          ///< of one core
  double l3_bytes = 0;          ///< shared
  Bandwidth read, write, copy;  ///< a copy, or an update, counts the bytes read and written
  double float_fma = 0;         ///< operations per second; a multiply-add counts two
  double bfloat16 = 0;          ///< dot-product instruction or tile; 0 where this build has none
  double int8 = 0;              ///< likewise
  std::string dot_instruction;  ///< what bfloat16 and int8 were measured with
};

Limits measure_limits(int threads);

/// The better of two measurements with one number of threads, figure by figure: what another
/// program took away for a while is no limit of the machine.
Limits better_of(const Limits& a, const Limits& b);

/// Seconds that `limit` takes at least: the longest of its reads, its writes, both as a copy, and
/// its operations. A peak that this build has no instruction for is replaced by float
/// multiply-adds.
double floor_seconds(const Limit& limit, const Limits& limits);

/// The same, bytes only and operations only.
double memory_seconds(const Limit& limit, const Limits& limits);
double arithmetic_seconds(const Limit& limit, const Limits& limits);

namespace detail {

/// Runs `round(thread, round)` some times on `threads` threads that start each round together, and
/// returns the median of the rounds in seconds, each from the first start to the last end.
double seconds_together(int threads, int rounds, const std::function<void(int thread)>& round);

/// Peaks of dot-product instructions, in operations per second; see machine_limits_dot.cpp.
struct DotPeaks {
  double bfloat16 = 0, int8 = 0;
  std::string instruction;
};
DotPeaks measure_dot_peaks(int threads);

}  // namespace detail
}  // namespace bench
