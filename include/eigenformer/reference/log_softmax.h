/// \file
/// Log-softmax in plain loops: what the tests and a doubting user compare with.
#pragma once

#include <cmath>
#include <limits>

#include "../log_softmax.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace reference {

/// Of rows whose greatest element is finite.
inline Tensor<double, 2> log_softmax(const Tensor<double, 2>& x) {
  Tensor<double, 2> y(x.dimension(0), x.dimension(1));
  for (Index r = 0; r < x.dimension(0); ++r) {
    Index best = 0;
    for (Index i = 1; i < x.dimension(1); ++i)
      if (x(r, i) > x(r, best)) best = i;
    double others = 0;
    for (Index i = 0; i < x.dimension(1); ++i)
      if (i != best) others += std::exp(x(r, i) - x(r, best));
    for (Index i = 0; i < x.dimension(1); ++i) y(r, i) = x(r, i) - x(r, best) - std::log1p(others);
  }
  return y;
}

}  // namespace reference
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
