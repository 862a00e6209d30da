/// \file
/// A function of the caller's as a loop over part of a row, with a signature that the caller's type
/// is not in. Loops carry the ISA's name: units of different flags may share the caller's type.
#pragma once

#include <span>

#include "device.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

template <typename C>
using RowFunction = void (*)(const void* object, Index row, Index first, std::span<C> values);

/// value = function(row, index, value) of a run of values, with the function inlined; `object` is
/// the function's address.
template <typename C, typename Function>
RowFunction<C> row_function() {
  return [](const void* object, Index row, Index first, std::span<C> values) {
    const auto& each = *static_cast<const Function*>(object);
    C* const x = values.data();
    const auto count = static_cast<Index>(values.size());
    for (Index i = 0; i < count; ++i) x[i] = static_cast<C>(each(row, first + i, x[i]));
  };
}

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
