/// \file
/// The KV cache as the notebook has it: every update concatenates, in plain loops. What the tests
/// and a doubting user compare with.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <map>

#include "../core/tensor.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace reference {

/// old (batch, m, kv_heads, head_dim) and then added (batch, n, kv_heads, head_dim), along the
/// positions.
template <typename T>
Tensor<T, 4> concatenate_positions(const Tensor<T, 4>& old, const Tensor<T, 4>& added) {
  const Index m = old.dimension(1), n = added.dimension(1);
  Tensor<T, 4> result(added.dimension(0), m + n, added.dimension(2), added.dimension(3));
  for (Index b = 0; b < added.dimension(0); ++b)
    for (Index j = 0; j < m + n; ++j)
      for (Index h = 0; h < added.dimension(2); ++h)
        for (Index d = 0; d < added.dimension(3); ++d)
          result(b, j, h, d) = j < m ? old(b, j, h, d) : added(b, j - m, h, d);
  return result;
}

template <typename T>
struct KvCache {
  struct Layer {
    Tensor<T, 4> keys, values;
  };
  std::map<Index, Layer> layers;
};

template <typename T>
void update_kv_cache(KvCache<T>& cache, const Tensor<T, 4>& new_keys,
                     const Tensor<T, 4>& new_values, Index layer_idx) {
  const auto found = cache.layers.find(layer_idx);
  if (found == cache.layers.end()) {
    cache.layers[layer_idx] = {new_keys, new_values};
  } else {
    found->second.keys = concatenate_positions(found->second.keys, new_keys);
    found->second.values = concatenate_positions(found->second.values, new_values);
  }
}

/// What INT8 storage makes of a tensor: each row of the last dimension quantized with its own
/// scale, and back.
template <typename T, int Rank>
Tensor<T, Rank> through_int8(const Tensor<T, Rank>& x) {
  using C = compute_type<T>;
  Tensor<T, Rank> result = x;
  const Index width = x.dimension(Rank - 1);
  for (Index row = 0; width > 0 && row < x.size() / width; ++row) {
    const T* from = x.data() + row * width;
    C largest = 0;
    for (Index i = 0; i < width; ++i)
      largest = (std::max)(largest, std::fabs(static_cast<C>(from[i])));
    float scale = static_cast<float>(largest / C(127));
    if (scale == 0.0f) scale = largest == C(0) ? 1.0f : std::numeric_limits<float>::denorm_min();
    for (Index i = 0; i < width; ++i) {
      const C quotient = std::clamp(std::nearbyint(static_cast<C>(from[i]) / static_cast<C>(scale)),
                                    C(-127), C(127));
      const auto q = static_cast<std::int8_t>(quotient);
      result.data()[row * width + i] = static_cast<T>(static_cast<C>(q) * static_cast<C>(scale));
    }
  }
  return result;
}

}  // namespace reference
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
