/// \file
/// The arithmetic of symmetric INT8 on one line of numbers, shared by quantization and by products with int8 weights:
///
///   scale = max|w| / 127 (1 where all are zero)      q = clamp(round_half_to_even(w / scale), -127, 127)
///
/// One pass finds the maximum; NaN and infinity are found in it for the price of a multiply-add in the shadow of the loads.
#pragma once

#include <atomic>
#include <cmath>
#include <limits>

#include "../core/device.h"
#include "simd/simd.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

template <typename C>
struct Magnitude {
  C largest;    // max|w| over the numbers that are not NaN
  bool finite;  // neither NaN nor infinity among them
};

/// Fetches what a stream will come to into L2. 8 KiB ahead: arithmetic between the loads keeps few of them in flight
/// (8192 x 8192 floats by row on Zen 5: 13 ms with hardware prefetchers alone, 9 with this). Past the end of an array it is
/// harmless.
template <typename T>
EIGENFORMER_INLINE void prefetch_ahead(const T* line) {
  constexpr std::uintptr_t kBytes = 8192;
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<std::uintptr_t>(line) + kBytes), 0, 2);
}

/// The running maximum over vectors, in four chains that hide each other's latency.
template <typename V>
class MagnitudeChains {
 public:
  using scalar = typename V::scalar;
  static constexpr int chains = 4;
  static constexpr Index step = chains * V::lanes;

  template <typename T>
  EIGENFORMER_INLINE void add_step(const T* line) {
    for (int i = 0; i < chains; ++i) {
      prefetch_ahead(line + i * V::lanes);
      add(i, V::load(line + i * V::lanes));
    }
  }
  template <typename T>
  EIGENFORMER_INLINE void add_rest(const T* line, Index count) {
    for (Index at = 0; at < count; at += V::lanes)
      add(0, V::load_partial(line + at, static_cast<int>(std::min<Index>(V::lanes, count - at))));
  }
  EIGENFORMER_INLINE Magnitude<scalar> result() const {
    const V all = (residue_[0] + residue_[1]) + (residue_[2] + residue_[3]);
    return {reduce_max(max(max(largest_[0], largest_[1]), max(largest_[2], largest_[3]))), is_nan(all).bits() == 0};
  }

 private:
  EIGENFORMER_INLINE void add(int i, V w) {
    largest_[i] = max(abs(w), largest_[i]);  // in this order a NaN leaves the maximum
    residue_[i] = fma(w, V::zero(), residue_[i]);
  }
  V largest_[chains] = {V::zero(), V::zero(), V::zero(), V::zero()};
  V residue_[chains] = {V::zero(), V::zero(), V::zero(), V::zero()};  // w * 0 is 0, or NaN for good where w is not finite
};

template <typename Isa, typename T>
Magnitude<compute_type<T>> magnitude(const T* line, Index count) {
  using Chains = MagnitudeChains<simd::Vec<compute_type<T>, Isa>>;
  Chains chains;
  Index at = 0;
  for (; at + Chains::step <= count; at += Chains::step) chains.add_step(line + at);
  chains.add_rest(line + at, count - at);
  return chains.result();
}

/// Never 0: where max|w| is so small that the quotient rounds to 0, the smallest float serves. Infinite only for doubles past
/// float's range.
template <typename C>
float int8_scale(C largest) {
  if (largest == C(0)) return 1.0f;
  const float scale = static_cast<float>(largest / C(127));
  return scale > 0.0f ? scale : std::numeric_limits<float>::denorm_min();
}

/// w / scale, correctly rounded: w * (1 / scale) alone would round 127.5 and its like the other way. For scales away from the ends
/// of float's range the quotient comes from the correctly rounded reciprocal and two corrections by its exact remainder, which
/// gives the bits of a division (Markstein, "Computation of elementary functions on the IBM RISC System/6000 processor", 1990);
/// elsewhere, and in double, it is a division.
template <typename V>
class Quotient {
 public:
  explicit EIGENFORMER_INLINE Quotient(float scale)
      : divisor_(V::set1(static_cast<typename V::scalar>(scale))),
        reciprocal_(V::set1(static_cast<typename V::scalar>(1) / static_cast<typename V::scalar>(scale))),
        exact_(isa::kHasFma && sizeof(typename V::scalar) == 4 && scale > 0x1p-60f && scale < 0x1p60f) {}

