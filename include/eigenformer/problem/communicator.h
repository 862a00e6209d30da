/// \file
/// What communicators ask of a device: the one order of summation, and what a sum is kept in.
#pragma once

#include <type_traits>

#include "../core/tensor.h"

namespace eigenformer {
inline namespace EIGENFORMER_VERSION_NAMESPACE {

namespace problem {

/// What a sum over ranks is kept in: float for narrower scalars; integers wrap around.
template <typename T>
struct rank_sum_type {
  using type = compute_type<T>;
};
template <typename T>
  requires std::is_integral_v<T>
struct rank_sum_type<T> {
  using type = std::make_unsigned_t<T>;
};

/// values[i] = ((rank 0's [i] + rank 1's [i]) + rank 2's [i]) + ..., rounded to T once. What
/// `values` holds is this rank's; row k of `others` is that of rank k, or of rank k + 1 from this
/// rank on.
template <typename T>
struct RankSum {
  using Sum = typename rank_sum_type<T>::type;
  T* values;        // (count)
  const T* others;  // (ranks - 1, stride), of each row the first `count`
  Index count, stride;
  int rank, ranks;
};

}  // namespace problem
}  // namespace EIGENFORMER_VERSION_NAMESPACE
}  // namespace eigenformer
