/// \file
/// The inner loop of every matrix product: a register tile of Rows x Panels panels, all of k that
/// it is given. For many rows one panel at a time fills the registers (12 x 32 on AVX-512: 24
/// multiply-adds for 14 loads); for few rows several panels are in flight, so that a product of one
/// row streams the weights at memory speed instead of waiting for its own sums.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "int4.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace tile {

constexpr std::uintptr_t kLineBytes = 64;

// How far ahead panels that are read once are fetched, one of them into L2 and two side by side
// into L1: hardware prefetchers stop at each page of 4 KiB, which four streams hide from each other
// and fewer do not. Of four side by side only the beginnings of the next four are fetched, before
// these end: out of DRAM a token of Llama-3.2-1B then takes 1 to 3% less in INT8, INT4 and bfloat16
// (Zen 5), and out of L3 as long as before, where fetching all of them took 25% longer.
constexpr Index kStreamBytes = 8192, kPairBytes = 4096, kFourBytes = 2048;
// Of four-bit weights a byte takes the core twice as long, and its window of instructions holds too
// few lines to hide DRAM: all is fetched, at this distance. Two panels and no four: nibbles, scales
// and minimums are streams of their own, and prefetchers follow six, not twelve.
constexpr Index kNibblePairBytes = 1536;
// Groups whose scales and minimums are fetched before they are needed. With both a token's product
// with (2048 to 16384, 2048 to 8192) weights of four bits by 32 with minimums, out of DRAM, takes
// 10 to 20% less (36..42 -> 43..47 GB/s of 48, one thread of Zen 5), and one out of L3 15% more.
constexpr Index kGroupsAhead = 3;

/// Tile heights that exist. A tile of fewer rows takes the next height, with rows of zeros.
template <typename Dot>
constexpr int tile_height(Index rows) {
  for (int height : {1, 2, 3, 4, 6, 8, 12})
    if (rows <= height && height <= Dot::rows) return height;
  return Dot::rows;
}

/// Registers hold the float sums of a tile's groups beside its exact ones.
template <typename Dot>
concept KeepsFloatSums = Dot::keeps_float_sums;

/// The largest height of at most this many rows.
template <typename Dot>
constexpr Index whole_height(Index rows) {
  while (tile_height<Dot>(rows) != rows) --rows;
  return rows;
}

/// Panels in flight at a height: two thirds of the registers of a full tile, the rest for factors
/// and fragments; all of them where float sums are kept, whose tiles are half as high. Of four-bit
/// weights two: see kNibblePairBytes.
template <typename Dot>
constexpr int panels_in_flight(int height) {
  const int panels = KeepsFloatSums<Dot> ? Dot::rows / height : 2 * Dot::rows / (3 * height);
  return panels >= 4 && !is_int4<Dot> ? 4 : panels >= 2 ? 2 : 1;
}

/// A tile of activations and the first of the panels it meets.
template <typename Dot>
struct TileOperands {
  const typename Dot::Unit* a;
  const typename Dot::Stored* b;
  Index panel_stride;  // elements from one panel to the next
  // What to fetch into L2 meanwhile, a line each step: the weights that come next, or, where a
  // panel is read once, the same panel further on.
  std::uintptr_t ahead, ahead_step;

  /// The same from panel p on, with what comes next as far from it.
  TileOperands from_panel(Index p) const {
    const Index elements = p * panel_stride;
    return {a, b + elements, panel_stride,
            ahead + static_cast<std::uintptr_t>(elements) * sizeof(*b), ahead_step};
  }
};

