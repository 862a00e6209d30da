/// \file
/// Rotary embedding in plain loops: what the tests and a doubting user compare with. Sines in long
/// double.
#pragma once

#include <cmath>
#include <span>

#include "../rope.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace reference {

inline Tensor<double, 3> rope(const Tensor<double, 3>& x, std::span<const Index> positions,
                              const RopeOptions& options, bool inverse = false) {
  Tensor<double, 3> y = x;
  const auto given = static_cast<Index>(options.frequencies.size());
  const Index all = given > 0 ? 2 * given : x.dimension(2);
  const Index rotary_dim = options.rotary_dim == 0 ? all : options.rotary_dim;
  const double factor = static_cast<double>(options.attention_factor);
  for (Index t = 0; t < x.dimension(0); ++t)
    for (Index h = 0; h < x.dimension(1); ++h)
      for (Index i = 0; i < rotary_dim / 2; ++i) {
        const Index a = options.layout == RopeLayout::half_split ? i : 2 * i;
        const Index b = options.layout == RopeLayout::half_split ? i + rotary_dim / 2 : 2 * i + 1;
        const long double frequency =
            given > 0 ? static_cast<long double>(options.frequencies[static_cast<std::size_t>(i)])
                      : std::pow(static_cast<long double>(options.base),
                                 -2.0L * static_cast<long double>(i) /
                                     static_cast<long double>(rotary_dim));
        const long double angle = static_cast<long double>(positions[static_cast<std::size_t>(t)]) *
                                  static_cast<long double>(options.scale) * frequency *
                                  (inverse ? -1 : 1);
        const double c = static_cast<double>(std::cos(angle)) * factor,
                     s = static_cast<double>(std::sin(angle)) * factor;
        y(t, h, a) = x(t, h, a) * c - x(t, h, b) * s;
        y(t, h, b) = x(t, h, b) * c + x(t, h, a) * s;
      }
  return y;
}

}  // namespace reference
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
