/// \file
/// Keys and values of one sequence and KV head on their way to a warp, 16 bytes at a time through a
/// ring in shared memory that the warp fills itself, so that nobody waits at a barrier of a block.
/// Where rows begin is a pointer for each key, found a tile of 64 keys ahead and passed among
/// lanes.
#pragma once

#include <cstdint>

#include "attention_tile_rows.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

/// Rows of at most kWidth elements. A tile comes in pieces of 4 KiB, those of its keys and then
/// those of its values.
template <typename Call, typename Rows>
struct AttentionRing {
  using T = typename Call::Key;
  static constexpr int kWidth = 128;
  static constexpr int kEach = 16 / sizeof(T), kChunks = kWidth / kEach;  // of 16 bytes
  static constexpr int kPieceKeys = 4096 / (kWidth * static_cast<int>(sizeof(T)));
  static constexpr int kOperandPieces = kTile / kPieceKeys, kTilePieces = 2 * kOperandPieces;
  static constexpr int kPieces = 4;  // in the ring: 3 on their way while one is worked on
  static constexpr int kSize = kPieces * kPieceKeys * kWidth;
  static_assert(kTilePieces % kPieces == 0);

  /// Where the rows of a tile are: those of keys `lane` and 32 + lane.
  struct Place {
    Index at;
    const T* rows[2][2];  // (keys or values, half of the tile)
    bool fit[2];          // all lanes' in loads of 16 bytes
  };

  const Call& call;
  const Rows& rows;
  Index end;  // nobody sees keys from there on

  /// The tile at `at`, which may be beyond the end.
  template <typename Block>
  EIGENFORMER_DEVICE Place place_of(Block& block, Index at) const {
    Place place{at, {}, {}};
    if (at >= end) return place;
    // of keys the chunks of four lanes are multiplied, whole
    bool fit[2] = {call.p.head_dim % (4 * kEach) == 0, call.p.value_dim % kEach == 0};
    EIGENFORMER_UNROLL_ALL
    for (int half = 0; half < 2; ++half) {
      const Cell cell = cell_of(at + half * kWarp + block.lane());
      EIGENFORMER_UNROLL_ALL
      for (int value = 0; value < 2; ++value) {
        const T* const row = row_of(cell, value != 0);
        place.rows[value][half] = row;
        fit[value] = fit[value] && packs_fit<kEach>(row, 0);
      }
    }
    place.fit[0] = block.all(fit[0]);
    place.fit[1] = block.all(fit[1]);
    return place;
  }

  /// Where a chunk of 16 bytes is in the ring: such that what a warp loads at once lies in
  /// different banks, of a key 4 neighbours in each of 8 rows, of a value 8 neighbours in each of 4.
  EIGENFORMER_DEVICE static Index at(int piece, int row, int chunk) {
    return (piece % kPieces * kPieceKeys + row) * kWidth +
           (chunk ^ ((row & 6) ^ (row & 1) << 2)) * kEach;
  }

  /// Piece `Piece` of a tile, on its way to the ring. Chunks that begin outside a row are not read.
  template <int Piece, typename Block, typename Array>
  EIGENFORMER_DEVICE void load(Block& block, const Array& array, const Place& place) const {
    constexpr int value = Piece / kOperandPieces,
                  first = Piece % kOperandPieces * kPieceKeys,  // key of the tile
        step = kWarp / kChunks;                                 // rows of the warp at once
    if (place.at >= end) return;
    const Index width = value != 0 ? call.p.value_dim : call.p.head_dim;
    const int chunk = block.lane() % kChunks;
    const auto row_at = [&](int row) {
      return block.shuffle(place.rows[value][first / kWarp], first % kWarp + row);
    };
    if (place.fit[value]) {
      const bool inside = chunk * kEach < width;
      EIGENFORMER_UNROLL_ALL
      for (int i = 0; i < kPieceKeys; i += step) {
        const int row = i + block.lane() / kChunks;
        const T* const from = row_at(row);
        if (inside) block.copy_async(array, at(Piece, row, chunk), from + chunk * kEach);
      }
      return;
    }
    for (int row = block.lane() / kChunks; row < kPieceKeys; row += step)
      array.store_pack(at(Piece, row, chunk), row_pack<kEach>(row_at(row), chunk * kEach, width));
  }

 private:
  /// A page and the row of it, or nullptr and the row of the sequence.
  struct Cell {
    const std::byte* page;
    Index row;
  };
  /// Of key j, or of some other one that is there, which nobody sees in its place. Divisions are of
  /// 32 bits: those of 64 are as long as the products of a tile.
  EIGENFORMER_DEVICE Cell cell_of(Index j) const {
    const Index last = rows.s.key_length - 1,
                key = rows.s.key_begin + (j < rows.begin ? rows.begin : (j < last ? j : last));
    const auto& from = call.rows;
    if (from.pages == nullptr) return {nullptr, key};
    const auto position = static_cast<std::uint32_t>(key),
               size = static_cast<std::uint32_t>(from.source.page_size);
    std::uint32_t page = position / size;
    const std::uint32_t row = position - page * size;
    if (const auto& ring = from.source.ring; ring.pages != 0) {
      const auto first = static_cast<std::uint32_t>(ring.begin);
      if (page >= first) page = first + (page - first) % static_cast<std::uint32_t>(ring.pages);
    }
    return {from.pages[from.first_page[rows.s.key_sequence] + page] + from.source.layer_offset,
            rows.kv_head * from.source.page_size + row};
  }
  EIGENFORMER_DEVICE const T* row_of(const Cell& cell, bool value) const {
    const auto& from = call.rows.source;
    const Index b = rows.s.key_sequence, h = rows.kv_head;
    if (cell.page != nullptr)
      return reinterpret_cast<const T*>(cell.page + (value ? from.value_offset : 0)) +
             cell.row * (value ? call.p.value_dim : call.p.head_dim);
    return value ? from.values + b * from.value_sequence_stride + h * from.value_head_stride +
                       cell.row * from.value_row_stride
                 : from.keys + b * from.sequence_stride + h * from.head_stride +
                       cell.row * from.row_stride;
  }
};

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
