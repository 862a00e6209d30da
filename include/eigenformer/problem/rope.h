/// \file
/// What rotary embedding asks for.
#pragma once

#include <cmath>

#include "../core/heads_view.h"
#include "../core/rows.h"

namespace eigenformer {
inline namespace EIGENFORMER_VERSION_NAMESPACE {

enum class RopeLayout {
  half_split,   ///< pairs (i, i + rotary_dim / 2): GPT-NeoX, Llama in Hugging Face's layout
  interleaved,  ///< pairs (2 i, 2 i + 1): the paper, GPT-J, Llama in Meta's layout
};

namespace problem {

/// Cosines and sines of one position: what a row of a table holds. Angles are exact to double; C is
/// the type they are rounded to.
struct RopeAngles {
  const double* inverse_frequencies;  // (rotary_dim / 2)
  Index rotary_dim;
  RopeLayout layout;
  double scale;
  double factor;  // multiplies cosines and sines

  EIGENFORMER_INLINE Index row_size() const {
    return layout == RopeLayout::half_split ? rotary_dim : 2 * rotary_dim;
  }

  template <typename C>
  EIGENFORMER_INLINE void write_row(double position, C* row) const {
    for (Index i = 0; i < rotary_dim / 2; ++i) {
      const double angle = position * scale * inverse_frequencies[i];
      const C c = static_cast<C>(std::cos(angle) * factor),
              s = static_cast<C>(std::sin(angle) * factor);
      if (layout == RopeLayout::half_split) {
        row[i] = c;
        row[i + rotary_dim / 2] = s;
      } else {
        row[2 * i] = row[2 * i + 1] = c;
        row[rotary_dim + 2 * i] = -s;
        row[rotary_dim + 2 * i + 1] = s;
      }
    }
  }
};

/// A checked request: pointers and sizes only.
template <typename Y, typename X>
struct Rope {
  using compute = detail::common_compute_type<Y, X>;
  Y* y;                    // (tokens, heads, head_dim)
  const X* x;              // (tokens, heads, head_dim)
  const Index* positions;  // (tokens)
  Index tokens, heads, head_dim;
  HeadStrides x_strides;
  RopeAngles angles;
  const compute* table;  // (positions, angles.row_size()), nullptr where rows are computed
  compute* rows;         // (workers, angles.row_size()) scratch where they are
  bool inverse;          // rotates back: the gradient
};

}  // namespace problem
}  // namespace EIGENFORMER_VERSION_NAMESPACE
}  // namespace eigenformer
