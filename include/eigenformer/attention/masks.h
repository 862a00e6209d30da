/// \file
/// What attention is given for each pair of query row and key: a bias, a mask, or a mask of bits.
/// They are views: the memory must live as long as the options, and is the device's on CUDA.
#pragma once

#include <array>
#include <cstdint>
#include <type_traits>

#include "../core/check.h"
#include "../core/tensor.h"
#include "../problem/score_rule.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

/// What may be viewed by options: a tensor that ends with the expression may not.
template <typename X>
inline constexpr bool may_be_viewed = std::is_lvalue_reference_v<X> || !owns_its_elements<X>;

}  // namespace detail

/// Elements (batch, heads, rows, keys), each size that of the call or 1, which serves all:
///   rows   those of the query tensor: of a sequence, or where queries are packed of all sequences
///          one after the other; padding rows are there too, and not read
///   keys   positions in the sequence, in a cache as well: at least as many as the longest sequence
///          has keys (a buffer may be longer); not read where causal, window or length hide the key
///
/// Made implicitly from a tensor (rows, keys), (batch, rows, keys) as create_causal_mask makes it
/// (for PyTorch and ONNX the first of three is heads: give all four), or (batch, heads, rows,
/// keys); or from a pointer, four sizes and four strides in elements, which may be 0 or negative.
template <typename T>
class ScoreView {
 public:
  constexpr ScoreView() = default;
  template <typename X>
    requires(RowMajorTensor<X>)
  ScoreView(X&& tensor) {
    constexpr int rank = rank_of<X>;
    static_assert(rank >= 2 && rank <= 4,
                  "eigenformer: bias and mask are (rows, keys), (batch, rows, keys) or (batch, "
                  "heads, rows, keys)");
    static_assert(detail::may_be_viewed<X>,
                  "eigenformer: bias and mask are viewed, and this tensor ends with the "
                  "expression. Give it a name first.");
    const auto view = input_view<rank>(tensor);
    constexpr std::array<int, 4> dimension = rank == 2   ? std::array{-1, -1, 0, 1}
                                             : rank == 3 ? std::array{0, -1, 1, 2}
                                                         : std::array{0, 1, 2, 3};
    Index stride = 1;
    for (std::size_t d = 4; d-- > 0;) {
      if (dimension[d] < 0) continue;
      sizes_[d] = view.dimension(static_cast<std::size_t>(dimension[d]));
      strides_[d] = stride;
      stride = detail::checked_product(stride, sizes_[d], "attention", "bias or mask");
    }
    data_ = element(view.data());
    present_ = true;
  }
  template <typename U>
  ScoreView(const U* data, const std::array<Index, 4>& sizes, const std::array<Index, 4>& strides)
      : data_(element(data)), sizes_(sizes), strides_(strides), present_(true) {}

  bool present() const { return present_; }
  /// Of (batch, heads, rows, keys).
  const std::array<Index, 4>& sizes() const { return sizes_; }
  /// 0 where the size is 1.
  Index stride(std::size_t d) const { return sizes_[d] == 1 ? 0 : strides_[d]; }
  const T* data() const { return data_; }

 private:
  template <typename U>
  static const T* element(const U* data) {
    static_assert(
        std::is_same_v<T, U> || (std::is_same_v<T, std::uint8_t> && std::is_same_v<U, bool>),
        "eigenformer: a bias is of float, a mask of bool or std::uint8_t");
    return reinterpret_cast<const T*>(data);
  }

  const T* data_ = nullptr;
  std::array<Index, 4> sizes_{1, 1, 1, 1}, strides_{};
  bool present_ = false;
};

/// Rows of 64-bit words, those of all sequences one after the other: made implicitly from a tensor
/// of std::uint64_t (rows, words) or (batch, rows, words), or from a pointer and these sizes. Bit j
/// % 64, from the lowest on, of word j / 64 of a row says whether it sees key first_keys[b] + j.
class BitMaskView {
 public:
  constexpr BitMaskView() = default;
  template <typename X>
    requires(RowMajorTensor<X> && (rank_of<X> == 2 || rank_of<X> == 3))
  BitMaskView(X&& tensor) {
    static_assert(std::is_same_v<scalar_of<X>, std::uint64_t>,
                  "eigenformer: a bit mask is a tensor of std::uint64_t");
    static_assert(detail::may_be_viewed<X>,
                  "eigenformer: a bit mask is viewed, and this tensor ends with the expression. "
                  "Give it a name first.");
    const auto view = input_view<rank_of<X>>(tensor);
    rows_ = view.dimension(0);
    if constexpr (rank_of<X> == 3)
      rows_ = detail::checked_product(rows_, view.dimension(1), "attention", "bit_mask");
    words_ = view.data();
    words_per_row_ = view.dimension(rank_of<X> - 1);
    present_ = true;
  }
  BitMaskView(const std::uint64_t* words, Index rows, Index words_per_row)
      : words_(words), rows_(rows), words_per_row_(words_per_row), present_(true) {}

  bool present() const { return present_; }
  const std::uint64_t* words() const { return words_; }
  Index rows() const { return rows_; }
  Index words_per_row() const { return words_per_row_; }

 private:
  const std::uint64_t* words_ = nullptr;
  Index rows_ = 0, words_per_row_ = 0;
  bool present_ = false;
};

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
