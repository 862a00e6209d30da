/// \file
/// The loop of elementwise kernels: whole vectors, then one partial vector that goes through the same code, so that an element has
/// the same bits wherever the length of the array puts it.
#pragma once

#include "simd.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace simd {

/// Loads and stores all lanes.
template <typename V>
struct WholeVector {
  template <typename T>
  EIGENFORMER_INLINE V load(const T* p) const {
    return V::load(p);
  }
  template <typename T>
  EIGENFORMER_INLINE V load_or(const T* p, T /*beyond*/) const {
    return V::load(p);
  }
  template <typename T>
  EIGENFORMER_INLINE void store(V v, T* p) const {
    v.store(p);
  }
};

/// Loads and stores the first n lanes; the others read as zero, or as what load_or is given.
template <typename V>
struct PartialVector {
  int n;
  template <typename T>
  EIGENFORMER_INLINE V load(const T* p) const {
    return V::load_partial(p, n);
  }
  template <typename T>
  EIGENFORMER_INLINE V load_or(const T* p, T beyond) const {
    alignas(64) T buffer[V::lanes];
    for (int i = 0; i < V::lanes; ++i) buffer[i] = i < n ? p[i] : beyond;
    return V::load(buffer);
  }
  template <typename T>
  EIGENFORMER_INLINE void store(V v, T* p) const {
    v.store_partial(p, n);
  }
};

/// Calls body(i, part) for i = 0, V::lanes, ... below size; part is a WholeVector but for the last call, which may be a
/// PartialVector.
template <typename V, typename Body>
EIGENFORMER_INLINE void for_each_vector(Index size, Body&& body) {
  Index i = 0;
  for (; i + V::lanes <= size; i += V::lanes) body(i, WholeVector<V>{});
  if (i < size) body(i, PartialVector<V>{static_cast<int>(size - i)});
}

/// The same with a constant number of independent accumulators: body(i, part, k) for the k-th of Ways in turn.
template <typename V, int Ways, typename Body>
EIGENFORMER_INLINE void for_each_vector_interleaved(Index size, Body&& body) {
  Index i = 0;
  for (; i + Ways * V::lanes <= size; i += Ways * V::lanes)
    for (int k = 0; k < Ways; ++k) body(i + k * V::lanes, WholeVector<V>{}, k);
  int k = 0;
  for (; i + V::lanes <= size; i += V::lanes, ++k) body(i, WholeVector<V>{}, k);
  if (i < size) body(i, PartialVector<V>{static_cast<int>(size - i)}, k);
}

}  // namespace simd
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
