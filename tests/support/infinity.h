/// \file
/// Infinity, for the tests of several folders.
#pragma once

#include <limits>

namespace eigenformer_test {

inline constexpr float kInfinity = std::numeric_limits<float>::infinity();

}  // namespace eigenformer_test
