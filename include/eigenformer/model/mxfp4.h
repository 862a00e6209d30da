/// \file
/// Matrices in MXFP4, as gpt-oss files have them ("OCP Microscaling Formats", 2023): 32 neighbours
/// of a row share a power of two, 2^(scale - 127), and each is one of 16 numbers, the even ones in
/// the low four bits of a byte. Two tensors: blocks (..., rows, columns / 32, 16) and scales
/// (..., rows, columns / 32), both U8.
#pragma once

#include <array>
#include <cmath>
#include <limits>
#include <span>

#include "stored_tensor.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

/// As many numbers as `values` has place for, whole blocks, from block `first` on.
inline void dequantize_mxfp4(const StoredTensor& blocks, const StoredTensor& scales,
                             std::size_t first, std::span<float> values) {
  constexpr std::array<float, 16> numbers{0,     .5f,  1,  1.5f,  2,  3,  4,  6,
                                          -0.0f, -.5f, -1, -1.5f, -2, -3, -4, -6};
  for (std::size_t b = 0; b < values.size() / 32; ++b) {
    const int exponent = static_cast<int>(scales.bytes[first + b]);
    const float scale = exponent == 255 ? std::numeric_limits<float>::quiet_NaN()
                                        : std::ldexp(1.0f, exponent - 127);
    for (std::size_t i = 0; i < 16; ++i) {
      const auto two = static_cast<unsigned>(blocks.bytes[(first + b) * 16 + i]);
      values[b * 32 + 2 * i] = numbers[two & 15] * scale;
      values[b * 32 + 2 * i + 1] = numbers[two >> 4] * scale;
    }
  }
}

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
