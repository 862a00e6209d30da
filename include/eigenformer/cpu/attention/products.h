/// \file
/// The two products of attention's forward kernel, Q K^T and P V, of the rows of a task with one
/// block of keys after the other. Few rows read keys and values where they lie (few_rows.h), many
/// pack them (tile.h); a row has the same bits in both.
#pragma once

#include <algorithm>
#include <cstddef>
#include <utility>

#include "few_rows.h"
#include "int8_scores.h"
#include "pair_products.h"
#include "row.h"
#include "scratch.h"
#include "tile.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

/// The block of a sequence's keys that begins at key `begin`.
template <typename TKV>
KeyBlock<TKV> key_block(const KvSource<TKV>& source, const problem::AttentionSequence& sequence,
                        Index kv_head, Index begin) {
  return {source, sequence.key_sequence, kv_head, sequence.key_begin + begin,
          static_cast<int>(std::min<Index>(kAttentionKeyBlock, sequence.key_length - begin))};
}

/// Rows, scores, weights and sums are those of the scratch.
template <typename Isa, typename TQ, typename TKV>
class AttentionProducts {
  using C = compute_type<TQ>;
  using Tile = AttentionTile<C, Isa>;
  using V = typename Tile::V;
  using Few = FewRows<C, Isa>;

 public:
  template <typename Problem>
  AttentionProducts(const Problem& p, const AttentionScratch<C>& scratch)
      : source_(p.source),
        s_(scratch),
        scale_(p.scale),
        head_dim_(p.head_dim),
        value_dim_(p.value_dim),
        width_(Tile::padded(p.value_dim)),
        value_stride_(Tile::value_stride(p.value_dim)),
        int8_scores_(scratch.int8, p.head_dim, static_cast<float>(p.scale)) {}
  AttentionProducts(const AttentionProducts&) = delete;
  AttentionProducts& operator=(const AttentionProducts&) = delete;

  /// From here on: `rows` rows, row r of the queries at query(r), and the keys of a sequence.
  template <typename Query>
  void begin(const problem::AttentionSequence& sequence, Index kv_head, Index rows, Query&& query) {
    sequence_ = &sequence;
    kv_head_ = kv_head;
    rows_ = rows;
    here_->begin = next_->begin = -1;
    forget_ranges();
    if constexpr (kInt8Scores<TQ, TKV>) return int8_scores_.load_queries(rows, query);
    if constexpr (kPairs) return pairs().load_queries(rows, query);
    for (Index r = 0; r < rows; ++r)
      Tile::load_row(query(r), scale_, head_dim_, head_dim_, s_.queries + r * head_dim_);
    if (rows <= kAttentionFewRows) Few::interleave(s_.queries, rows, head_dim_, s_.keys);
  }

  /// To be called where ranges change.
  void forget_ranges() { tiles_found_ = false; }

  /// Where the rows of a block are, for blocks that are read in place or have scales; nullptr for
  /// others, and where there is none. Stays so until the block after it is asked for.
  const BlockRows<TKV>* rows_at(Index block_begin) {
    if (!(kInt8 || kPairs || rows_ <= kAttentionFewRows) || block_begin >= sequence_->key_length)
      return nullptr;
    const KeyBlock<TKV> block = block_at(block_begin);
    if (here_->begin == block.begin) return here_;
    if (next_->begin != block.begin) find_rows(block, *next_);
    return next_;
  }

  /// scores[r] = scale * queries[r] . keys of a block, at least of the keys in ranges[r].
  /// `then` are the rows that are read afterwards.
  void score(Index block_begin, const TKV* const* then) {
    if (kInt8 || kPairs || rows_ <= kAttentionFewRows) find_block(block_begin);
    if constexpr (kInt8Scores<TQ, TKV>) {
      int8_scores_.score(rows_, *here_, then, s_.ranges, s_.scores);
    } else if constexpr (kPairs) {
      if (!pairs().in_place(rows_)) prefetch(here_->values, here_->count, value_dim_);
      pairs().score(rows_, *here_, then, s_.ranges, s_.scores);
    } else {
      if (rows_ <= kAttentionFewRows)
        score_in_place(then);
      else
        score_packed(block_begin);
      if constexpr (kInt8) scale_rows(here_->key_scales);
    }
  }

