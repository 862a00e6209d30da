/// \file
/// What operators on rows and on single elements share: the compute type of several scalars, the rows of a tensor of any rank, and
/// a result of the same shape.
#pragma once

#include "check.h"
#include "tensor.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

/// What an operator on several scalars computes in: double where one of them is double, float otherwise.
template <typename... Ts>
using common_compute_type = std::conditional_t<(std::is_same_v<Ts, double> || ...), double, float>;

namespace detail {

/// A tensor of any rank as rows of its last dimension.
struct RowShape {
  Index rows, features;
};

template <typename View>
RowShape row_shape(const View& view, std::string_view operation, std::string_view argument) {
  constexpr int last = rank_of<View> - 1;
  Index rows = 1;
  for (int d = 0; d < last; ++d)
    rows = checked_product(rows, view.dimension(static_cast<std::size_t>(d)), operation, argument);
  return {rows, view.dimension(static_cast<std::size_t>(last))};
}

/// An uninitialised tensor of the shape and scalar of a view.
template <typename View>
Tensor<scalar_of<View>, rank_of<View>> tensor_like(const View& view) {
  return Tensor<scalar_of<View>, rank_of<View>>(sizes_of<rank_of<View>>(view));
}

template <typename... Views>
constexpr void require_floating_scalars() {
  static_assert((FloatingScalar<scalar_of<Views>> && ...),
                "eigenformer: this operator takes float, double, Eigen::bfloat16 and Eigen::half");
}

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
