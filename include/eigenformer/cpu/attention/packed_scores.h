/// \file
/// Scores of packed queries with a block of keys, by the register tiles of linear layers
/// (tile/product.h): queries are the activations, keys the weights.
#pragma once

#include "../linear/activations.h"
#include "../tile/pack.h"
#include "../tile/product.h"
#include "few_rows.h"
#include "tile.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

template <typename Dot, typename Isa>
struct PackedScores {
  using Stored = typename Dot::Stored;
  using Unit = typename Dot::Unit;
  using Sum = typename Dot::Sum;
  static constexpr int columns = Dot::columns;
  static_assert(kAttentionKeyBlock % columns == 0);

  Index depth;
  Unit* queries;  // tiles of all rows
  Stored* keys;   // panels of a block
  Sum* sums;      // of a tile with a block

  /// What queries, keys and sums take.
  static Index query_units(Index rows, Index depth) {
    return Tiles<Dot>::padded_rows(rows) * tile::product_steps<Dot>(depth) * Dot::units;
  }
  static Index key_elements(Index depth) {
    return tile::product_steps<Dot>(depth) * Dot::step * kAttentionKeyBlock;
  }
  static constexpr Index kSums = Index{Dot::rows} * kAttentionKeyBlock;

  Unit* tile_queries(Index first) const {
    return queries + first * tile::product_steps<Dot>(depth) * Dot::units;
  }

  /// Operands of a tile of rows [first, first + valid) and `panels` panels of keys from `begin` on.
  struct TileOfScores {
    Index first;
    int valid, height, begin, panels;
    tile::TileOperands<Dot> operands;
  };

  /// f(tile) for the tiles of rows, with the panels that hold keys which one of them sees.
  template <typename F>
  void for_each_tile(Index rows, const BlockRows<Stored>& block, const BlockRange* ranges,
                     F&& f) const {
    const Index steps = tile::product_steps<Dot>(depth), panel = steps * Dot::step * columns;
    pack_keys(block, seen_by_tile(ranges, static_cast<int>(rows)), steps, panel);
    const Tiles<Dot> tiles(rows);
    for (Index t = 0; t < tiles.count(); ++t) {
      const Index first = tiles.first(t);
      const int height = tiles.height(t), valid = static_cast<int>(tiles.valid(t));
      const KeySpan seen = seen_by_tile(ranges + first, valid);
      const int begin = seen.begin / columns, panels = (seen.end + columns - 1) / columns - begin;
      if (panels <= 0) continue;
      const Stored* const from = keys + begin * panel;
      f(TileOfScores{
          first,
          valid,
          height,
          begin,
          panels,
          {tile_queries(first), from, panel, reinterpret_cast<std::uintptr_t>(from), 0}});
    }
  }

  /// f(row, key, sums) for the vectors of sums.
  template <typename F>
  void score(Index rows, const BlockRows<Stored>& block, const BlockRange* ranges, F&& f) const {
    for_each_tile(rows, block, ranges, [&](const TileOfScores& t) {
      const Index stride = Index{t.height} * columns;
      tile::tile_products<Dot>(t.height, t.operands, tile::product_steps<Dot>(depth), sums, stride,
                               t.panels, true);
      for (int r = 0; r < t.valid; ++r)
        for (int p = 0; p < t.panels; ++p)
          for (int c = 0; c < columns; c += columns / Dot::vectors)
            f(t.first + r, (t.begin + p) * columns + c, sums + p * stride + r * columns + c);
    });
  }

 private:
  /// The panels of a block that hold seen keys. Keys of a page lie one after the other.
  void pack_keys(const BlockRows<Stored>& block, KeySpan seen, Index steps, Index panel) const {
    tile::MatrixOperand<Stored> runs[kAttentionKeyBlock];
    Index ends[kAttentionKeyBlock];
    int count = 0;
    for (int j = 0; j < block.count; ++j) {
      if (j == 0 || block.keys[j] != block.keys[j - 1] + block.key_step)
        runs[count++] = {block.keys[j], block.key_step, 1};
      ends[count - 1] = j + 1;
    }
    const tile::StackedRows<Stored> rows{runs, ends, count, block.count};
    for (int p = seen.begin / columns; p * columns < seen.end; ++p)
      tile::pack_panel<Dot>(Isa{}, rows, p, 0, depth, steps, keys + p * panel);
  }
};

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
