/// \file
/// What moves a line of numbers: conversion, scaling, copies, constants.
#pragma once

#include <cstring>
#include <type_traits>

#include "../../core/rows.h"
#include "loop.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

/// to = from, rounded once where To is narrower than V's scalar.
template <typename V, typename From, typename To>
EIGENFORMER_INLINE void convert_line(const From* from, To* to, Index count) {
  for_each_vector<V>(0, count,
                     [&](Index at, auto part) { store(load<V>(from + at, part), to + at, part); });
}

/// to = from * factor, one multiplication and one rounding.
template <typename V, typename From, typename To>
EIGENFORMER_INLINE void scale_line(const From* from, V factor, To* to, Index count) {
  for_each_vector<V>(0, count, [&](Index at, auto part) {
    store(load<V>(from + at, part) * factor, to + at, part);
  });
}

/// to = a * b.
template <typename V, typename A, typename B, typename To>
EIGENFORMER_INLINE void multiply_line(const A* a, const B* b, To* to, Index count) {
  for_each_vector<V>(0, count, [&](Index at, auto part) {
    store(load<V>(a + at, part) * load<V>(b + at, part), to + at, part);
  });
}

/// to = value.
template <typename V, typename To>
EIGENFORMER_INLINE void fill_line(To* to, Index count, V value) {
  for_each_vector<V>(0, count, [&](Index at, auto part) { store(value, to + at, part); });
}

/// to = from; bytes as they are where the scalars are the same.
template <typename Isa, typename From, typename To>
void copy_line(const From* from, To* to, Index count) {
  if constexpr (!std::is_same_v<From, To>)
    convert_line<simd::Vec<detail::common_compute_type<From, To>, Isa>>(from, to, count);
  else if (count > 0)
    std::memcpy(static_cast<void*>(to), from, static_cast<std::size_t>(count) * sizeof(To));
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
