/// \file
/// The inner loop of every matrix product: a register tile of Rows x Panels panels, all of k that it is given. For many rows one
/// panel at a time fills the registers (12 x 32 on AVX-512: 24 multiply-adds for 14 loads); for few rows several panels are in
/// flight, so that a product of one row streams the weights at memory speed instead of waiting for its own sums.
#pragma once

#include "tile.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace tile {

/// Tile heights that exist. A tile of fewer rows takes the next height, with rows of zeros.
template <typename Dot>
constexpr int tile_height(Index rows) {
  for (int height : {1, 2, 3, 4, 6, 8, 12})
    if (rows <= height && height <= Dot::rows) return height;
  return Dot::rows;
}

/// The largest height of at most this many rows.
template <typename Dot>
constexpr Index whole_height(Index rows) {
  while (tile_height<Dot>(rows) != rows) --rows;
  return rows;
}

/// Panels in flight at a height: two thirds of the registers of a full tile, the rest for factors and fragments.
template <typename Dot>
constexpr int panels_in_flight(int height) {
  const int panels = 2 * Dot::rows / (3 * height);
  return panels >= 4 ? 4 : panels >= 2 ? 2 : 1;
}

/// sums[panel][row][column] = (from_zero ? 0 : sums) + sum over `steps` steps, panels `panel_stride` elements apart.
template <typename Dot, int Rows, int Panels>
void tile_product(const typename Dot::Unit* a, const typename Dot::Stored* b, Index panel_stride, Index steps,
                  typename Dot::Sum* sums, Index sums_stride, bool from_zero) {
  constexpr int vectors = Dot::vectors, all = vectors * Panels, lanes = Dot::columns / vectors;
  typename Dot::Accumulator c[Rows][all];
  const auto place = [&](int r, int v) { return sums + (v / vectors) * sums_stride + r * Dot::columns + (v % vectors) * lanes; };
  unroll<Rows>([&](auto r) { unroll<all>([&](auto v) { c[r][v] = from_zero ? Dot::zero() : Dot::load(place(r, v)); }); });
  const auto fragment = [&](int v) { return Dot::weights(b + (v / vectors) * panel_stride + (v % vectors) * Dot::fragment); };
  for (Index s = 0; s < steps; ++s, a += Rows * Dot::units, b += vectors * Dot::fragment) {
    if constexpr (Panels > 1) {  // few rows: their factors stay in registers while weights stream by
      typename Dot::Factor x[Rows];
      unroll<Rows>([&](auto r) { x[r] = Dot::template factor<Rows>(a + r); });
      unroll<all>([&](auto v) {
        const auto w = fragment(v);
        unroll<Rows>([&](auto r) { c[r][v] = Dot::multiply_add(c[r][v], w, x[r]); });
      });
    } else {
      typename Dot::Fragment w[all];
      unroll<all>([&](auto v) { w[v] = fragment(v); });
      unroll<Rows>([&](auto r) {
        const auto x = Dot::template factor<Rows>(a + r);
        unroll<all>([&](auto v) { c[r][v] = Dot::multiply_add(c[r][v], w[v], x); });
      });
    }
  }
  unroll<Rows>([&](auto r) { unroll<all>([&](auto v) { Dot::store(place(r, v), c[r][v]); }); });
}

/// The same for any number of panels, at a height known at run time.
template <typename Dot>
void tile_products(int height, const typename Dot::Unit* a, const typename Dot::Stored* b, Index panel_stride, Index steps,
                   typename Dot::Sum* sums, Index sums_stride, Index panels, bool from_zero) {
  const auto run = [&](auto rows) {
    if constexpr (constexpr int Rows = decltype(rows)::value; Rows <= Dot::rows) {
      constexpr int flight = panels_in_flight<Dot>(Rows);
      Index p = 0;
      for (; p + flight <= panels; p += flight)
        tile_product<Dot, Rows, flight>(a, b + p * panel_stride, panel_stride, steps, sums + p * sums_stride, sums_stride,
                                        from_zero);
      if constexpr (flight > 1)
        for (; p < panels; ++p)
          tile_product<Dot, Rows, 1>(a, b + p * panel_stride, panel_stride, steps, sums + p * sums_stride, sums_stride, from_zero);
    }
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

}  // namespace tile
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
