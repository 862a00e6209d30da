/// \file
/// The one decision to write around the caches: plain stores read each line before they write it,
/// for nothing where the line leaves the caches before its reader comes.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "../../core/tensor.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

/// What a call reads while it writes. It needs two thresholds: a mask, for which nothing is read,
/// has a last-level cache of 32 MiB for itself, and written and then read is faster through it up
/// to 12 MiB (Zen 3: 4 MiB in 0.37 ms, around it 0.46; 16 MiB in 2.20 and 1.91 ms; Zen 4 breaks
/// even at 16 MiB). A product's or a quantizer's result shares the caches with operands of several
/// times its size.
enum class ReadsBeside { nothing, operands };
constexpr Index streaming_threshold(ReadsBeside beside) {
  return Index{beside == ReadsBeside::nothing ? 16 : 4} << 20;
}

/// Whether a result of `bytes` at `to` is written around the caches: where it is large, and each of
/// its pieces, of these many bytes, is whole units of what one store writes.
inline bool written_around_caches(const void* to, Index bytes, ReadsBeside beside, Index unit = 1,
                                  std::initializer_list<Index> pieces = {}) {
  bool whole = reinterpret_cast<std::uintptr_t>(to) % static_cast<std::uintptr_t>(unit) == 0;
  for (const Index piece : pieces) whole = whole && piece % unit == 0;
  return whole && bytes > streaming_threshold(beside);
}

/// f(true_type or false_type): whether its stores go around the caches. Fences behind it.
template <typename V, typename F>
EIGENFORMER_INLINE void with_streaming(bool around_caches, F&& f) {
  if (!around_caches) return f(std::false_type{});
  f(std::true_type{});
  V::fence_streaming();
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