/// c[row][vector] += `steps` steps of the `left` that are still to come of the panels' `whole`, for
/// Panels panels side by side. Advances the operands. One panel at a time fetches a line ahead with
/// each step: 64 bytes per step of 12 x 32 are 24 GB/s at 4.5 GHz.
template <typename Dot, int Rows, int Panels, typename Accumulators>
EIGENFORMER_INLINE void accumulate(TileOperands<Dot>& at, Index steps, Index left, Index whole,
                                   Accumulators& c) {
  constexpr int vectors = Dot::vectors, all = vectors * Panels;
  const auto* a = at.a;
  const auto* b = at.b;
  auto ahead = at.ahead;
  const auto panel = [&](int v) { return b + (v / vectors) * at.panel_stride; };
  if constexpr (Panels > 1) {  // few rows: their factors stay in registers
    constexpr Index stored = Index{sizeof(*b)}, step = vectors * Dot::fragment,
                    ahead_of = Panels != 2    ? kFourBytes
                               : is_int4<Dot> ? kNibblePairBytes
                                              : kPairBytes;
    const auto run = [&](Index count, auto fetches, Index distance) {
      for (Index s = 0; s < count; ++s, a += Rows * Dot::units, b += step) {
        typename Dot::Factor x[Rows];
        unroll<Rows>([&](auto r) { x[r] = Dot::template factor<Rows>(a + r); });
        unroll<all>([&](auto v) {
          if constexpr (decltype(fetches)::value)
            simd::prefetch_after<3>(panel(v) + (v % vectors) * Dot::fragment, distance);
          const auto w = step_weights<Dot, v % vectors>(panel(v));
          unroll<Rows>([&](auto r) { c[r][v] = Dot::multiply_add(c[r][v], w, x[r]); });
        });
      }
    };
    // from where these panels end to where the next begin
    const Index to_next = (Panels * at.panel_stride - whole * step) * stored;
    const Index early = std::clamp<Index>(left - ahead_of / (step * stored), 0, steps);
    run(early, std::bool_constant<Panels == 2>{}, ahead_of);
    run(steps - early, std::true_type{}, ahead_of + to_next);
  } else {
    for (Index s = 0; s < steps; ++s, a += Rows * Dot::units, b += vectors * Dot::fragment) {
      simd::prefetch(ahead);
      ahead += at.ahead_step;
      typename Dot::Fragment w[all];
      unroll<all>([&](auto v) { w[v] = step_weights<Dot, v % vectors>(panel(v)); });
      unroll<Rows>([&](auto r) {
        const auto x = Dot::template factor<Rows>(a + r);
        unroll<all>([&](auto v) { c[r][v] = Dot::multiply_add(c[r][v], w[v], x); });
      });
    }
  }
  at = {a, b, at.panel_stride, ahead, at.ahead_step};
}

/// sums[panel][row][column] = (from_zero ? 0 : sums) + sum over `steps` steps.
template <typename Dot, int Rows, int Panels>
void tile_product(TileOperands<Dot> at, Index steps, typename Dot::Sum* sums, Index sums_stride,
                  bool from_zero) {
  constexpr int vectors = Dot::vectors, all = vectors * Panels, lanes = Dot::columns / vectors;
  typename Dot::Accumulator c[Rows][all];
  const auto place = [&](int r, int v) {
    return sums + (v / vectors) * sums_stride + r * Dot::columns + (v % vectors) * lanes;
  };
  unroll<Rows>([&](auto r) {
    unroll<all>([&](auto v) { c[r][v] = from_zero ? Dot::zero() : Dot::load(place(r, v)); });
  });
  accumulate<Dot, Rows, Panels>(at, steps, steps, steps, c);
  unroll<Rows>([&](auto r) { unroll<all>([&](auto v) { Dot::store(place(r, v), c[r][v]); }); });
}

/// f(panel, row, vector of the panel, sums), panels counted from `first` on.
template <typename Dot, int Rows, int Panels, typename F>
EIGENFORMER_NOINLINE void tile_sums(TileOperands<Dot> at, Index steps, Index first, const F& f) {
  constexpr int vectors = Dot::vectors, all = vectors * Panels;
  typename Dot::Accumulator c[Rows][all];
  unroll<Rows>([&](auto r) { unroll<all>([&](auto v) { c[r][v] = Dot::zero(); }); });
  accumulate<Dot, Rows, Panels>(at, steps, steps, steps, c);
  unroll<Rows>([&](auto r) {
    unroll<all>([&](auto v) { f(first + v / vectors, r, v % vectors, c[r][v]); });
  });
}