  /// sums[r] = factors[r] * sums[r] + weights of the same block, in scores[r], by its values, over
  /// the keys in ranges[r]. `then` are the rows that are read afterwards.
  void add_values(Index block_begin, const TKV* const* then) {
    const KeyBlock<TKV> block = block_at(block_begin);
    if constexpr (kInt8) scale_rows(here_->value_scales);
    if (hides_bad_values(block)) return add_values_row_by_row(block);
    if constexpr (kPairs) {
      if (pairs().in_place(rows_))
        return pairs().add_values_in_place(rows_, s_.scores, *here_, s_.ranges, s_.factors,
                                           s_.now.sums, then);
      if (then != nullptr) prefetch(then, kAttentionKeyBlock, head_dim_);
      pairs().load_values(*here_, 0);
      pairs().add_values(rows_, s_.scores, s_.ranges, s_.factors, s_.now.sums);
    } else {
      if (rows_ > kAttentionFewRows || !Tile::one_piece(s_.ranges, rows_)) {
        load_stored_values(block);
        return add_loaded_values(block_begin);
      }
      Few::with_rows(rows_, [&](auto tile) {
        Few::template add_values<decltype(tile)::value>(
            s_.scores, *here_, seen_by_tile(s_.ranges, static_cast<int>(rows_)), s_.factors,
            value_dim_, width_, s_.now.sums, s_.block_sums, then);
      });
    }
  }

  /// The values of a block as C, to the scratch.
  void load_values(const KeyBlock<TKV>& block) {
    for (int j = 0; j < block.count; ++j)
      load_value(block, j, static_cast<C>(block.value_scale(j)));
  }

 private:
  static constexpr bool kInt8 = std::is_same_v<TKV, std::int8_t>;
  static constexpr bool kPairs = kPairProducts<Isa, TQ, TKV>;

  PairProducts<Isa> pairs() const {
    return {s_.pairs, head_dim_, value_dim_, width_, static_cast<float>(scale_)};
  }

  KeyBlock<TKV> block_at(Index begin) const {
    return key_block(source_, *sequence_, kv_head_, begin);
  }

  /// Asks for rows of memory that are read next.
  static void prefetch(const TKV* const* rows, int count, Index width) {
    for (int j = 0; j < count; ++j)
      Tile::prefetch_row(rows[j], width * static_cast<Index>(sizeof(TKV)));
  }

  /// Asks for `count` rows one by one, as `steps` steps of a product go by: memory has time then,
  /// where a block is packed it would be waited for.
  struct Ahead {
    Index width;
    int count;
    Index steps, done = 0;
    int asked = 0;

    template <typename Row>
    EIGENFORMER_INLINE void step(Index size, Row&& row) {
      done += size;
      for (; asked * steps < done * count; ++asked)
        Tile::prefetch_row(row(asked), width * static_cast<Index>(sizeof(TKV)));
    }
  };

  void load_value(const KeyBlock<TKV>& block, int j, C scale) {
    Tile::load_row(block.value(j), scale, value_dim_, width_, s_.values + j * value_stride_);
  }

  /// The same without their scales.
  void load_stored_values(const KeyBlock<TKV>& block) {
    for (int j = 0; j < block.count; ++j) load_value(block, j, C(1));
  }

  /// scores[r][j] *= scales[j], of keys or, where they are weights, of values: once for a key
  /// rather than for each of its elements.
  void scale_rows(const float* scales) {
    for (Index r = 0; r < rows_; ++r)
      for (int j = 0; j < kAttentionKeyBlock; j += Tile::lanes) {
        C* const at = s_.scores + r * kAttentionKeyBlock + j;
        (V::load(at) * V::load(scales + j)).store(at);
      }
  }

  void score_packed(Index block_begin) {
    const KeyBlock<TKV> block = block_at(block_begin);
    Tile::pack_transposed(
        block.count, head_dim_, s_.keys, [&](int j) { return block.key(j); },
        [](int) { return C(1); });
    find_tiles();
    const Index panels = (block.count + Tile::kPanel - 1) / Tile::kPanel;
    Ahead ahead{value_dim_, block.count, panels * rows_};
    for (int key = 0; key < block.count; key += Tile::kPanel)
      Tile::for_row_tiles(rows_, [&](auto tile, Index r) {
        ahead.step(tile, [&](int j) { return block.value(j); });
        const KeySpan seen = s_.tiles[r].seen;
        if (seen.begin < key + Tile::kPanel && key < seen.end)
          Tile::template dot_panel<decltype(tile)::value>(
              s_.queries + r * head_dim_, head_dim_, s_.keys + key * head_dim_, head_dim_,
              s_.scores + r * kAttentionKeyBlock + key, kAttentionKeyBlock);
      });
  }

