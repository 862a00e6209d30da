/// \file
/// Rows whose squares or sums leave the range of their compute type. Kernels sum a row as it is;
/// only where the sum overflowed or fell among the denormals they do it again in a unit of the
/// row's own, a power of two near 1 / max|x|: x * unit is then exact and near 1. Ordinary rows cost
/// one comparison.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "../../problem/row_unit.h"
#include "copy.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

using problem::in_range;
using problem::unit_of;

template <typename V, typename X>
typename V::scalar row_unit(const X* x, Index count) {
  V largest = V::zero();
  for_each_vector<V>(0, count, [&](Index at, auto part) {
    largest = maximum(abs(load<V>(x + at, part)), largest);  // in this order a NaN leaves it
  });
  return unit_of(reduce_max(largest));
}

/// Whether any number of a row is not 0.
template <typename V, typename X>
bool any_nonzero(const X* x, Index count) {
  return sum_over_vectors<V>(count, [&](V sum, Index at, auto part) {
           return sum + abs(load<V>(x + at, part));
         }) != 0;
}

/// The unit 1 as a factor: nothing.
struct UnitOne {};
template <typename V>
EIGENFORMER_INLINE V operator*(const V& v, UnitOne) {
  return v;
}

/// f(factor): the vector of a unit, or UnitOne, so that ordinary rows multiply with nothing.
template <typename V, typename F>
EIGENFORMER_INLINE auto with_unit(typename V::scalar unit, F&& f) {
  if (unit == 1) [[likely]]
    return f(UnitOne{});
  return f(V::set1(unit));
}

/// A row of a gradient: run(unit, gradient_unit, unit / gradient_unit) as factors; zeros where unit
/// is 0, because the row takes no part.
template <typename V, typename G, typename Run>
void with_gradient_units(typename V::scalar unit, typename V::scalar gradient_unit, G* gradient,
                         Index count, Run&& run) {
  using C = typename V::scalar;
  if (unit == 1 && gradient_unit == 1) [[likely]]
    return run(UnitOne{}, UnitOne{}, UnitOne{});
  if (unit == 0) return fill_line(gradient, count, V::zero());
  const C largest = std::ldexp(C(1), std::numeric_limits<C>::max_exponent - 1);
  run(V::set1(unit), V::set1(gradient_unit), V::set1((std::min)(unit / gradient_unit, largest)));
}

/// v, with 0 in the lanes past the end.
template <typename V>
EIGENFORMER_INLINE V present(const V& v, WholeVector) {
  return v;
}
template <typename V>
EIGENFORMER_INLINE V present(const V& v, PartOfVector part) {
  typename V::scalar lanes[V::lanes];
  v.store(lanes);
  return V::load_partial(lanes, part.lanes);
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