/// What scales the exact sums of weights quantized in groups.
struct GroupFactors {
  Index steps;                   // of a group
  const float* scales;           // [panel][group][column], or nullptr
  const half* half_scales;       // of int8, in their place
  Index panel_stride;            // of the scales
  const float* minimums;         // of int4, as the scales, or nullptr
  const std::int32_t* offsets;   // [group][row of the height]: taken off the row's sums
  const float* activation_sums;  // as the offsets: what minimums are multiplied by

  GroupFactors from_panel(Index p) const {
    using eigenformer::detail::offset_by;
    const Index numbers = p * panel_stride;
    return {steps,          offset_by(scales, numbers),   offset_by(half_scales, numbers),
            panel_stride,   offset_by(minimums, numbers), offsets,
            activation_sums};
  }
};

/// float sums[panel][row][column] = fma(exact sum of the group, its scale, sums), group after
/// group, and after each fma(sum of the group's activations, its minimum, sums) where there are
/// minimums.
template <typename V, typename Dot, int Rows, int Panels>
void grouped_tile_product(TileOperands<Dot> at, Index steps, const GroupFactors groups, float* sums,
                          Index sums_stride, bool from_zero) {
  constexpr int vectors = Dot::vectors, all = vectors * Panels, lanes = Dot::columns / vectors;
  constexpr bool kept = KeepsFloatSums<Dot>;
  static_assert(lanes == V::lanes && (!kept || Rows * all <= Dot::rows * vectors));
  const auto place = [&](int r, int v) {
    return sums + (v / vectors) * sums_stride + r * Dot::columns + (v % vectors) * lanes;
  };
  V own[kept ? Rows : 1][kept ? all : 1];
  unroll<Rows>([&](auto r) {
    unroll<all>([&](auto v) {
      if constexpr (kept)
        own[r][v] = from_zero ? V::zero() : V::load(place(r, v));
      else if (from_zero)
        V::zero().store(place(r, v));
    });
  });
  const float* x_sums = groups.activation_sums;
  const std::int32_t* offsets = groups.offsets;
  const bool has_minimums = is_int4<Dot> && groups.minimums != nullptr;
  Index done = 0;  // numbers of a panel's scales
  for (Index s = 0; s < steps; s += groups.steps, done += Dot::columns) {
    typename Dot::Accumulator c[Rows][all];
    unroll<Rows>([&](auto r) {
      const auto start = [&] {
        if constexpr (Dot::unsigned_weights)
          return Dot::minus(offsets[r]);
        else
          return Dot::zero();
      }();
      unroll<all>([&](auto v) { c[r][v] = start; });
    });
    offsets += Rows;
    accumulate<Dot, Rows, Panels>(at, (std::min)(groups.steps, steps - s), steps - s, steps, c);
    // Sums that have no registers stay in memory: moved out of the loop by the compiler they would
    // be stored twice, there and where it spills them.
    if constexpr (!kept) std::atomic_signal_fence(std::memory_order_acq_rel);
    // of panels side by side some groups on, at their end of the next ones; of one the next panel's
    const Index factors_ahead =
        (s + kGroupsAhead * groups.steps < steps ? 0 : (Panels - 1) * groups.panel_stride) +
        (Panels > 1 ? kGroupsAhead * Dot::columns : groups.panel_stride);
    const auto factor = [&]<typename F>(const F* from, auto v) {
      from += done + (v / vectors) * groups.panel_stride + (v % vectors) * lanes;
      simd::prefetch_after<3>(from, factors_ahead * Index{sizeof(F)});
      return V::load(from);
    };
    const auto add = [&](auto r, auto v, auto&& next) {
      if constexpr (kept)
        own[r][v] = next(own[r][v]);
      else
        next(V::load(place(r, v))).store(place(r, v));
    };
    const auto add_scaled = [&](const auto* scales) {
      unroll<all>([&](auto v) {
        const V scale = factor(scales, v);
        unroll<Rows>([&](auto r) {
          add(r, v,
              [&](V sum) { return simd::fused_multiply_add(Dot::to_float(c[r][v]), scale, sum); });
        });
      });
    };
    if (has_minimums) {
      unroll<all>([&](auto v) {
        const V scale = factor(groups.scales, v), minimum = factor(groups.minimums, v);
        unroll<Rows>([&](auto r) {
          add(r, v, [&](V sum) {
            const V scaled = simd::fused_multiply_add(Dot::to_float(c[r][v]), scale, sum);
            return simd::fused_multiply_add(V::set1(x_sums[r]), minimum, scaled);
          });
        });
      });
      x_sums += Rows;
    } else if (!is_int4<Dot> && groups.half_scales != nullptr) {
      add_scaled(groups.half_scales);
    } else {
      add_scaled(groups.scales);
    }
  }
  if constexpr (kept)
    unroll<Rows>([&](auto r) { unroll<all>([&](auto v) { own[r][v].store(place(r, v)); }); });
}

