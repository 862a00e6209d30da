/// \file
/// Queries, keys or values where they lie in the output of one QKV product: heads that stand side
/// by side in the rows of a wider matrix.
///
///   ef::Tensor<float, 2> qkv = ef::linear(x, stacked);           // (tokens, (heads + 2 * kv_heads) * head_dim)
///   auto q = ef::heads_of(qkv, 0, heads, head_dim);              // (tokens, heads, head_dim), nothing copied
///   auto k = ef::heads_of(qkv, heads * head_dim, kv_heads, head_dim);
///
/// What takes one says so in its manual: rope (as x), and the caches (as new keys and values).
#pragma once

#include <array>

#include "check.h"
#include "tensor.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

/// (tokens, heads, width), or (batch, seq, heads, width) for Rank 4: element (t, h, i) lies at
/// data[t * token_stride + h * width + i], t counting tokens over batch and seq. T may be const.
template <typename T, int Rank = 3>
class HeadsView {
  static_assert(Rank == 3 || Rank == 4);

 public:
  HeadsView(T* data, const std::array<Index, Rank>& dimensions, Index token_stride)
      : data_(data), dimensions_(dimensions), token_stride_(token_stride) {}

  T* data() const { return data_; }
  Index dimension(std::size_t d) const { return dimensions_[d]; }
  Index token_stride() const { return token_stride_; }
  Index size() const {
    Index count = 1;
    for (Index d : dimensions_) count *= d;
    return count;
  }

 private:
  T* data_;
  std::array<Index, Rank> dimensions_;
  Index token_stride_;
};

namespace detail {

template <typename T, int Rank>
struct tensor_traits<HeadsView<T, Rank>> {
  static constexpr TensorKind kind = TensorKind::strided;
  static constexpr int rank = Rank;
  using scalar = std::remove_const_t<T>;
};

/// An argument of rank 3 or 4 that may be a HeadsView.
template <int Rank, typename X>
auto heads_input(const X& x) {
  if constexpr (tensor_traits<X>::kind == TensorKind::strided && rank_of<X> == Rank)
    return x;
  else
    return input_view<Rank>(x);
}

/// Elements from one token of such a view to the next.
template <typename View>
Index token_stride(const View& view) {
  if constexpr (tensor_traits<View>::kind == TensorKind::strided)
    return view.token_stride();
  else
    return view.dimension(rank_of<View> - 2) * view.dimension(rank_of<View> - 1);
}

}  // namespace detail

/// `heads` heads of `width` columns each, from column `first` on, of a matrix (tokens, columns); as
/// const as its argument. Throws std::invalid_argument where they pass its last column.
template <typename Matrix>
auto heads_of(Matrix&& matrix, Index first, Index heads, Index width) {
  static_assert(std::is_lvalue_reference_v<Matrix> || !detail::owns_its_elements<Matrix>,
                "eigenformer: heads_of returns a view, and this tensor ends with the expression. "
                "Give it a name first.");
  const auto view = input_view<2>(matrix);
  const Index columns = view.dimension(1);
  detail::require_that(
      first >= 0 && first <= columns &&
          detail::checked_product(heads, width, "heads_of", "a row of heads") <= columns - first,
      "heads_of", heads, " heads of ", width, " columns from column ", first,
      " on, expected them within the matrix's ", columns);
  using T = std::remove_pointer_t<decltype(matrix.data())>;
  return HeadsView<T>(detail::offset_by(matrix.data(), first), {view.dimension(0), heads, width},
                      columns);
}

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
