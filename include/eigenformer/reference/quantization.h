/// \file
/// INT8 quantization in plain loops: what the tests and a doubting user compare with.
#pragma once

#include <cfenv>
#include <cmath>
#include <vector>

#include "../core/tensor.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace reference {

/// max|w| / 127 of `count` numbers, 1 where all are zero.
template <typename T>
float int8_scale(const T* numbers, Index count) {
  compute_type<T> largest = 0;
  for (Index i = 0; i < count; ++i)
    largest = (std::max)(largest, std::abs(static_cast<compute_type<T>>(numbers[i])));
  return largest == 0 ? 1.0f
                      : (std::max)(static_cast<float>(largest / 127),
                                   std::numeric_limits<float>::denorm_min());
}

template <typename T>
void quantize(const T* numbers, Index count, float scale, std::int8_t* values) {
  for (Index i = 0; i < count; ++i) {
    const compute_type<T> quotient = static_cast<compute_type<T>>(numbers[i]) / scale;
    values[i] =
        static_cast<std::int8_t>(std::clamp<compute_type<T>>(std::nearbyint(quotient), -127, 127));
  }
}

/// x quantized per token, exact integer sums, one fused multiply-add in float.
template <typename X>
Tensor<float, 2> int8_linear(const Tensor<X, 2>& x, const Tensor<std::int8_t, 2>& values,
                             const Tensor<float, 1>& scales, const float* bias) {
  const Index tokens = x.dimension(0), in = x.dimension(1), out = values.dimension(0);
  Tensor<float, 2> y(tokens, out);
  std::vector<std::int8_t> row(static_cast<std::size_t>(in));
  for (Index t = 0; t < tokens; ++t) {
    const float scale = int8_scale(x.data() + t * in, in);
    quantize(x.data() + t * in, in, scale, row.data());
    for (Index o = 0; o < out; ++o) {
      std::int64_t sum = 0;
      for (Index i = 0; i < in; ++i)
        sum += std::int64_t{row[static_cast<std::size_t>(i)]} * values(o, i);
      y(t, o) =
          std::fma(static_cast<float>(sum), scale * scales(o), bias == nullptr ? 0.0f : bias[o]);
    }
  }
  return y;
}

/// The same with weights quantized in groups: scales (out, groups). One chain of float
/// multiply-adds over the exact sums of the groups, then the activation's scale.
template <typename X>
Tensor<float, 2> int8_linear_grouped(const Tensor<X, 2>& x, const Tensor<std::int8_t, 2>& values,
                                     const Tensor<float, 2>& scales, Index group_size,
                                     const float* bias) {
  const Index tokens = x.dimension(0), in = x.dimension(1), out = values.dimension(0);
  Tensor<float, 2> y(tokens, out);
  std::vector<std::int8_t> row(static_cast<std::size_t>(in));
  for (Index t = 0; t < tokens; ++t) {
    const float scale = int8_scale(x.data() + t * in, in);
    quantize(x.data() + t * in, in, scale, row.data());
    for (Index o = 0; o < out; ++o) {
      float joined = 0;
      for (Index first = 0, g = 0; first < in; first += group_size, ++g) {
        std::int64_t sum = 0;
        for (Index i = first; i < (std::min)(in, first + group_size); ++i)
          sum += std::int64_t{row[static_cast<std::size_t>(i)]} * values(o, i);
        joined = std::fma(static_cast<float>(sum), scales(o, g), joined);
      }
      y(t, o) = std::fma(joined, scale, bias == nullptr ? 0.0f : bias[o]);
    }
  }
  return y;
}

}  // namespace reference
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
