/// \file
/// What merging partial results of attention asks for.
#pragma once

#include "../core/rows.h"

namespace eigenformer {
inline namespace EIGENFORMER_VERSION_NAMESPACE {

namespace problem {

/// What a part of the keys has given every row.
template <typename T>
struct AttentionState {
  const T* output;                     // (batch, rows, heads, width)
  const compute_type<T>* log_sum_exp;  // (batch, heads, rows)
};

/// Outputs are laid out like a state; log_sum_exp is nullptr where it is not wanted. Both may be
/// those of a state.
template <typename T>
struct AttentionMerge {
  using Compute = compute_type<T>;
  T* output;
  Compute* log_sum_exp;
  const AttentionState<T>* states;  // (count), host memory
  Index count, batch, rows, heads, width;

  EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE Index lines() const { return batch * rows * heads; }
  /// Where line i of (batch, rows, heads) stands in log_sum_exp.
  EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE Index log_sum_exp_at(Index i) const {
    const Index head = i % heads, row = i / heads % rows, b = i / heads / rows;
    return (b * heads + head) * rows + row;
  }
};

}  // namespace problem
}  // namespace EIGENFORMER_VERSION_NAMESPACE
}  // namespace eigenformer