  /// f(quotient of w) with the choice made once: quotient is a function of a vector.
  template <typename F>
  EIGENFORMER_INLINE void with(F&& f) const {
    const V divisor = divisor_, reciprocal = reciprocal_;
    if (exact_) {
      const V negative = V::zero() - divisor;
      f([=](V w) {
        V q = w * reciprocal;
        q = fma(fma(q, negative, w), reciprocal, q);
        return fma(fma(q, negative, w), reciprocal, q);
      });
    } else {
      f([=](V w) { return w / divisor; });
    }
  }

 private:
  V divisor_, reciprocal_;
  bool exact_;
};

/// Values of vectors and of a tail. Streaming stores around the caches; `to` is then aligned to a vector's bytes of int8.
template <bool Streaming, typename V>
EIGENFORMER_INLINE void store_values(V quotient, std::int8_t* to) {
  const V value = min(V::set1(127), max(V::set1(-127), round(quotient)));
  if constexpr (Streaming)
    value.store_streaming(to);
  else
    value.store(to);
}

template <typename Isa, bool Streaming = false, typename T>
void quantize_line(const T* line, Index count, float scale, std::int8_t* to) {
  using V = simd::Vec<compute_type<T>, Isa>;
  Quotient<V>(scale).with([&](auto quotient) {
    Index at = 0;
    for (; at + V::lanes <= count; at += V::lanes) store_values<Streaming>(quotient(V::load(line + at)), to + at);
    const int rest = static_cast<int>(count - at);
    if (rest > 0)
      min(V::set1(127), max(V::set1(-127), round(quotient(V::load_partial(line + at, rest))))).store_partial(to + at, rest);
  });
}

/// quantize_line of a line that is in cache, and the magnitude of the next one, which comes from memory: in one loop, so that
/// memory never waits for arithmetic.
template <typename Isa, bool Streaming, typename T>
Magnitude<compute_type<T>> quantize_and_measure(const T* line, Index count, float scale, std::int8_t* to, const T* next) {
  using V = simd::Vec<compute_type<T>, Isa>;
  MagnitudeChains<V> chains;
  const Index whole = count / MagnitudeChains<V>::step * MagnitudeChains<V>::step;
  Quotient<V>(scale).with([&](auto quotient) {
    for (Index at = 0; at < whole; at += MagnitudeChains<V>::step) {
      chains.add_step(next + at);
      for (Index v = at; v < at + MagnitudeChains<V>::step; v += V::lanes)
        store_values<Streaming>(quotient(V::load(line + v)), to + v);
    }
  });
  quantize_line<Isa>(line + whole, count - whole, scale, to + whole);
  chains.add_rest(next + whole, count - whole);
  return chains.result();
}

/// The first number, in memory order, that has no int8 scale (NaN, infinity, a double past float's range), or count.
template <typename T>
Index first_not_quantizable(const T* numbers, Index count) {
  using C = compute_type<T>;
  for (Index i = 0; i < count; ++i) {
    const C w = static_cast<C>(numbers[i]);
    if (!std::isfinite(w) || !std::isfinite(int8_scale(std::abs(w)))) return i;
  }
  return count;
}

/// scales[row][group] of a (rows, columns) matrix cut into groups along the row; false where a number is not quantizable.
template <typename Isa, CpuDevice D, typename T>
bool group_scales(Isa, const D& device, const T* matrix, Index rows, Index columns, Index group, float* scales) {
  const Index groups = (columns + group - 1) / group;
  std::atomic<bool> quantizable{true};
  parallel_for(device, rows, 1 + 65536 / (columns + 1), [&](Index first, Index last, int) {
    for (Index r = first; r < last; ++r)
      for (Index g = 0; g < groups; ++g) {
        const auto found = magnitude<Isa>(matrix + r * columns + g * group, std::min(group, columns - g * group));
        const float scale = int8_scale(found.largest);
        scales[r * groups + g] = scale;
        if (!found.finite || !std::isfinite(scale)) quantizable.store(false, std::memory_order_relaxed);
      }
  });
  return quantizable.load(std::memory_order_relaxed);
}

/// The scale of a token: NaN where the token holds NaN or infinity, and then all its values are 0, so that the damage shows in its
/// own outputs (all NaN) and nowhere else.
template <typename Isa, typename T>
float activation_scale(const T* line, Index count) {
  const auto found = magnitude<Isa>(line, count);
  const float scale = int8_scale(found.largest);
  return found.finite && std::isfinite(scale) ? scale : std::numeric_limits<float>::quiet_NaN();
}

template <typename Isa, bool Streaming = false, typename T>
void quantize_activation_line(const T* line, Index count, float scale, std::int8_t* to) {
  if (std::isnan(scale))
    std::fill_n(to, count, std::int8_t{0});
  else
    quantize_line<Isa, Streaming>(line, count, scale, to);
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