/// f(integral_constant of the tile's height).
template <typename Dot, typename F>
EIGENFORMER_INLINE void with_height(int height, F&& f) {
  const auto run = [&](auto rows) {
    if constexpr (decltype(rows)::value <= Dot::rows) f(rows);
  };
  switch (height) {
    case 1:
      return run(std::integral_constant<int, 1>{});
    case 2:
      return run(std::integral_constant<int, 2>{});
    case 3:
      return run(std::integral_constant<int, 3>{});
    case 4:
      return run(std::integral_constant<int, 4>{});
    case 6:
      return run(std::integral_constant<int, 6>{});
    case 8:
      return run(std::integral_constant<int, 8>{});
    default:
      return run(std::integral_constant<int, 12>{});
  }
}

/// f(integral_constant of the panels side by side, first panel) over any number of panels.
template <typename Dot, int Rows, typename F>
EIGENFORMER_INLINE void for_each_flight(Index panels, F&& f) {
  constexpr int flight = panels_in_flight<Dot>(Rows);
  Index p = 0;
  for (; p + flight <= panels; p += flight) f(std::integral_constant<int, flight>{}, p);
  if constexpr (flight > 1)
    for (; p < panels; ++p) f(std::integral_constant<int, 1>{}, p);
}

/// tile_product for any number of panels, at a height known at run time.
template <typename Dot>
void tile_products(int height, const TileOperands<Dot>& at, Index steps, typename Dot::Sum* sums,
                   Index sums_stride, Index panels, bool from_zero) {
  with_height<Dot>(height, [&](auto rows) {
    for_each_flight<Dot, decltype(rows)::value>(panels, [&](auto flight, Index p) {
      tile_product<Dot, decltype(rows)::value, decltype(flight)::value>(
          at.from_panel(p), steps, sums + p * sums_stride, sums_stride, from_zero);
    });
  });
}

/// f(panel, row, vector of the panel, its sums) instead of a store: for what is made of sums while
/// they are in registers. `scratch`, (panels, height, columns), is for AMX alone.
template <typename Dot, typename F>
void for_each_tile_sum(int height, const TileOperands<Dot>& at, Index steps, Index panels,
                       typename Dot::Sum* scratch, const F& f) {
  static_cast<void>(scratch);
  with_height<Dot>(height, [&](auto rows) {
    for_each_flight<Dot, decltype(rows)::value>(panels, [&](auto flight, Index p) {
      tile_sums<Dot, decltype(rows)::value, decltype(flight)::value>(at.from_panel(p), steps, p, f);
    });
  });
}

/// The same with groups.
template <typename V, typename Dot>
void grouped_tile_products(int height, const TileOperands<Dot>& at, Index steps,
                           const GroupFactors& groups, float* sums, Index sums_stride, Index panels,
                           bool from_zero) {
  with_height<Dot>(height, [&](auto tile_rows) {
    for_each_flight<Dot, decltype(tile_rows)::value>(panels, [&](auto flight, Index p) {
      const GroupFactors own = groups.from_panel(p);
      grouped_tile_product<V, Dot, decltype(tile_rows)::value, decltype(flight)::value>(
          at.from_panel(p), steps, own, sums + p * sums_stride, sums_stride, from_zero);
    });
  });
}

}  // namespace tile
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
