/// \file
/// The rows of a block of attention_tiles.cuh: which queries they are, and which keys they see.
#pragma once

#include "attention_call.cuh"
#include "tile/pairs.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

/// Rows of a block: 16 of a warp.
inline constexpr int kTileRows = 64;

/// Rows (position, head of the group) of a sequence and KV head, from `first` on.
template <typename Call, bool Masked>
struct AttentionTileRows {
  const Call& call;
  const problem::AttentionSequence& s;
  Index kv_head, first, count;  // count: those that are queries
  Index position, positions;    // of the queries
  Index begin, end;             // keys before and from there on nobody sees
  Index key_length;
  const typename Call::Key *keys = nullptr, *values = nullptr;  // of key 0, where not in pages

  EIGENFORMER_DEVICE AttentionTileRows(const Call& call_,
                                       const problem::AttentionSequence& sequence, Index kv_head_,
                                       Index first_)
      : call(call_),
        s(sequence),
        kv_head(kv_head_),
        first(first_),
        key_length(sequence.key_length) {
    const Index all = s.query_rows * call.group - first;
    count = all < 0 ? 0 : (all < kTileRows ? all : kTileRows);
    position = s.first_position + first / call.group;
    positions = count == 0 ? 0 : (first + count - 1) / call.group - first / call.group + 1;
    const auto& v = call.p.visibility;
    begin = v.prefix > 0 ? 0 : v.keys(position, key_length).begin;
    const Index prefix = v.prefix < key_length ? v.prefix : key_length,
                last = v.keys(position + positions - 1, key_length).end;
    end = last > prefix ? last : prefix;
    if (call.rows.pages != nullptr || count == 0 || key_length == 0) return;
    keys = call.rows.row(false, s.key_sequence, kv_head, s.key_begin);
    values = call.rows.row(true, s.key_sequence, kv_head, s.key_begin);
  }

  EIGENFORMER_DEVICE AttentionQuery query_of(Index r) const {
    const Index flat = first + r;
    return call.query_at(s, flat / call.group, kv_head * call.group + flat % call.group);
  }
  EIGENFORMER_DEVICE const typename Call::Key* key(bool value, Index j) const {
    if (j < begin || j >= key_length) return nullptr;
    if (call.rows.pages != nullptr)
      return call.rows.row(value, s.key_sequence, kv_head, s.key_begin + j);
    const auto& source = call.rows.source;
    return value ? values + j * source.value_row_stride : keys + j * source.row_stride;
  }

  /// The first tile from `at` on that somebody sees by position; `last` or later where there is
  /// none.
  EIGENFORMER_DEVICE Index next_tile(Index at, Index last) const {
    while (at < last && !any_visible(call.p.visibility, position, positions, at,
                                     at + kTile < key_length ? at + kTile : key_length))
      at += kTile;
    return at;
  }
  /// Whether all rows see all of the tile at `at`.
  EIGENFORMER_DEVICE bool see_whole(Index at) const {
    const auto& v = call.p.visibility;
    if (at + kTile > key_length || (Masked && call.p.masked())) return false;
    return at + kTile <= v.prefix ||
           (at + kTile <= position + 1 + v.right && at >= position + positions - 1 - v.left);
  }
  /// What row r sees of the tile at `at` by its position.
  EIGENFORMER_DEVICE TileRange range(Index r, Index at) const {
    if (r >= count) return {0, 0, 0};
    return tile_range(call.p.visibility, s.first_position + (first + r) / call.group, key_length,
                      at, kTile);
  }
  /// Whether row r sees key j of the tile; `here` is its range.
  EIGENFORMER_DEVICE bool sees(Index r, Index at, const TileRange& here, int j) const {
    return here.sees(j) &&
           (!Masked || !call.p.masked() || call.p.unmasked(call.score_row(query_of(r)), at + j));
  }
};

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