  void find_tiles() {
    if (std::exchange(tiles_found_, true)) return;
    Tile::for_row_tiles(rows_, [&](auto tile, Index r) {
      const BlockRange* const ranges = s_.ranges + r;
      s_.tiles[r] = {seen_by_tile(ranges, tile), Tile::one_piece(ranges, tile)};
    });
  }

  /// A panel of values after the other: it stays in L1 while all rows pass by.
  void add_loaded_values(Index block_begin) {
    find_tiles();
    const KeyBlock<TKV> next = block_at(block_begin + kAttentionKeyBlock);
    Ahead ahead{head_dim_, (std::max)(next.count, 0), width_ / Tile::kPanel * rows_};
    for (Index c = 0; c < width_; c += Tile::kPanel)
      Tile::for_row_tiles(rows_, [&](auto tile, Index r) {
        ahead.step(tile, [&](int j) { return next.key(j); });
        add_panel<decltype(tile)::value>(r, c, s_.tiles[r].one_piece);
      });
  }

  template <int R>
  void add_panel(Index r, Index c, bool one_piece) {
    Tile::template add_panel<R>({s_.scores + r * kAttentionKeyBlock, kAttentionKeyBlock, 1},
                                s_.values + c, value_stride_, s_.ranges + r, one_piece,
                                s_.factors + r, s_.now.sums + r * width_ + c, width_);
  }

  /// Whether a value that a row does not see is no number: its weight of 0 would not keep it out.
  bool hides_bad_values(const KeyBlock<TKV>& block) const {
    if (!kPairs && s_.hidden == nullptr) return false;
    KeyBits hidden = 0;
    for (Index r = 0; r < rows_; ++r) hidden |= hidden_from(r, block.count);
    bool bad = false;
    for_each_run(hidden, [&](int begin, int end) {
      for (int j = begin; j < end; ++j)
        bad = bad ||
              !Tile::all_finite(block.value(j), static_cast<C>(block.value_scale(j)), value_dim_);
    });
    return bad;
  }

  /// Keys that row r multiplies by weights of 0, because it does not see them: of pairs all of the
  /// block. A row that sees none takes nothing.
  KeyBits hidden_from(Index r, int count) const {
    const BlockRange& range = s_.ranges[r];
    if (range.empty()) return 0;
    return (kPairs ? keys_between(0, count) & ~keys_of(range) : 0) |
           (s_.hidden != nullptr ? s_.hidden[r] : 0);
  }

  /// add_values with zeros for what a row does not see.
  void add_values_row_by_row(const KeyBlock<TKV>& block) {
    for (Index r = 0; r < rows_; ++r) {
      C* const weights = s_.scores + r * kAttentionKeyBlock;
      if constexpr (kPairs) {
        pairs().load_values(*here_, hidden_from(r, block.count));
        pairs().add_values(1, weights, s_.ranges + r, s_.factors + r, s_.now.sums + r * width_);
        continue;
      }
      load_stored_values(block);
      for_each_run(s_.hidden[r], [&](int begin, int end) {
        fill_line(s_.values + begin * value_stride_, (end - begin) * value_stride_, V::zero());
        std::fill(weights + begin, weights + end, C(0));  // a scale may be NaN
      });
      for (Index c = 0; c < width_; c += Tile::kPanel)
        add_panel<1>(r, c, Tile::one_piece(s_.ranges + r, 1));
    }
  }

  /// Finds the rows of a block, unless they were asked for before.
  void find_block(Index block_begin) {
    if (const BlockRows<TKV>* rows = rows_at(block_begin); rows != here_) std::swap(here_, next_);
  }

  void score_in_place(const TKV* const* then) {
    const KeySpan seen = seen_by_tile(s_.ranges, static_cast<int>(rows_));
    Few::with_rows(rows_, [&](auto tile) {
      Few::template score<decltype(tile)::value>(s_.keys, head_dim_, *here_, then, seen, s_.scores);
    });
  }

  const KvSource<TKV>& source_;
  const AttentionScratch<C>& s_;
  C scale_;
  Index head_dim_, value_dim_, width_, value_stride_;
  const problem::AttentionSequence* sequence_ = nullptr;
  Index kv_head_ = 0, rows_ = 0;
  bool tiles_found_ = false;  // for the ranges as they are
  Int8Scores<Isa> int8_scores_;
  BlockRows<TKV> blocks_[2];  // where they are read in place or have scales
  BlockRows<TKV>*here_ = blocks_, *next_ = blocks_ + 1;
};

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
