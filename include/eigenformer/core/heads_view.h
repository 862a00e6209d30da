/// \file
/// Queries, keys or values where they lie in the output of one QKV product: heads that stand side
/// by side in the rows of a wider matrix, or one part of a tensor that holds all three.
///
///   ef::Tensor<float, 2> qkv = ef::linear(x, stacked);           // (tokens, (heads + 2 * kv_heads) * head_dim)
///   auto q = ef::heads_of(qkv, 0, heads, head_dim);              // (tokens, heads, head_dim), nothing copied
///   auto k = ef::heads_of(qkv, heads * head_dim, kv_heads, head_dim);
///
///   ef::Tensor<float, 5> stacked(batch, seq, 3, heads, head_dim);
///   auto v = ef::heads_of(stacked, 2, 2);                        // (batch, seq, heads, head_dim): chip(2, 2) as a view
///
/// What takes one says so in its manual: attention (query, key and value), rope and the norms (as
/// x), and the caches (as new keys and values).
#pragma once

#include <array>
#include <string_view>
#include <utility>

#include "check.h"
#include "rows.h"
#include "tensor.h"

namespace eigenformer {
inline namespace EIGENFORMER_VERSION_NAMESPACE {
namespace problem {

/// Elements from one token to the next, and from one head to the next.
struct HeadStrides {
  Index token, head;
};

}  // namespace problem
}  // namespace EIGENFORMER_VERSION_NAMESPACE
inline namespace EIGENFORMER_ABI {

/// (tokens, heads, width), or (batch, seq, heads, width) for Rank 4: element (t, h, i) lies at
/// data[t * token_stride + h * head_stride + i], t counting tokens over batch and seq. T may be
/// const.
template <typename T, int Rank = 3>
class HeadsView {
  static_assert(Rank == 3 || Rank == 4);

 public:
  /// Heads side by side.
  HeadsView(T* data, const std::array<Index, Rank>& dimensions, Index token_stride)
      : HeadsView(data, dimensions, token_stride, dimensions[Rank - 1]) {}
  HeadsView(T* data, const std::array<Index, Rank>& dimensions, Index token_stride,
            Index head_stride)
      : data_(data),
        dimensions_(dimensions),
        token_stride_(token_stride),
        head_stride_(head_stride) {}

  T* data() const { return data_; }
  Index dimension(std::size_t d) const { return dimensions_[d]; }
  Index token_stride() const { return token_stride_; }
  Index head_stride() const { return head_stride_; }
  Index size() const {
    Index count = 1;
    for (Index d : dimensions_) count *= d;
    return count;
  }

 private:
  T* data_;
  std::array<Index, Rank> dimensions_;
  Index token_stride_, head_stride_;
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

/// An output of rank 3 or 4 that may be a HeadsView.
template <int Rank, typename X>
auto heads_output(X& x) {
  if constexpr (tensor_traits<std::remove_const_t<X>>::kind == TensorKind::strided &&
                rank_of<X> == Rank) {
    static_assert(!std::is_const_v<std::remove_pointer_t<decltype(x.data())>>,
                  "eigenformer: the output is read-only; view a tensor that is not const");
    return x;
  } else {
    return output_view<Rank>(x);
  }
}

/// How the heads of such a view follow each other.
template <typename View>
problem::HeadStrides strides_of(const View& view) {
  if constexpr (tensor_traits<View>::kind == TensorKind::strided)
    return {view.token_stride(), view.head_stride()};
  else
    return {view.dimension(rank_of<View> - 2) * view.dimension(rank_of<View> - 1),
            view.dimension(rank_of<View> - 1)};
}

/// The elements of what heads_of may view.
template <typename X>
auto* elements_to_view(X&& x) {
  static_assert(std::is_lvalue_reference_v<X> || !owns_its_elements<X>,
                "eigenformer: heads_of returns a view, and this tensor ends with the expression. "
                "Give it a name first.");
  return x.data();
}

}  // namespace detail

/// `heads` heads of `width` columns each, from column `first` on, of a matrix (tokens, columns) or
/// (batch, seq, columns); as const as its argument. Throws std::invalid_argument where they pass
/// its last column.
template <typename Matrix>
auto heads_of(Matrix&& matrix, Index first, Index heads, Index width) {
  constexpr int rank = rank_of<Matrix> == 3 ? 3 : 2;
  const auto view = input_view<rank>(matrix);
  const Index columns = view.dimension(rank - 1);
  detail::require_that(
      first >= 0 && first <= columns &&
          detail::checked_product(heads, width, "heads_of", "a row of heads") <= columns - first,
      "heads_of", heads, " heads of ", width, " columns from column ", first,
      " on, expected them within the matrix's ", columns);
  auto* const data =
      detail::offset_by(detail::elements_to_view(std::forward<Matrix>(matrix)), first);
  using T = std::remove_pointer_t<decltype(data)>;
  if constexpr (rank == 2)
    return HeadsView<T>(data, {view.dimension(0), heads, width}, columns);
  else
    return HeadsView<T, 4>(data, {view.dimension(0), view.dimension(1), heads, width}, columns);
}

/// The part `offset` of dimension `dimension`, which stands just before or just behind that of the
/// heads: of (batch, seq, parts, heads, width) or (batch, seq, heads, parts, width), and the same
/// without batch. What x.chip(offset, dimension) copies, viewed; as const as its argument. Throws
/// std::invalid_argument for another dimension, or where there is no such part.
template <typename X>
auto heads_of(X&& x, Index offset, Index dimension) {
  constexpr int rank = rank_of<X> == 4 ? 4 : 5;
  constexpr std::string_view name = "heads_of";
  const auto view = input_view<rank>(x);
  detail::checked_size(name, "x", view);
  const bool parts_first = dimension == rank - 3;
  detail::require_that(parts_first || dimension == rank - 2, name, "dimension is ", dimension,
                       ", expected ", rank - 3, " or ", rank - 2, " of x ",
                       detail::shape_text(view));
  const Index parts = view.dimension(static_cast<std::size_t>(dimension)),
              heads = view.dimension(parts_first ? rank - 2 : rank - 3),
              width = view.dimension(rank - 1);
  detail::require_that(offset >= 0 && offset < parts, name, "offset is ", offset,
                       ", expected 0 to ", parts - 1, " of x ", detail::shape_text(view));
  const Index token_stride = parts * heads * width,
              head_stride = parts_first ? width : parts * width;
  auto* const data = detail::offset_by(detail::elements_to_view(std::forward<X>(x)),
                                       offset * (parts_first ? heads * width : width));
  using T = std::remove_pointer_t<decltype(data)>;
  if constexpr (rank == 4)
    return HeadsView<T>(data, {view.dimension(0), heads, width}, token_stride, head_stride);
  else
    return HeadsView<T, 4>(data, {view.dimension(0), view.dimension(1), heads, width}, token_stride,
                           head_stride);
}

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
