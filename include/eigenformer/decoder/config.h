/// \file
/// Shape of a Llama-style decoder (Touvron et al., "LLaMA", 2023).
#pragma once

#include <cstdint>
#include <limits>

#include "../core/check.h"
#include "../rope.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

struct DecoderConfig {
  Index vocabulary = 256;
  Index features = 128;  ///< width of the residual stream
  Index layers = 4;
  Index heads = 4;     ///< query heads
  Index kv_heads = 4;  ///< key and value heads; divides heads
  Index head_dim = 32;
  Index hidden = 384;  ///< width of the gated feed-forward
  float rope_base = 10000.0f;
  RopeLayout rope_layout = RopeLayout::half_split;
  float epsilon = 1e-5f;  ///< of RMSNorm

  /// Throws std::invalid_argument where a decoder of this shape cannot exist.
  void validate() const {
    constexpr auto name = "Decoder";
    constexpr Index most = (std::numeric_limits<std::int32_t>::max)();
    const auto positive = [&](Index value, const char* what) {
      detail::require_that(value > 0 && value <= most, name, what, " is ", value,
                           ", expected 1 to 2^31 - 1");
    };
    positive(vocabulary, "vocabulary");
    positive(features, "features");
    positive(layers, "layers");
    positive(heads, "heads");
    positive(kv_heads, "kv_heads");
    positive(head_dim, "head_dim");
    positive(hidden, "hidden");
    detail::require_that(heads <= most / head_dim, name, "heads is ", heads,
                         ", expected less than 2^31 features of all heads of ", head_dim);
    detail::require_that(heads % kv_heads == 0, name, "heads is ", heads,
                         ", expected a multiple of kv_heads, ", kv_heads);
    detail::require_that(head_dim % 2 == 0, name, "head_dim is ", head_dim,
                         ", expected an even number for the rotary embedding");
    detail::require_that(rope_base > 1.0f, name, "rope_base is ", rope_base,
                         ", expected more than 1");
    detail::require_that(epsilon > 0.0f, name, "epsilon is ", epsilon, ", expected more than 0");
  }
};

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
