/// \file
/// The causal mask in plain loops: what the tests and a doubting user compare with.
#pragma once

#include <limits>

#include "../causal_mask.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace reference {

inline Tensor<double, 3> causal_mask(Index query_length, Index batch, Index key_length,
                                     const CausalMaskOptions& options) {
  Tensor<double, 3> mask(batch, query_length, key_length);
  const bool shared = static_cast<Index>(options.segment_ids.size()) == key_length;
  for (Index b = 0; b < batch; ++b)
    for (Index i = 0; i < query_length; ++i)
      for (Index j = 0; j < key_length; ++j) {
        const Index p = options.query_offset + i;
        bool visible = j <= p && (options.window == 0 || j > p - options.window);
        visible = visible || j < options.prefix_length;
        if (!options.segment_ids.empty()) {
          const auto* ids = options.segment_ids.data() + (shared ? 0 : b * key_length);
          visible = visible && p >= 0 && p < key_length && ids[p] == ids[j];
        }
        mask(b, i, j) = visible ? 0.0 : -std::numeric_limits<double>::infinity();
      }
  return mask;
}

}  // namespace reference
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
