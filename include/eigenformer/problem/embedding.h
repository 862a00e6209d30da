/// \file
/// What an embedding asks for, and its gradient.
#pragma once

#include <cstdint>

#include "../core/rows.h"
#include "packed_weight.h"

namespace eigenformer {
inline namespace EIGENFORMER_VERSION_NAMESPACE {

namespace problem {

/// A checked request: pointers and sizes only; ids are in [0, vocab), where the host could look:
/// they are memory of the backend.
template <typename Y, typename T, typename Id>
struct Embedding {
  using compute = detail::common_compute_type<Y, T>;
  Y* y;            // (tokens, features)
  const Id* ids;   // (tokens)
  const T* table;  // (vocab, features)
  Index tokens, features, vocab;
};

/// Rows of an INT8 table, each times its scale.
template <typename Y, typename Id>
struct Int8Embedding {
  using compute = compute_type<Y>;
  Y* y;                      // (tokens, features)
  const Id* ids;             // (tokens)
  const std::int8_t* table;  // (vocab, features)
  const float* scales;       // (vocab)
  Index tokens, features, vocab;
};

/// Rows of a packed weight, int8 times their scales: a head that is the embedding too.
template <typename Y, typename S, typename Id>
struct PackedEmbedding {
  static constexpr bool kUsesTiles = true;  // as the packing does: both see one layout
  using compute = std::conditional_t<std::is_same_v<S, std::int8_t>, compute_type<Y>,
                                     detail::common_compute_type<Y, S>>;
  Y* y;           // (tokens, features)
  const Id* ids;  // (tokens)
  PackedPanels<const S> table;
  Index tokens;
};

template <typename G, typename GY, typename Id>
struct EmbeddingBackward {
  using compute = detail::common_compute_type<G, GY>;
  G* grad_table;     // (vocab, features), added to
  const GY* grad_y;  // (tokens, features)
  const Id* ids;     // (tokens)
  Index tokens, features, vocab;
};

}  // namespace problem
}  // namespace EIGENFORMER_VERSION_NAMESPACE
}  // namespace eigenformer
