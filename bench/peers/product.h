/// \file
/// The matrix product that peers are given, y = x w^T, and the judgement of their result. Free of
/// Eigen and of every peer.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <string>

namespace bench {

/// What a peer holds the weights in, and multiplies in.
enum class WeightType { float32, bfloat16, int8 };

struct Product {
  std::int64_t tokens = 0, in = 0, out = 0;
  std::shared_ptr<const float> x;  // (tokens, in)
  std::shared_ptr<const float> w;  // (out, in)
  WeightType type = WeightType::float32;
  /// Calls take turns on this many copies of the weights: so many that each comes out of DRAM, as
  /// in decoding.
  int copies = 1;
};

/// What is wrong with y (tokens, out), empty where its relative Frobenius error is in bounds:
/// against double, over some 4,000 elements spread over the whole result. The bounds are the
/// contract's, and for INT8 that of rounding both factors to 8 bits.
inline std::string mismatch_of(const Product& product, const float* y) {
  const std::int64_t size = product.tokens * product.out;
  const std::int64_t step = size / 4096 + 1;
  double difference = 0, norm = 0;
  for (std::int64_t at = 0; at < size; at += step) {
    const float* x = product.x.get() + at / product.out * product.in;
    const float* w = product.w.get() + at % product.out * product.in;
    double expected = 0;
    for (std::int64_t k = 0; k < product.in; ++k)
      expected += static_cast<double>(x[k]) * static_cast<double>(w[k]);
    const double error = static_cast<double>(y[at]) - expected;
    difference += error * error;
    norm += expected * expected;
  }
  const double relative = norm > 0 ? std::sqrt(difference / norm) : std::sqrt(difference);
  const double bound = product.type == WeightType::float32    ? 1e-5
                       : product.type == WeightType::bfloat16 ? 1e-2
                                                              : 3e-2;
  if (relative <= bound) return {};  // false for NaN
  char text[96];
  std::snprintf(text, sizeof text,
                "relative error %.2g against the double reference, at most %.0e expected", relative,
                bound);
  return text;
}

}  // namespace bench
