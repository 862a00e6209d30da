/// \file
/// What operators on rows and on single elements share: the compute type of several scalars, the
/// rows of a tensor of any rank, and a result of the same shape.
#pragma once

#include <limits>

#include "check.h"
#include "tensor.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

namespace detail {

/// What an operator on several scalars computes in: double where one of them is double, float
/// otherwise.
template <typename... Ts>
using common_compute_type = std::conditional_t<(std::is_same_v<Ts, double> || ...), double, float>;

/// Number of elements of a view. Throws std::invalid_argument where a size is negative, or where
/// the bytes that its sizes other than 0 make, `element` each, do not fit an Index with room to
/// spare: what is computed from a size cannot overflow then.
template <typename View>
Index checked_size(std::string_view operation, std::string_view argument, const View& view,
                   Index element = Index{sizeof(scalar_of<View>)}) {
  Index left = ((std::numeric_limits<Index>::max)() - 65536) / element, count = 1;
  bool fits = true;
  for (int d = 0; d < rank_of<View>; ++d) {
    const Index size = view.dimension(static_cast<std::size_t>(d));
    if (size < 0)
      require_that(false, operation, argument, " has shape ", shape_text(view),
                   ", expected sizes of 0 or more");
    fits = fits && size <= left;
    if (size > 0) left /= size;
    count *= fits ? size : 0;
  }
  if (!fits)
    require_that(false, operation, argument, " has shape ", shape_text(view),
                 ", whose size in bytes overflows");
  return count;
}

/// A tensor of any rank as rows of its last dimension.
struct RowShape {
  Index rows, features;
};

/// Throws like checked_size. A tensor without elements has no rows: a loop over 2^60 empty ones
/// would take for ever.
template <typename View>
RowShape row_shape(const View& view, std::string_view operation, std::string_view argument) {
  constexpr int last = rank_of<View> - 1;
  Index rows = checked_size(operation, argument, view) == 0 ? 0 : 1;
  for (int d = 0; d < last; ++d) rows *= view.dimension(static_cast<std::size_t>(d));
  return {rows, view.dimension(static_cast<std::size_t>(last))};
}

/// An uninitialised tensor. Throws std::invalid_argument for sizes that checked_size refuses.
template <typename T, int Rank>
Tensor<T, Rank> make_tensor(std::string_view operation, std::string_view name,
                            const Eigen::DSizes<Index, Rank>& sizes) {
  checked_size(operation, name, TensorView<const T, Rank>(nullptr, sizes));
  return Tensor<T, Rank>(sizes);
}

/// One of the shape and scalar of a view.
template <typename View>
auto tensor_like(std::string_view operation, std::string_view argument, const View& view) {
  return make_tensor<scalar_of<View>, rank_of<View>>(operation, argument,
                                                     sizes_of<rank_of<View>>(view));
}

template <typename... Views>
constexpr void require_floating_scalars() {
  static_assert((FloatingScalar<scalar_of<Views>> && ...),
                "eigenformer: this operator takes float, double, Eigen::bfloat16 and Eigen::half");
}

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
