/// \file
/// Tensor aliases, the scalars operators accept, and the door every argument comes through:
/// `input_view` and `output_view` turn an `ef::Tensor` or an `ef::TensorView` into a view, and
/// refuse anything else at compile time with a message that says what to do.
#pragma once

#include <concepts>
#include <cstddef>
#include <type_traits>

#include "compiler.h"
#include "eigen.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

using Index = Eigen::Index;
using bfloat16 = Eigen::bfloat16;
using half = Eigen::half;

/// A row-major tensor that owns its memory.
template <typename T, int Rank>
using Tensor = Eigen::Tensor<T, Rank, Eigen::RowMajor>;

/// A row-major tensor in memory of somebody else; T may be const.
template <typename T, int Rank>
using TensorView = Eigen::TensorMap<Eigen::Tensor<T, Rank, Eigen::RowMajor>>;

/// Scalars that floating-point operators accept.
template <typename T>
concept FloatingScalar = std::same_as<T, float> || std::same_as<T, double> ||
                         std::same_as<T, bfloat16> || std::same_as<T, half>;

/// What an operator on T computes in: double for double, float for everything narrower.
template <typename T>
using compute_type = std::conditional_t<std::is_same_v<T, double>, double, float>;

namespace detail {

enum class TensorKind { other, row_major, column_major, strided };

// An argument that is no tensor gets a scalar that everything compiles with, so that the message of
// require_tensor_argument is the first error and not the last of a hundred.
template <typename X>
struct scalar_or_float {
  using type = float;
};
template <typename X>
  requires(FloatingScalar<typename X::Scalar> || std::is_arithmetic_v<typename X::Scalar>)
struct scalar_or_float<X> {
  using type = typename X::Scalar;
};

template <typename X>
struct tensor_traits {
  static constexpr TensorKind kind = TensorKind::other;
  static constexpr int rank = -1;
  using scalar = typename scalar_or_float<X>::type;
};

template <typename T, int Rank, int Options, typename Sizes>
struct tensor_traits<Eigen::Tensor<T, Rank, Options, Sizes>> {
  static constexpr TensorKind kind =
      (Options & Eigen::RowMajor) != 0 ? TensorKind::row_major : TensorKind::column_major;
  static constexpr int rank = Rank;
  using scalar = std::remove_const_t<T>;
};

template <typename X, int MapOptions, template <class> class MakePointer>
struct tensor_traits<Eigen::TensorMap<X, MapOptions, MakePointer>>
    : tensor_traits<std::remove_const_t<X>> {};

template <typename>
inline constexpr bool always_false = false;

template <int Rank, typename X>
constexpr void require_tensor_argument() {
  using traits = tensor_traits<std::remove_cvref_t<X>>;
  static_assert(
      traits::kind != TensorKind::other,
      "eigenformer: this argument is neither an ef::Tensor nor an ef::TensorView. Evaluate an "
      "Eigen expression into an "
      "ef::Tensor<T, Rank> first, or wrap memory of your own in an ef::TensorView<T, Rank>. Heads "
      "within a wider tensor (a chip of one) are ef::heads_of(tensor, offset, dimension), where "
      "the "
      "argument takes an ef::HeadsView.");
  static_assert(traits::kind != TensorKind::column_major,
                "eigenformer: this tensor is column-major, which is Eigen's default. Declare it as "
                "ef::Tensor<T, Rank> (row-major), "
                "or assign tensor.swap_layout().shuffle(reversed dimensions) to one.");
  static_assert(
      traits::kind != TensorKind::strided,
      "eigenformer: this argument cannot be an ef::HeadsView; copy it into an ef::Tensor.");
  static_assert(traits::kind == TensorKind::other || Rank < 0 || traits::rank == Rank,
                "eigenformer: this tensor has the wrong rank for this argument; the operator's "
                "header gives the shapes.");
}

/// For the types that follow an argument that was refused.
template <int Rank>
inline constexpr int rank_or_one = Rank < 1 ? 1 : Rank;

template <int Rank, typename X>
Eigen::DSizes<Index, Rank> sizes_of(const X& x) {
  Eigen::DSizes<Index, Rank> sizes;
  for (int d = 0; d < Rank; ++d)
    sizes[d] = static_cast<Index>(x.dimension(static_cast<std::size_t>(d)));
  return sizes;
}

}  // namespace detail

/// An ef::Tensor or ef::TensorView of any scalar and rank.
template <typename X>
concept RowMajorTensor =
    detail::tensor_traits<std::remove_cvref_t<X>>::kind == detail::TensorKind::row_major;

namespace detail {

/// An ef::Tensor rather than a view: its elements end with it.
template <typename X>
inline constexpr bool owns_its_elements =
    RowMajorTensor<X> &&
    std::is_same_v<std::remove_cvref_t<X>,
                   Tensor<typename tensor_traits<std::remove_cvref_t<X>>::scalar,
                          tensor_traits<std::remove_cvref_t<X>>::rank>>;

}  // namespace detail

/// Number of dimensions of a tensor type, -1 where X is no tensor.
template <typename X>
inline constexpr int rank_of = detail::tensor_traits<std::remove_cvref_t<X>>::rank;

/// Element type of a tensor type without const; of something else no promise.
template <typename X>
using scalar_of = typename detail::tensor_traits<std::remove_cvref_t<X>>::scalar;

/// Read-only view of an input argument of the given rank.
template <int Rank, typename X>
auto input_view(const X& x) {
  detail::require_tensor_argument<Rank, X>();
  if constexpr (RowMajorTensor<X> && rank_of<X> == Rank) {
    const Eigen::DSizes<Index, Rank> sizes = detail::sizes_of<Rank>(x);
    return TensorView<const scalar_of<X>, Rank>(x.data(), sizes);
  } else {  // keeps the errors after the message above few
    return TensorView<const scalar_of<X>, detail::rank_or_one<Rank>>(
        nullptr, Eigen::DSizes<Index, detail::rank_or_one<Rank>>{});
  }
}

/// Writable view of an output argument of the given rank.
template <int Rank, typename X>
auto output_view(X& x) {
  detail::require_tensor_argument<Rank, X>();
  if constexpr (RowMajorTensor<X> && rank_of<X> == Rank) {
    static_assert(!std::is_const_v<std::remove_pointer_t<decltype(x.data())>>,
                  "eigenformer: the output is read-only; pass a mutable ef::Tensor or an "
                  "ef::TensorView of non-const T.");
    const Eigen::DSizes<Index, Rank> sizes = detail::sizes_of<Rank>(x);
    return TensorView<scalar_of<X>, Rank>(x.data(), sizes);
  } else {
    return TensorView<scalar_of<X>, detail::rank_or_one<Rank>>(
        nullptr, Eigen::DSizes<Index, detail::rank_or_one<Rank>>{});
  }
}

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
