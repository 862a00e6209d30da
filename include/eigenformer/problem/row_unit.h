/// \file
/// The rule by which rows whose squares leave the range of their type are summed: shared by every
/// backend.
#pragma once

#include <cmath>
#include <limits>

#include "../core/compiler.h"

namespace eigenformer {
inline namespace EIGENFORMER_VERSION_NAMESPACE {
namespace problem {

/// Whether a mean of squares plus epsilon lost nothing: not infinite or NaN, and so far above the
/// denormals that no square that was rounded among them matters.
template <typename C>
EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE bool in_range(C mean_of_squares) {
  constexpr C least = (std::numeric_limits<C>::min)() / std::numeric_limits<C>::epsilon();
  constexpr C most = (std::numeric_limits<C>::max)() / 2;
  return mean_of_squares >= least && mean_of_squares <= most;
}

/// The unit of a row with this largest magnitude: a power of two that brings it to [1, 4), or as
/// near as leaves room for what it is multiplied with. 1 for 0 and infinity, which no unit helps.
template <typename C>
EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE C unit_of(C largest) {
  constexpr int least = std::numeric_limits<C>::min_exponent - 1,
                most = std::numeric_limits<C>::max_exponent / 4 * 3;
  if (!(largest > 0) || !std::isfinite(largest)) return C(1);
  const int exponent = -std::ilogb(largest);
  return std::ldexp(C(1), exponent < least ? least : exponent > most ? most : exponent);
}

}  // namespace problem
}  // namespace EIGENFORMER_VERSION_NAMESPACE
}  // namespace eigenformer
