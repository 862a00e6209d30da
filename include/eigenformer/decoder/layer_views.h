/// \file
/// The tensors of one layer of a decoder, wherever they come from.
#pragma once

#include <optional>

#include "../core/tensor.h"
#include "../linear.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

namespace detail {

template <typename W>
struct MatrixView {
  using type = TensorView<const W, 2>;
};
template <>
struct MatrixView<int4> {
  using type = Int4View;
};

/// The W of such a view.
template <typename View>
struct ScalarOfMatrix {
  using type = scalar_of<View>;
};
template <>
struct ScalarOfMatrix<Int4View> {
  using type = int4;
};
template <typename View>
using scalar_of_matrix = typename ScalarOfMatrix<View>::type;

}  // namespace detail

/// Tensors of one layer where they lie: W the scalar of matrices, (out, in) of each linear layer, N
/// that of vectors. W may be ef::int4: matrices are then four-bit values with their scales
/// (Int4View), and are packed as they are. A layer may be packed in several calls, each with some
/// of its tensors.
template <typename W, FloatingScalar N = W>
struct DecoderLayerViews {
  using Matrix = std::optional<typename detail::MatrixView<W>::type>;
  using Vector = std::optional<TensorView<const N, 1>>;

  Vector attention_norm = {};   ///< (features)
  Matrix query = {};            ///< (heads * head_dim, features); with key and value in one call
  Matrix key = {}, value = {};  ///< (kv_heads * head_dim, features)
  Matrix output = {};           ///< (features, heads * head_dim)
  Vector feed_forward_norm = {};
  Matrix gate = {}, up = {};  ///< (hidden, features), both in one call; a form without gates has up
  Matrix down = {};           ///< (features, hidden)
  // Of forms that have them (form.h).
  Vector attention_norm_bias = {}, feed_forward_norm_bias = {};
  Vector after_attention_norm = {}, after_feed_forward_norm = {};
  Vector query_norm = {}, key_norm = {};
  Vector query_norm_bias = {}, key_norm_bias = {};         ///< of QueryKeyNorm::layer_head, or none
  Vector query_bias = {}, key_bias = {}, value_bias = {};  ///< in one call, or none
  Vector output_bias = {};
  Vector gate_bias = {}, up_bias = {}, down_bias = {};
  Vector sinks = {};  ///< (heads)
  // Of layers with experts: gate, up, down and their biases are those of expert `expert`; where it
  // is -1 of the one that all tokens go through.
  Index expert = -1;
  Matrix router = {};             ///< (experts, features)
  Vector router_bias = {};        ///< (experts), of its logits
  Vector router_correction = {};  ///< (experts), added to scores for the choice alone
  Matrix shared_gate = {};        ///< (1, features)
};

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
