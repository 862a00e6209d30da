/// \file
/// Register tiles of the matrix product, in plain C++ and over `simd::Vec`: what every ISA falls
/// back to.
///
/// A product is sums(row, column) = sum over k of activation(row, k) * weight(column, k). Both
/// operands are packed first, in units of 32 bits (one float, two bfloat16 or half, four int8;
/// double has units of 64 bits), so that the inner loop is the same for all:
///
///   weights      [panel][step][column of the panel][k of the step]     a panel is `columns` weights rows wide
///   activations  [tile][step][unit of the step][row of the tile]       AMX: [tile][16 steps][row of the tile][step]
///
/// A dot is the arithmetic of one step, and has these members:
///
///   Stored, Unit, Sum           element of a packed weight, unit of the packed activations, scalar of a sum
///   rows, vectors, columns      largest register tile: rows x vectors; columns = vectors * lanes is the width of a panel
///   step, units                 k of one step, units of the activations in one step
///   fragment                    Stored elements that one vector of weights takes in one step
///   Accumulator, Fragment, Factor   registers: sums, weights of a step, broadcast activations of a step
///   zero() load(sums) store(sums, accumulator)
///   minus(offset) to_float(accumulator)   int8 only: all sums at -offset (modulo 2^32; unsigned weights only); sums as a Vec
///   weights(p) factor<Rows>(p)  load a Fragment; broadcast a Factor, unit u of which lies at p[u * Rows]
///   multiply_add(sum, fragment, factor)
///   unsigned_weights            int8 only: packed weights are w + 128 as bytes (for instructions that multiply unsigned by
///                               signed), and 128 times the sum of a row's activations is taken off that row's sums
///   keeps_float_sums            of groups only, where it is there: registers hold the float sums of a tile beside its exact ones
///
/// Every sum is one chain over k in ascending order, from zero or from what the sums held: cutting
/// k into blocks (and storing the sums between them) changes no bit, and neither do the rows and
/// columns beside it. AMX dots have tile_products of their own (amx.h) instead of registers, and
/// take steps 16 at a time (`steps_at_once`).
///
/// Where a few activations meet int8 weights once, packing would cost more than the product. A line
/// dot multiplies rows of weights where they lie, a vector of k at a time, exactly: in the end the
/// sums of the dots above, whatever the order.
///
///   lanes, width                sums of an accumulator, k that one load of weights takes
///   Activation                  what an int8 activation is prepared to, one after the other
///   Weights, Accumulator        registers
///   zero() weights(p) multiply_add(accumulator, weights, activations)
///   totals(accumulators, sums)  `lanes` accumulators, each to its total
///   unsigned_weights            as above: w + 128, which weights(p) makes of w
#pragma once

#include <cstring>

#include "../simd/simd.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace tile {

/// f(integral_constant 0), ..., f(integral_constant N - 1): unrolled by construction, so that
/// arrays of registers stay in registers.
template <int N, typename F>
EIGENFORMER_INLINE void unroll(F&& f) {
  [&]<int... Is>(std::integer_sequence<int, Is...>) {
    (f(std::integral_constant<int, Is>{}), ...);
  }(std::make_integer_sequence<int, N>{});
}

struct Shape {
  int rows, vectors;
};

/// Steps of a packed panel come in multiples of this, zeros behind the last: 16 where AMX may read
/// them.
template <typename Stored>
constexpr int step_multiple(isa::generic) {
  return 1;
}

template <typename T>
constexpr Shape shape(isa::generic) {
  return {4, 2};
}

/// Two vectors of floats: the even and the odd k of a step.
template <typename V>
struct Pair {
  V even, odd;
};

/// lanes x (even, odd) bfloat16, widened.
template <typename Isa, typename V = simd::Vec<float, Isa>>
EIGENFORMER_INLINE Pair<V> widen_pairs(isa::generic, const bfloat16* p) {
  alignas(64) float even[V::lanes], odd[V::lanes];
  for (int i = 0; i < V::lanes; ++i) {
    even[i] = static_cast<float>(p[2 * i]);
    odd[i] = static_cast<float>(p[2 * i + 1]);
  }
  return {V::load(even), V::load(odd)};
}

/// int8 weights and activations, exact in int32. A step is four k; its activations are two units of
/// two int16, (k0, k2) and (k1, k3).
struct Int8Generic {
  static constexpr int lanes = 8;
  using Stored = std::int8_t;
  using Unit = std::uint32_t;
  using Sum = std::int32_t;
  struct Accumulator {
    std::int32_t v[lanes];
  };
  struct Fragment {
    const std::int8_t* p;
  };
  struct Factor {
    std::int32_t k[4];
  };
  static constexpr int rows = 4, vectors = 2, columns = vectors * lanes, step = 4, units = 2,
                       fragment = 4 * lanes;
  static constexpr bool unsigned_weights = false;

