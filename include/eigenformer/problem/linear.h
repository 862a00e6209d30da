/// \file
/// What linear layers, their gradients and the packing of weights ask for. E is an
/// Epilogue.
#pragma once

#include <cstdint>

#include "packed_weight.h"

namespace eigenformer {
inline namespace EIGENFORMER_VERSION_NAMESPACE {

namespace problem {

/// residual + function(sum + bias); B, R: scalars of bias and residual.
template <typename Function, typename B, typename R>
struct Epilogue {
  using function = Function;
  using bias_scalar = B;
  using residual_scalar = R;
  const B* bias;      // (out), of a gated layer (2 * out), or nullptr
  const R* residual;  // (tokens, out) or nullptr
};

/// y = epilogue(x w^T) of one weight, or of the pair of a gated unit.
template <typename Y, typename X, typename W, int Matrices, typename E>
struct Linear {
  static constexpr bool kUsesTiles = true;
  Y* y;                        // (tokens, out)
  const X* x;                  // (tokens, in)
  const W* weights[Matrices];  // (out, in) each
  Index tokens, in, out;
  E epilogue;
};

/// The same of a packed weight.
template <typename Y, typename X, typename S, bool Gated, typename E>
struct PackedLinear {
  static constexpr bool kUsesTiles = true;
  Y* y;        // (tokens, out)
  const X* x;  // (tokens, in)
  PackedPanels<const S> weight;
  Index tokens, in, out;
  E epilogue;
};

/// The same of int8 values and their scales.
template <typename Y, typename X, typename E>
struct Int8Linear {
  static constexpr bool kUsesTiles = true;
  Y* y;                       // (tokens, out)
  const X* x;                 // (tokens, in)
  const std::int8_t* values;  // (out, in)
  const float* scales;        // (out)
  Index tokens, in, out;
  E epilogue;
};

/// grad_x = grad_y w.
template <typename X, typename Y, typename W>
struct LinearBackwardInput {
  static constexpr bool kUsesTiles = true;
  X* grad_x;        // (tokens, in)
  const Y* grad_y;  // (tokens, out)
  const W* weight;  // (out, in)
  Index tokens, in, out;
};

/// grad_weight += grad_y^T x.
template <typename G, typename Y, typename X>
struct LinearBackwardWeight {
  static constexpr bool kUsesTiles = true;
  G* grad_weight;   // (out, in)
  const Y* grad_y;  // (tokens, out)
  const X* x;       // (tokens, in)
  Index tokens, in, out;
};

/// grad_bias += the sum of grad_y over tokens, in their order.
template <typename G, typename Y>
struct LinearBackwardBias {
  G* grad_bias;     // (out)
  const Y* grad_y;  // (tokens, out)
  Index tokens, out;
};

/// Packs one weight, or the pair of a gated unit, of packed.rows / Matrices rows each; int8 and
/// int4 weights are quantized with a scale for each `packed.group` inputs (0: for each row). The
/// kernel returns the first matrix that holds a number that is not quantizable, before it writes,
/// or -1; a GPU does not wait to know, see linear/pack.h.
template <typename T, typename W, int Matrices>
struct PackWeight {
  static constexpr bool kUsesTiles = true;
  PackedPanels<T> packed;
  const W* weights[Matrices];  // (rows, columns) each
  Int4Fit fit = Int4Fit::extremes;
};

/// Packs several weights one below the other as one, in the same way.
template <typename T, typename W>
struct PackStackedWeight {
  static constexpr bool kUsesTiles = true;
  PackedPanels<T> packed;
  const W* const* weights;  // (ends[m] - ends[m - 1], columns) each
  const Index* ends;        // ends[m] rows are those of weights 0 to m
  int count;
  Int4Fit fit = Int4Fit::extremes;
};

/// Packs int8 values with their scales.
struct PackInt8Weight {
  static constexpr bool kUsesTiles = true;
  PackedPanels<std::int8_t> packed;
  const std::int8_t* values;  // (rows, columns)
  const float* scales;        // (rows, groups)
};

/// Four-bit values with their scales.
struct Int4Values {
  const std::int8_t* values;  // (rows, columns): 0 to 15 with minimums, -8 to 7 without
  const float* scales;        // (rows, groups)
  const float* minimums;      // the same, where packed.minimums are
};

/// Packs these as one weight, or the pair of a gated unit, of packed.rows / Matrices rows each.
template <int Matrices>
struct PackInt4Weight {
  static constexpr bool kUsesTiles = true;
  PackedPanels<int4> packed;
  Int4Values weights[Matrices];
};

/// The same of several weights one below the other.
struct PackStackedInt4Weight {
  static constexpr bool kUsesTiles = true;
  PackedPanels<int4> packed;
  const Int4Values* weights;  // (ends[m] - ends[m - 1], columns) each
  const Index* ends;          // ends[m] rows are those of weights 0 to m
  int count;
};

}  // namespace problem
}  // namespace EIGENFORMER_VERSION_NAMESPACE
}  // namespace eigenformer
