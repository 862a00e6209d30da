/// \file
/// What INT8 quantization asks for.
#pragma once

#include "../core/int4.h"
#include "../core/rows.h"

namespace eigenformer {
inline namespace EIGENFORMER_VERSION_NAMESPACE {

namespace problem {

/// A (rows, columns) matrix whose rows are cut into groups with a scale each; group = columns is
/// one scale per row. The kernel says whether all numbers were quantizable; where they are not,
/// nothing is written if check_first, and some rows otherwise. A GPU does not wait to know: it says
/// yes, and the scale of such a row is NaN.
template <typename T>
struct Quantize {
  const T* weights;
  std::int8_t* values;  // (rows, columns)
  float* scales;        // (rows, groups)
  Index rows, columns, group;
  bool check_first;

  EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE constexpr Index groups() const {
    return group == 0 ? 0 : (columns + group - 1) / group;
  }
};

/// Four-bit values of a (rows, columns) matrix in groups, symmetric or, where minimums are not
/// nullptr, above a minimum. The kernel says whether all numbers were quantizable, before it
/// writes; a GPU does not wait to know, as above.
template <typename T>
struct QuantizeInt4 {
  const T* weights;
  std::int8_t* values;  // (rows, columns)
  float* scales;        // (rows, groups)
  float* minimums;      // (rows, groups) or nullptr
  Index rows, columns, group;
  Int4Fit fit = Int4Fit::extremes;
};

/// What Int4Fit::least_squares tries for a group of C: the scale of its extremes over each of
/// these. Above a minimum they put the largest number at 14, 14.1 to 16; symmetric ones put the
/// largest magnitude at 7, 7.125 to 8.875 or at their negatives, of which -8 is a value. A warp has
/// a lane for each.
template <typename C>
struct Int4Candidates {
  static constexpr int kAbove = 21, kSymmetric = 32;
  /// Scales outside are left as they are: squares of sums could leave float's range.
  static constexpr float kLeastScale = 0x1p-40f, kLargestScale = 0x1p40f;

  EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE static constexpr int count(bool above) {
    return above ? kAbove : kSymmetric;
  }
  EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE static constexpr C at(int j, bool above) {
    return above ? static_cast<C>(140 + j) / 150
                 : static_cast<C>(56 + j % 16) / (j < 16 ? 56 : -56);
  }
};

/// One scale for all numbers, a number of the host's, for which the host waits. The kernel says
/// whether they were quantizable; where they are not, nothing is written.
template <typename T>
struct QuantizeTensor {
  const T* weights;
  std::int8_t* values;
  float* scale;
  Index count;
};

/// A scale per row of (rows, columns); rows that hold NaN or infinity get the scale NaN and zeros.
template <typename T>
struct QuantizeActivations {
  const T* x;
  std::int8_t* values;
  float* scales;
  Index rows, columns;
};

/// values * scales, or fma(scale, value, minimum), the other way round.
template <typename T>
struct Dequantize {
  const std::int8_t* values;
  const float* scales;
  T* weights;
  Index rows, columns, group;
  const float* minimums = nullptr;  // as the scales
};

template <typename T>
struct DequantizeTensor {
  const std::int8_t* values;
  float scale;
  T* weights;
  Index count;
};

/// Whether INT8 can hold all numbers: no NaN, no infinity, no double whose scale is past float's
/// range. The kernel returns the place of the first that it cannot hold, or -1. The scale is the
/// number over `steps`: INT4 has 7, and 1 for the minimum of a group.
template <typename T>
struct FirstNotQuantizable {
  const T* numbers;
  Index count;
  int steps = 127;
};

}  // namespace problem
}  // namespace EIGENFORMER_VERSION_NAMESPACE
}  // namespace eigenformer