  static EIGENFORMER_INLINE Accumulator zero() { return {}; }
  static EIGENFORMER_INLINE Accumulator load(const std::int32_t* p) {
    Accumulator sums;
    std::memcpy(sums.v, p, sizeof(sums.v));
    return sums;
  }
  static EIGENFORMER_INLINE void store(std::int32_t* p, const Accumulator& sums) {
    std::memcpy(p, sums.v, sizeof(sums.v));
  }
  static EIGENFORMER_INLINE auto to_float(const Accumulator& sums) {
    return simd::Vec<float, isa::generic>::load_difference(sums.v, 0);
  }
  static EIGENFORMER_INLINE Fragment weights(const std::int8_t* p) { return {p}; }
  template <int Rows>
  static EIGENFORMER_INLINE Factor factor(const Unit* p) {
    const auto low = [](Unit u) {
      return static_cast<std::int32_t>(static_cast<std::int16_t>(u & 0xffffu));
    };
    return {{low(p[0]), low(p[Rows]), low(p[0] >> 16), low(p[Rows] >> 16)}};
  }
  static EIGENFORMER_INLINE Accumulator multiply_add(Accumulator sum, Fragment weight,
                                                     const Factor& x) {
    for (int i = 0; i < lanes; ++i)
      for (int j = 0; j < 4; ++j) sum.v[i] += weight.p[4 * i + j] * x.k[j];
    return sum;
  }
};

/// A line dot in plain C++.
struct LineDotGeneric {
  static constexpr int lanes = 8, width = 32;
  static constexpr bool unsigned_weights = false;
  using Activation = std::int8_t;
  using Weights = const std::int8_t*;
  struct Accumulator {
    std::int32_t v[lanes];
  };

  static EIGENFORMER_INLINE Accumulator zero() { return {}; }
  static EIGENFORMER_INLINE Weights weights(const std::int8_t* p) { return p; }
  static EIGENFORMER_INLINE Accumulator multiply_add(Accumulator sum, Weights w,
                                                     const Activation* x) {
    for (int i = 0; i < width; ++i) sum.v[i % lanes] += w[i] * x[i];
    return sum;
  }
  static EIGENFORMER_INLINE void totals(const Accumulator (&from)[lanes], std::int32_t* sums) {
    for (int i = 0; i < lanes; ++i) {
      sums[i] = 0;
      for (const std::int32_t v : from[i].v) sums[i] += v;
    }
  }
};

/// Units of four quantized activations for the dots that multiply int16: even and odd k apart. A
/// dot of one unit takes the four as they are.
EIGENFORMER_INLINE void split_quad(std::uint32_t quad, std::uint32_t& even, std::uint32_t& odd) {
  const auto word = [quad](int byte) {
    return static_cast<std::uint32_t>(
        static_cast<std::uint16_t>(static_cast<std::int8_t>((quad >> (8 * byte)) & 0xffu)));
  };
  even = word(0) | word(2) << 16;
  odd = word(1) | word(3) << 16;
}

/// to[i] = the bfloat16 pair (even[i], odd[i]), even in the low half, for the first n lanes; both
/// rounded to nearest even.
template <typename V>
EIGENFORMER_INLINE void store_pairs(isa::generic, V even, V odd, int n, std::uint32_t* to) {
  std::uint16_t low[V::lanes], high[V::lanes];
  even.store(reinterpret_cast<bfloat16*>(low));
  odd.store(reinterpret_cast<bfloat16*>(high));
  for (int i = 0; i < n; ++i) to[i] = low[i] | static_cast<std::uint32_t>(high[i]) << 16;
}

// Operands of products of pairs, which take denormals as zero: bfloat16 that an ISA may round its
// own way. Of one vector, of two one after the other, and of pairs (even[i], odd[i]).
template <typename V>
void store_for_pairs(isa::generic, V x, bfloat16* to) {
  x.store(to);
}
template <typename V>
void store_rounded(isa::generic, V low, V high, bfloat16* to) {
  low.store(to);
  high.store(to + V::lanes);
}
template <typename V>
void store_rounded_pairs(isa::generic isa, V even, V odd, std::uint32_t* to) {
  store_pairs(isa, even, odd, V::lanes, to);
}

/// to[i] = the bits of the pair (even[i], odd[i]).
inline void join_pairs(isa::generic, const bfloat16* even, const bfloat16* odd, Index count,
                       std::uint32_t* to) {
  const auto bits = [](const bfloat16& p) {
    return static_cast<std::uint32_t>(std::bit_cast<std::uint16_t>(p));
  };
  const auto join = [&](Index at, auto size) {
    std::uint32_t pairs[decltype(size)::value];
    for (Index i = 0; i < size; ++i) pairs[i] = bits(even[at + i]) | bits(odd[at + i]) << 16;
    std::memcpy(static_cast<void*>(to + at), pairs, sizeof(pairs));
  };
  Index at = 0;
  for (; at + 8 <= count; at += 8) join(at, std::integral_constant<int, 8>{});
  if (at + 4 <= count) join(at, std::integral_constant<int, 4>{}), at += 4;
  for (; at < count; ++at) join(at, std::integral_constant<int, 1>{});
}

/// Largest block that `transpose` takes, in units.
constexpr int transpose_size(isa::generic) { return 16; }

/// to[u * to_stride + r] = unit u of the row r that starts r * from_bytes bytes after `from`, for r
/// < rows and u < count, both at most transpose_size. Any alignment; reads and writes nothing else.
template <typename Unit>
void transpose(isa::generic, const void* from, Index from_bytes, int rows, int count, Unit* to,
               Index to_stride) {
  const auto* bytes = static_cast<const std::byte*>(from);
  for (int r = 0; r < rows; ++r)
    for (int u = 0; u < count; ++u)
      std::memcpy(to + u * to_stride + r,
                  bytes + r * from_bytes + u * static_cast<Index>(sizeof(Unit)), sizeof(Unit));
}

}  // namespace tile
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
