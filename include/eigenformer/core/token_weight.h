/// \file
/// The weight of a token in sampling, the same bits on a GPU and on a CPU with a fused
/// multiply-add: so both draw the same token from the same random number. On a CPU without one the
/// last bits may differ, a token only where its sum of weights comes that near to the random
/// number.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "compiler.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

/// a * b + c, in one rounding where that is one instruction: every GPU has it.
EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE double multiply_add(double a, double b, double c) {
#if defined(EIGENFORMER_CUDA_UNIT)
  return std::fma(a, b, c);
#else
  if constexpr (isa::kHasFma)
    return std::fma(a, b, c);
  else
    return a * b + c;
#endif
}

/// e^x for x <= 0, without a branch, so that a loop over an array is SIMD code on every ISA: 2^n
/// times the Taylor polynomial of degree 13 on |r| <= ln2 / 2, whose remainder is below 5e-18.
/// Exactly 1 at 0; 0 below -708, where doubles become denormal.
EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE double exp_nonpositive(double x) {
  // adding it rounds to an integer and leaves that integer in the low bits
  constexpr double shift = 0x1.8p52;
  const double clamped = x < -708.0 ? -708.0 : x;
  const double shifted = multiply_add(clamped, 0x1.71547652b82fep0, shift);
  const double n = shifted - shift;
  // ln 2 in two parts; the first has 32 bits, so that n times it is exact
  double r = multiply_add(n, -0x1.62e42feep-1, clamped);
  r = multiply_add(n, -0x1.a39ef35793c76p-33, r);
  double p = 1.0 / 6227020800.0;
  p = multiply_add(p, r, 1.0 / 479001600.0);
  p = multiply_add(p, r, 1.0 / 39916800.0);
  p = multiply_add(p, r, 1.0 / 3628800.0);
  p = multiply_add(p, r, 1.0 / 362880.0);
  p = multiply_add(p, r, 1.0 / 40320.0);
  p = multiply_add(p, r, 1.0 / 5040.0);
  p = multiply_add(p, r, 1.0 / 720.0);
  p = multiply_add(p, r, 1.0 / 120.0);
  p = multiply_add(p, r, 1.0 / 24.0);
  p = multiply_add(p, r, 1.0 / 6.0);
  p = multiply_add(p, r, 0.5);
  p = multiply_add(p, r, 1.0);
  p = multiply_add(p, r, 1.0);
  const double scaled = std::bit_cast<double>(std::bit_cast<std::uint64_t>(p) +
                                              (std::bit_cast<std::uint64_t>(shifted) << 52));
  return x < -708.0 ? 0.0 : scaled;
}

/// The weight of a logit relative to the best one in play: 1 for the best.
EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE double token_weight(double logit, double best,
                                                               double inverse_temperature) {
  const double scaled = (logit - best) * inverse_temperature;
  return exp_nonpositive(scaled < 0.0 ? scaled : 0.0);
}

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
