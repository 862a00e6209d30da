/// \file
/// Slots of KV caches that hold no row: tests fill them, for nothing may read them.
#pragma once

#include <algorithm>

#include <eigenformer/kv_cache.h>

#include "compare.h"

namespace eigenformer_test {

/// Fills one slot of a cache, of keys and of values, with NaN (with -128 for int8, and its scales
/// with NaN). What a source points to is the cache's, and writable.
template <typename Storage>
void poison_slot(const ef::KvSource<Storage>& source, Index b, Index h, Index j) {
  constexpr bool is_int8 = std::is_same_v<Storage, std::int8_t>;
  const Storage poison =
      is_int8 ? std::numeric_limits<Storage>::min() : std::numeric_limits<Storage>::quiet_NaN();
  std::fill_n(const_cast<Storage*>(source.key_row(b, h, j)), source.head_dim, poison);
  std::fill_n(const_cast<Storage*>(source.value_row(b, h, j)), source.value_width(), poison);
  if constexpr (is_int8)
    for (const float* scale : {source.key_scale_row(b, h, j), source.value_scale_row(b, h, j)})
      *const_cast<float*>(scale) = NAN;
}

/// Fills every slot past the length with NaN, scales included: nothing may read them.
template <typename T, typename Storage>
void poison_unused(ef::KvCache<T, Storage>& cache, Index layer) {
  const auto source = cache.source(layer);
  for (Index b = 0; b < source.batch; ++b)
    for (Index h = 0; h < source.kv_heads; ++h)
      for (Index j = cache.length(layer); j < cache.capacity(layer); ++j)
        poison_slot(source, b, h, j);
}

}  // namespace eigenformer_test
