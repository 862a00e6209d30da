/// \file
/// A loop over vectors whose tail runs the code of its middle: the body is a template on how much
/// of a vector there is, so that an element has the same bits wherever in a row, a chunk or a
/// thread's share it stands.
///
///   for_each_vector<V>(begin, end, [&](Index at, auto part) { store(load<V>(x + at, part) * scale, y + at, part); });
#pragma once

#include "../simd/simd.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

struct WholeVector {};
struct PartOfVector {
  int lanes;  // 1 to V::lanes - 1
};

template <typename V, typename S>
EIGENFORMER_INLINE V load(const S* p, WholeVector) {
  return V::load(p);
}
template <typename V, typename S>
EIGENFORMER_INLINE V load(const S* p, PartOfVector part) {
  return V::load_partial(p, part.lanes);
}
/// The lanes that are not there read as `beyond`.
template <typename V, typename S>
EIGENFORMER_INLINE V load_or(const S* p, S, WholeVector) {
  return V::load(p);
}
template <typename V, typename S>
EIGENFORMER_INLINE V load_or(const S* p, S beyond, PartOfVector part) {
  alignas(64) S buffer[V::lanes];
  for (int i = 0; i < V::lanes; ++i) buffer[i] = i < part.lanes ? p[i] : beyond;
  return V::load(buffer);
}
template <typename V, typename S>
EIGENFORMER_INLINE void store(const V& v, S* p, WholeVector) {
  v.store(p);
}
template <typename V, typename S>
EIGENFORMER_INLINE void store(const V& v, S* p, PartOfVector part) {
  v.store_partial(p, part.lanes);
}

/// body(at, part) for at = begin, begin + V::lanes, ...: whole vectors, then what is left.
template <typename V, typename Body>
EIGENFORMER_INLINE void for_each_vector(Index begin, Index end, Body&& body) {
  Index at = begin;
  for (; end - at >= V::lanes; at += V::lanes) body(at, WholeVector{});
  if (at < end) body(at, PartOfVector{static_cast<int>(end - at)});
}

/// The same from 0 with `Ways` independent accumulators: body(at, part, k), k in turn, in an order
/// that count alone determines.
template <typename V, int Ways, typename Body>
EIGENFORMER_INLINE void for_each_vector_interleaved(Index count, Body&& body) {
  Index at = 0;
  for (; at + Ways * V::lanes <= count; at += Ways * V::lanes)
    for (int k = 0; k < Ways; ++k) body(at + k * V::lanes, WholeVector{}, k);
  int k = 0;
  for (; at + V::lanes <= count; at += V::lanes, ++k) body(at, WholeVector{}, k);
  if (at < count) body(at, PartOfVector{static_cast<int>(count - at)}, k);
}

/// Sum over [0, count) of what `add(accumulator, at, part)` adds to `zero`, in an order that count
/// alone determines: four interleaved partial sums hide the latency of the addition, and blocks of
/// 512 vectors are summed by themselves, so that 10^6 equal terms still have 5 digits in float. Sum
/// is V, or several of them with an operator+.
template <typename V, typename Sum, typename Add>
EIGENFORMER_INLINE Sum accumulate_vectors(Index count, const Sum& zero, Add&& add) {
  constexpr Index block = 512 * V::lanes;
  Sum total = zero;
  Index at = 0;
  do {
    const Index end = count - at > block ? at + block : count;
    Sum sums[4] = {zero, zero, zero, zero};
    for (; end - at >= 4 * V::lanes; at += 4 * V::lanes)
      for (int k = 0; k < 4; ++k) sums[k] = add(sums[k], at + k * V::lanes, WholeVector{});
    for_each_vector<V>(at, end, [&](Index i, auto part) { sums[0] = add(sums[0], i, part); });
    at = end;
    total = total + ((sums[0] + sums[1]) + (sums[2] + sums[3]));
  } while (at < count);
  return total;
}
template <typename V, typename Add>
EIGENFORMER_INLINE auto sum_over_vectors(Index count, Add&& add) {
  return reduce_add(accumulate_vectors<V>(count, V::zero(), add));
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
