/// \file
/// The chart of a day at the GPU: each row's share of what the machine allows, and its peers'.
#pragma once

#include <string>
#include <vector>

namespace gpu_day {

/// One row: shares of the limit, 1 where nothing can be faster.
struct Bar {
  std::string name;
  double seconds = 0, share = 0;
  std::string peer;       ///< the fastest, empty where there is none
  double peer_share = 0;  ///< of the same limit
};

std::string to_svg(const std::string& machine, const std::vector<Bar>& bars);

}  // namespace gpu_day
