/// \file
/// The options of attention, and the type of its log-sum-exp output.
#pragma once

#include <array>
#include <optional>
#include <span>

#include "../core/check.h"
#include "../core/tensor.h"
#include "../core/values.h"
#include "masks.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

/// Where attention writes log(sum of exp of the scores), or reads its gradient, made implicitly
/// from an ef::Tensor or ef::TensorView of the compute type (float, or double for double inputs).
/// The shape is that of the output without its last dimension, heads before rows:
///   (batch, heads, seq) for (batch, seq, heads, head_dim); (batch, seq) for (batch, seq, d_model);
///   (heads, total_tokens) for packed sequences.
template <bool Written>
class LogSumExpView {
  template <typename T>
  using Element = std::conditional_t<Written, T, const T>;

 public:
  constexpr LogSumExpView() = default;
  template <typename X>
    requires(RowMajorTensor<X> && !std::is_same_v<std::remove_cvref_t<X>, LogSumExpView>)
  LogSumExpView(X&& tensor) {
    using T = scalar_of<X>;
    static_assert(std::is_lvalue_reference_v<X> || !detail::owns_its_elements<X>,
                  "eigenformer: log_sum_exp, or its gradient, is a tensor that ends with the "
                  "expression. Give it a name first.");
    static_assert(std::is_same_v<T, float> || std::is_same_v<T, double>,
                  "eigenformer: log_sum_exp is a tensor of float or double");
    static_assert(
        rank_of<X> == 2 || rank_of<X> == 3,
        "eigenformer: log_sum_exp is (batch, heads, seq), (batch, seq) or (heads, tokens)");
    auto view = [&] {
      if constexpr (Written)
        return output_view<rank_of<X>>(tensor);
      else
        return input_view<rank_of<X>>(tensor);
    }();
    if constexpr (std::is_same_v<T, float>)
      floats_ = view.data();
    else
      doubles_ = view.data();
    rank_ = rank_of<X>;
    for (int d = 0; d < rank_of<X>; ++d)
      sizes_[static_cast<std::size_t>(d)] = view.dimension(static_cast<std::size_t>(d));
    present_ = true;
  }

  bool present() const { return present_; }

  /// The memory, nullptr where none was given. Throws where scalar or shape are not those given.
  template <typename C, std::size_t Rank>
  Element<C>* checked(std::string_view operation, const std::array<Index, Rank>& sizes) const {
    constexpr std::string_view what = Written ? "log_sum_exp" : "log_sum_exp_gradient";
    if (!present_) return nullptr;
    constexpr bool wide = std::is_same_v<C, double>;
    detail::require_that(wide == (doubles_ != nullptr || floats_ == nullptr) || empty(), operation,
                         what, " is a tensor of ",
                         wide ? "float, expected double" : "double, expected float");
    bool same = rank_ == static_cast<int>(Rank);
    for (std::size_t d = 0; d < Rank; ++d) same = same && sizes_[d] == sizes[d];
    if (!same)
      detail::require_that(false, operation, what, " has shape (", sizes_[0], ", ", sizes_[1],
                           rank_ == 3 ? ", " + std::to_string(sizes_[2]) : "", "), expected ",
                           detail::ShapeText<Rank>{sizes});
    if constexpr (wide)
      return doubles_;
    else
      return floats_;
  }

 private:
  bool empty() const { return sizes_[0] == 0 || sizes_[1] == 0 || (rank_ == 3 && sizes_[2] == 0); }

  Element<float>* floats_ = nullptr;
  Element<double>* doubles_ = nullptr;
  std::array<Index, 3> sizes_{};
  int rank_ = 0;
  bool present_ = false;
};

using LogSumExpOutput = LogSumExpView<true>;
using LogSumExpGradient = LogSumExpView<false>;

/// Values are host memory: a container with a name is viewed, a temporary or a braced list is owned
/// (core/values.h).
struct AttentionOptions {
  /// query at position p sees keys j <= p; positions are aligned at the end, see attention.h
  bool causal = false;
  /// with causal: the w most recent keys, the query's own included (j > p - w); without: keys at a
  /// distance of w at most (|j - p| <= w); 0 means no window
  Index window = 0;
  /// c > 0: scores become c * tanh(score / c) (Gemma 2) before ALiBi and the mask; 0 means none
  float softcap = 0;
  /// factor on Q K^T, any finite number; none: 1 / sqrt(head_dim)
  std::optional<float> scale = {};
  /// instead of window: keys p - window_left <= j <= p + window_right; -1 means no limit. With
  /// causal no key after p is seen whatever window_right is
  Index window_left = -1;
  Index window_right = -1;
  /// one per head: adds slope * (j - p) to the score; see ef::alibi_slopes
  Values<float> alibi_slopes = {};
  /// of float, added to the score after softcap and ALiBi; -infinity: the key is not seen
  ScoreView<float> bias = {};
  /// of bool or std::uint8_t; false or 0: the key is not seen. It hides keys, it shows none that
  /// causal or a window hide
  ScoreView<std::uint8_t> mask = {};
  /// a mask of bits for token trees, the same for all heads: bit j of a row says whether it sees
  /// key bit_mask_first_keys[b] + j. Keys before that are seen as the other options say
  BitMaskView bit_mask = {};
  /// one per sequence; none: the position of its first query
  LengthSpan bit_mask_first_keys = {};
  /// one logit per head that joins maximum and denominator and has no value
  Values<float> sinks = {};
  /// leading keys visible to every query, whatever causal and windows say (prefix-LM)
  Index prefix_length = 0;
  /// a tensor that gets log(sum exp), for the backward pass or for merging (attention/merge.h)
  LogSumExpOutput log_sum_exp = {};
  /// Ragged queries: row b has query_lengths[b] queries, the last ones of its sequence; later rows
  /// are padding and give zeros.
  LengthSpan query_lengths = {};
  /// backward only: gets the gradient of the sinks, one per head
  std::span<float> sinks_gradient = {};
  /// backward only: the gradient of the loss by log_sum_exp, where it takes part in it (results
  /// that are merged, a z-loss)
  LogSumExpGradient log_sum_exp_gradient = {};
};

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
