/// \file
/// Rows of a matrix on the host, shared out to the threads of whatever device is at hand: for work
/// that is no operator's, such as reading a model's file.
#pragma once

#include "parallel.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

/// body(begin, end) for ranges of rows of so many numbers, on the threads of a device, or of a
/// GPU's on the calling one. The body must not throw.
template <typename D, typename Body>
void for_ranges_of_rows(const D& device, Index rows, Index columns, Body&& body) {
  if constexpr (CpuDevice<D>)
    cpu::parallel_for(device, rows, cpu::Cost{columns},
                      [&](Index begin, Index end, int) { body(begin, end); });
  else
    body(Index{0}, rows);
}

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
