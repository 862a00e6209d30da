/// \file
/// INT8 and INT4 quantization in plain loops: what the tests and a doubting user compare with.
#pragma once

#include <cfenv>
#include <cmath>
#include <vector>

#include "../core/int4.h"
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

/// The same with int8 or four-bit weights quantized in groups: scales (out, groups), minimums the
/// same or nullptr. One chain of float multiply-adds over the exact sums of the groups, fma(sum,
/// scale, chain), with minimums then fma(sum of the group's activations, minimum, chain); in the
/// end the activation's scale.
template <typename X>
Tensor<float, 2> grouped_linear(const Tensor<X, 2>& x, const Tensor<std::int8_t, 2>& values,
                                const Tensor<float, 2>& scales, const float* minimums,
                                Index group_size, const float* bias) {
  const Index tokens = x.dimension(0), in = x.dimension(1), out = values.dimension(0),
              groups = scales.dimension(1);
  Tensor<float, 2> y(tokens, out);
  std::vector<std::int8_t> row(static_cast<std::size_t>(in));
  for (Index t = 0; t < tokens; ++t) {
    const float scale = int8_scale(x.data() + t * in, in);
    quantize(x.data() + t * in, in, scale, row.data());
    for (Index o = 0; o < out; ++o) {
      float chain = 0;
      for (Index g = 0; g < groups; ++g) {
        std::int64_t sum = 0, of_x = 0;
        for (Index i = g * group_size; i < (std::min)(in, (g + 1) * group_size); ++i) {
          const std::int64_t number = row[static_cast<std::size_t>(i)];
          sum += number * values(o, i);
          of_x += number;
        }
        chain = std::fma(static_cast<float>(sum), scales(o, g), chain);
        if (minimums != nullptr)
          chain = std::fma(static_cast<float>(of_x), minimums[o * groups + g], chain);
      }
      y(t, o) = std::fma(chain, scale, bias == nullptr ? 0.0f : bias[o]);
    }
  }
  return y;
}

/// The scale of one group, and its minimum unless that is nullptr, by least squares, from those of
/// its extremes. C is what it computes in: the scalar that kernels compute in has their bits.
template <typename C, typename T>
void fit_int4(const T* numbers, Index count, float* scale, float* minimum) {
  const bool above = minimum != nullptr;
  const C from = static_cast<C>(*scale), least = above ? static_cast<C>(*minimum) : C(0);
  if (!(from >= static_cast<C>(0x1p-40f) && from <= static_cast<C>(0x1p40f))) return;
  const C inverse = C(1) / from, n = static_cast<C>(count);
  const auto at = [&](Index i) { return static_cast<C>(numbers[i]) - least; };
  C total = 0, best = 0;
  for (Index i = 0; i < count; ++i) total += at(i);
  for (int j = 0; j < (above ? 21 : 32); ++j) {
    const C step = inverse * (above ? C(140 + j) / C(150) : C(56 + j % 16) / C(j < 16 ? 56 : -56));
    C q_sum = 0, squares = 0, products = 0;
    for (Index i = 0; i < count; ++i) {
      const C scaled = at(i) * step,
              q = std::clamp<C>(std::nearbyint(scaled), above ? 0 : -8, above ? 15 : 7);
      q_sum += q;
      squares = std::fma(q, q, squares);
      products = std::fma(q, at(i), products);
    }
    const C crossed = q_sum * total;
    const C covariance = above ? std::fma(n, products, -crossed) : products,
            variance = above ? n * squares - q_sum * q_sum : squares;
    const C explained = variance > 0 ? covariance * covariance / variance : C(0);
    if (!(explained > best)) continue;
    best = explained;
    const C found = covariance / variance;
    *scale = static_cast<float>(found);
    if (above) *minimum = static_cast<float>(least + std::fma(-found, q_sum, total) / n) + 0.0f;
  }
}

/// Four-bit groups of a row of `count` numbers: scale = max|w| / 7 and q in [-7, 7], or, with
/// minimums (not nullptr), scale = max / 15 - min / 15 and u in [0, 15]; or both of least squares,
/// and then q from -8 on.
template <typename T>
void quantize_int4(const T* numbers, Index count, Index group, std::int8_t* values, float* scales,
                   float* minimums, Int4Fit fit = Int4Fit::extremes) {
  using C = compute_type<T>;
  for (Index first = 0, g = 0; first < count; first += group, ++g) {
    const Index end = (std::min)(count, first + group);
    C low = static_cast<C>(numbers[first]), high = low;
    for (Index i = first; i < end; ++i) {
      low = (std::min)(low, static_cast<C>(numbers[i]));
      high = (std::max)(high, static_cast<C>(numbers[i]));
    }
    const C range = minimums == nullptr ? (std::max)(high, -low) / 7 : high / 15 - low / 15;
    scales[g] = static_cast<float>(range);
    if (range != 0 && minimums == nullptr)
      scales[g] = (std::max)(scales[g], std::numeric_limits<float>::denorm_min());
    if (scales[g] == 0) scales[g] = 1.0f;
    if (minimums != nullptr) minimums[g] = static_cast<float>(low) + 0.0f;  // -0 is 0
    const bool fitted = fit == Int4Fit::least_squares;
    if (fitted)
      fit_int4<C>(numbers + first, end - first, scales + g,
                  minimums == nullptr ? nullptr : minimums + g);
    const C from = minimums != nullptr ? 0
                   : fitted            ? -8
                                       : -7,
            to = minimums == nullptr ? 7 : 15,
            least = minimums == nullptr ? C(0) : static_cast<C>(minimums[g]);
    for (Index i = first; i < end; ++i)
      values[i] = static_cast<std::int8_t>(std::clamp<C>(
          std::nearbyint((static_cast<C>(numbers[i]) - least) / static_cast<C>(scales[g])), from,
          to));
  }
}

}  // namespace reference
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
