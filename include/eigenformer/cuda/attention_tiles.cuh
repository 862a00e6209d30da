/// \file
/// CUDA kernel of attention forward for bfloat16 and half, on the tensor cores (Dao,
/// "FlashAttention-2", 2023): a block of 128 threads for 64 rows of a KV head's queries, position
/// by position and of each position the heads of the group, so that a step of decoding fills rows
/// with a group, and all read the keys once. Over tiles of 64 keys at absolute positions, the next
/// one on its way to shared memory while one is worked on; tiles that nobody sees are left out.
/// Scores stay in registers: exponentials of float, rounded to 16 bits for their product with the
/// values, which is summed in float. Splits of 512 keys are merged in order (attention_call.cuh);
/// where tiles do not fill the device, a block has one split only. A split whose scores are too
/// large for their rounding takes those rows' in double.
///
/// A key that a row does not see has weight 0 there. Values that are not finite are taken out of
/// tiles that some rows do not see in whole, and added to the rows that see them. Masks and biases
/// are read where they lie, for the keys that position lets a row see: 8 bytes of bias at a time by
/// neighbouring lanes, 4 bytes a pair beside 4 * head_dim flops, once for each use (twice where
/// scores are large). With them no tile counts as seen in whole, and a warp whose rows see nothing
/// of a tile leaves its products out. Their kernel is one of its own: it has no registers to spare
/// either, and half of the speed of the other one is expected.
///
/// Few rows: each key and value is read once for each 64 rows of a group, 2 (head_dim + value_dim)
/// bytes a key, and 80% of the bandwidth is expected with 16 KiB and more on their way to each
/// block. Many: 4 * head_dim flops a visible pair, of which tensor cores see 1.1 (causal: the tiles
/// on the diagonal); shared memory feeds them through mma.sync, and 35% to 45% of an H100's peak is
/// expected at head_dim 128, 30% at 256.
#pragma once

#include <cmath>
#include <limits>

#include "attention_call.cuh"
#include "attention_tile_rows.cuh"
#include "tile/pairs.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

/// value_dim is at most 32 * Chunks.
template <typename T, int Chunks, typename Function, bool Masked>
struct AttentionTiles {
  using Call = AttentionCall<T, T, Function>;
  using Rows = AttentionTileRows<Call, Masked>;
  using Pairs = PairTile<T>;
  static constexpr int kThreads = kTileThreads, kWarps = kTileThreads / kWarp;
  /// Tiles in shared memory: the next one as well, where heads leave room for it (one takes 113 of
  /// the 163 KiB of sm_80 at 256).
  static constexpr int kBuffers = Chunks > 4 ? 1 : 2;
  static constexpr float kInfinity = std::numeric_limits<float>::infinity();
  /// Weights are at most this: sums of a million finite bfloat16 are finite, and half has small
  /// weights as well.
  static constexpr double kFactor = std::is_same_v<T, half> ? 0x1p10 : 0x1p-20;
  Call call;
  const Index* first_tile;  // (batch + 1)
  Index tiles, splits;      // splits 0: a block has all of its rows
  AttentionPart* parts;     // (rows, heads, splits)
  float* part_sums;         // (rows, heads, splits or 1, value_dim), times kFactor

  EIGENFORMER_HOST_DEVICE static Index chunks_of(Index width) {
    return (width + kTileDepth - 1) / kTileDepth;
  }
  static std::size_t shared_size(Index head_dim, Index value_dim) {
    return shared_bytes<T>(chunks_of(head_dim) * kKeys) * (1 + kBuffers) +
           shared_bytes<T>(chunks_of(value_dim) * kValues) * kBuffers +
           shared_bytes<T>(kTile * kPairStride<T>) + shared_bytes<int>(2 * kWarps);
  }

  template <typename Block>
  EIGENFORMER_DEVICE void operator()(Block& block) const {
    const Index keys = chunks_of(call.p.head_dim) * kKeys,
                values = chunks_of(call.p.value_dim) * kValues;
    const auto query_array = block.template shared<T>(keys);
    const auto key_array = block.template shared<T>(kBuffers * keys);
    const auto value_array = block.template shared<T>(kBuffers * values);
    const auto pairs = block.template shared<T>(kTile * kPairStride<T>);
    const auto flags = block.template shared<int>(2 * kWarps);
    const Arrays<decltype(pairs), decltype(flags)> arrays{
        query_array, key_array, value_array, pairs, flags, keys, values};
    const Index each = splits > 0 ? splits : 1, units = tiles * call.p.kv_heads * each;
    for (Index u = block.index(); u < units; u += block.count()) {
      const Index unit = units - 1 - u;  // of a causal sequence the longest rows first
      const Index part = unit / call.p.kv_heads, tile = part / each,
                  b = sequence_at(call.p.batch, tile, [&](Index i) { return first_tile[i]; });
      attend(
          block, arrays,
          Rows(call, call.p.sequences[b], unit % call.p.kv_heads, (tile - first_tile[b]) * kTile),
          part % each);
      block.barrier();
    }
  }

 private:
  /// Elements of a chunk of 32 columns.
  static constexpr Index kKeys = kTile * kPairOperand<T>, kValues = kTile * kRowOperand<T>;

  template <typename Operand, typename Flags>
  struct Arrays {
    Operand queries;       // (chunks, 64, 32)
    Operand keys, values;  // (kBuffers, chunks, 64, 32), a tile and the next one
    Operand pairs;         // (64, 64), where values are not finite
    Flags flags;           // (2, warps)
    Index key_size, value_size;
  };

  /// A thread's two rows.
  struct State {
    float maximum[2], weights[2];  // the weights of this lane
    bool seen[2];                  // whether this lane has seen a key
    bool wide[2];                  // scores are in double, relative to
    double references[2];
    RowTile<T> sums[Chunks];
  };

  template <typename Block, typename A>
  EIGENFORMER_DEVICE void attend(Block& block, const A& a, const Rows& rows, Index split) const {
    const Index low = splits > 0 ? split * kSplitKeys : 0,
                high = splits > 0 ? low + kSplitKeys : rows.end,
                end = high < rows.end ? high : rows.end, from = rows.begin / kTile * kTile;
    Index at = rows.next_tile(low < from ? from : low, end);
    if (splits > 0 && at >= end) return;
    for (Index c = 0; c < chunks_of(call.p.head_dim); ++c)
      load_operand<T, kPairOperand<T>>(
          block, a.queries, c * kKeys, c * kTileDepth, call.p.head_dim,
          [&](Index r) { return r < rows.count ? call.query(rows.query_of(r)) : nullptr; },
          [](auto&) {});
    AttentionPart totals[2];
    bool first = true;
    do {
      State state;
      AttentionPart found[2];
      const Index split_end = (at / kSplitKeys + 1) * kSplitKeys;
      clear(state);
      if (at < end) find_part(block, a, rows, at, split_end < end ? split_end : end, state, found);
      at = rows.next_tile(split_end, end);
      if (splits > 0)
        write_split(block, rows, split, state, found);
      else
        merge(block, rows, state, found, totals, first, at >= end);
      first = false;
    } while (at < end);
  }

  EIGENFORMER_DEVICE static void clear(State& state) {
    EIGENFORMER_UNROLL_ALL
    for (int k = 0; k < 2; ++k) {
      state.maximum[k] = -kInfinity;
      state.weights[k] = 0;
      state.seen[k] = false;
    }
    EIGENFORMER_UNROLL_ALL
    for (auto& sums : state.sums) sums.clear();
  }

  /// The keys [begin, end) of one split, of which somebody sees the first.
  template <typename Block, typename A>
  EIGENFORMER_DEVICE void find_part(Block& block, const A& a, const Rows& rows, Index begin,
                                    Index end, State& state, AttentionPart (&found)[2]) const {
    EIGENFORMER_UNROLL_ALL
    for (int k = 0; k < 2; ++k) {
      state.wide[k] = false;
      state.references[k] = 0;
    }
    for (;;) {
      clear(state);
      pass_over_keys(block, a, rows, begin, end, state);
      bool large[2];
      EIGENFORMER_UNROLL_ALL
      for (int k = 0; k < 2; ++k) {
        state.weights[k] += block.shuffle_xor(state.weights[k], 1);
        state.weights[k] += block.shuffle_xor(state.weights[k], 2);
        large[k] = !state.wide[k] && is_large_score<T, T>(state.maximum[k]) &&
                   state.weights[k] > 0 && state.weights[k] < kInfinity;
      }
      if (!any_in_block(block, a.flags, kWarps, large[0] || large[1])) break;
      EIGENFORMER_UNROLL_ALL
      for (int k = 0; k < 2; ++k)
        if (large[k]) {
          state.wide[k] = true;
          state.references[k] = state.maximum[k];
        }
    }
    EIGENFORMER_UNROLL_ALL
    for (int k = 0; k < 2; ++k) {
      // masks: a vote of the row's four lanes
      const bool seen = !Masked || (block.ballot(state.seen[k]) >> block.lane() / 4 * 4 & 15u) != 0;
      found[k] = {state.references[k] + static_cast<double>(state.maximum[k]),
                  static_cast<double>(state.weights[k]), seen};
    }
  }

  /// A barrier. flags[at ...] may be used again after the next one.
  template <typename Block, typename Flags>
  EIGENFORMER_DEVICE static bool any_in_block(Block& block, const Flags& flags, int at, bool here) {
    here = block.any(here);
    if (block.lane() == 0) flags.store(at + block.warp(), here);
    block.barrier();
    bool any = false;
    for (int w = 0; w < kWarps; ++w) any = any || flags.load(at + w) != 0;
    return any;
  }

  template <typename Block, typename A>
  EIGENFORMER_DEVICE void pass_over_keys(Block& block, const A& a, const Rows& rows, Index begin,
                                         Index end, State& state) const {
    int buffer = 0;
    if (kBuffers > 1) load_tile(block, a, rows, begin, buffer);
    block.commit_async();
    for (Index at = begin, next; at < end; at = next) {
      next = rows.next_tile(at + kTile, end);
      const Index coming = kBuffers > 1 ? next : at;
      if (coming < end) load_tile(block, a, rows, coming, kBuffers - 1 - buffer);
      block.commit_async();
      block.template wait_async<kBuffers - 1>();
      const bool whole = rows.see_whole(at);
      bool not_finite = false;
      if (whole)
        block.barrier();
      else
        not_finite = any_in_block(block, a.flags, 0, make_values_finite(block, a, buffer));
      if (block.warp() * 16 < rows.count) add_tile(block, a, rows, at, whole, buffer, state);
      if (not_finite) add_not_finite(block, a, rows, at, state);
      block.barrier();
      buffer = kBuffers - 1 - buffer;
    }
  }

  /// body(where in the array, row, column) for the packs of a tile that this thread brings.
  template <typename Block, typename Body>
  EIGENFORMER_DEVICE static void for_each_pack(Block& block, Index base, Index width, Index stride,
                                               const Body& body) {
    for (Index r = block.thread() / 4; r < kTile; r += kThreads / 4)
      for (Index c = 0; c < chunks_of(width); ++c)
        body(base + (c * kTile + r) * stride + block.thread() % 4 * 8, r,
             c * kTileDepth + block.thread() % 4 * 8);
  }
  template <typename Block, typename A>
  EIGENFORMER_DEVICE void load_tile(Block& block, const A& a, const Rows& rows, Index at,
                                    int buffer) const {
    const auto load = [&](const auto& array, Index base, Index width, Index stride, bool value) {
      for_each_pack(block, base, width, stride, [&](Index to, Index r, Index column) {
        const T* const from = rows.key(value, at + r);
        if (from != nullptr && column + 8 <= width && packs_fit<8>(from + column, 0))
          block.copy_async(array, to, from + column);
        else
          array.store_pack(to, row_pack<8>(from, column, width));
      });
    };
    load(a.keys, buffer * a.key_size, call.p.head_dim, kPairOperand<T>, false);
    load(a.values, buffer * a.value_size, call.p.value_dim, kRowOperand<T>, true);
  }
  template <typename Block, typename A>
  EIGENFORMER_DEVICE bool make_values_finite(Block& block, const A& a, int buffer) const {
    bool found = false;
    for_each_pack(block, buffer * a.value_size, call.p.value_dim, kRowOperand<T>,
                  [&](Index at, Index, Index) {
                    auto values = a.values.template pack<Pack<T, 8>>(at);
                    if (!make_finite(values)) return;
                    a.values.store_pack(at, values);
                    found = true;
                  });
    return found;
  }

  template <typename Block>
  EIGENFORMER_DEVICE void find_seen(Block& block, const Rows& rows, Index at, bool whole,
                                    unsigned (&seen)[2]) const {
    EIGENFORMER_UNROLL_ALL
    for (int k = 0; k < 2; ++k) {
      const int r = Pairs::row(block.thread(), k);
      const TileRange here = rows.range(r, at);
      if (whole)
        seen[k] = r < rows.count ? kAllLanes : 0;
      else
        seen[k] =
            seen_columns<Pairs>(block.thread(), [&](int j) { return rows.sees(r, at, here, j); });
    }
  }

  template <typename Block, typename A>
  EIGENFORMER_DEVICE void add_tile(Block& block, const A& a, const Rows& rows, Index at, bool whole,
                                   int buffer, State& state) const {
    unsigned seen[2];  // bit c: whether row k sees the thread's column c
    if constexpr (Masked) {
      find_seen(block, rows, at, whole, seen);
      if (!block.any((seen[0] | seen[1]) != 0)) return;  // nobody of the warp
      EIGENFORMER_UNROLL_ALL
      for (int k = 0; k < 2; ++k) state.seen[k] = state.seen[k] || seen[k] != 0;
    }
    Pairs pairs;
    pairs.clear();
    for (Index c = 0; c < chunks_of(call.p.head_dim); ++c)
      pairs.add(block, a.queries, c * kKeys, a.keys, buffer * a.key_size + c * kKeys, kTileDepth);
    if constexpr (!Masked) find_seen(block, rows, at, whole, seen);
    score(block, rows, at, seen, pairs, state);
    EIGENFORMER_UNROLL_ALL
    for (int k = 0; k < 2; ++k) add_weights(block, seen[k], k, pairs, state);
    EIGENFORMER_UNROLL_ALL
    for (int k = 0; k < kTile / 16; ++k) {
      const auto fragment = pairs.fragment(k);
      EIGENFORMER_UNROLL_ALL
      for (int c = 0; c < Chunks; ++c)
        if (c * kTileDepth < call.p.value_dim)
          state.sums[c].add(block, fragment, k, a.values, buffer * a.value_size + c * kValues);
    }
    if (!whole) {  // for add_not_finite
      EIGENFORMER_UNROLL_ALL
      for (int k = 0; k < 2; ++k) {
        EIGENFORMER_UNROLL_ALL
        for (int c = 0; c < Pairs::kColumns; ++c)
          a.pairs.store(
              Pairs::row(block.thread(), k) * kPairStride<T> + Pairs::column(block.thread(), c),
              static_cast<T>(pairs.at(k, c)));
      }
    }
  }

  /// Products to scores, of the columns that are seen.
  template <typename Block>
  EIGENFORMER_DEVICE void score(Block& block, const Rows& rows, Index at, const unsigned (&seen)[2],
                                Pairs& pairs, const State& state) const {
    const auto& p = call.p;
    EIGENFORMER_UNROLL_ALL
    for (int k = 0; k < 2; ++k) {
      const auto row = call.score_row(rows.query_of(Pairs::row(block.thread(), k)));
      EIGENFORMER_UNROLL_ALL
      for (int c = 0; c < Pairs::kColumns; ++c)
        if ((seen[k] >> c & 1) != 0)
          pairs.at(k, c) = problem::score_of_product<float, Masked>(
                               p, p.function, row, at + Pairs::column(block.thread(), c),
                               pairs.at(k, c) * p.scale)
                               .value;
    }
    rescore(block, pairs, static_cast<Pairs*>(nullptr), state.wide, state.references,
            [&](int r, int j) -> problem::Score<double> {
              if (!rows.sees(r, at, rows.range(r, at), j)) return {0, 0};
              const AttentionQuery q = rows.query_of(r);
              return score_of_rows<double, Masked>(p, call.query(q), rows.key(false, at + j),
                                                   call.score_row(q), at + j);
            });
  }

  /// Scores of row k to weights times kFactor; the online softmax.
  template <typename Block>
  EIGENFORMER_DEVICE void add_weights(Block& block, unsigned seen, int k, Pairs& pairs,
                                      State& state) const {
    constexpr float log2_of_e = 1.44269504f;
    float maximum = state.maximum[k];
    EIGENFORMER_UNROLL_ALL
    for (int c = 0; c < Pairs::kColumns; ++c) {
      const float score = pairs.at(k, c);
      if ((seen >> c & 1) != 0 && score > maximum) maximum = score;
    }
    maximum = Larger{}(maximum, block.shuffle_xor(maximum, 1));
    maximum = Larger{}(maximum, block.shuffle_xor(maximum, 2));
    const float reference = maximum == -kInfinity ? 0.0f : maximum;
    const float fall = std::exp2((state.maximum[k] - reference) * log2_of_e);
    float sum = 0;
    EIGENFORMER_UNROLL_ALL
    for (int c = 0; c < Pairs::kColumns; ++c) {
      const float weight =
          (seen >> c & 1) != 0 ? std::exp2((pairs.at(k, c) - reference) * log2_of_e) : 0.0f;
      sum += weight;
      pairs.at(k, c) = weight * static_cast<float>(kFactor);
    }
    state.maximum[k] = maximum;
    state.weights[k] = std::fma(state.weights[k], fall, sum);
    EIGENFORMER_UNROLL_ALL
    for (auto& sums : state.sums) {
      EIGENFORMER_UNROLL_ALL
      for (int i = 0; i < sums.kSize; ++i)
        if (i / 2 % 2 == k) sums.values[i] *= fall;
    }
  }

  /// What values that are not finite give to the rows that see them.
  template <typename Block, typename A>
  EIGENFORMER_DEVICE void add_not_finite(Block& block, const A& a, const Rows& rows, Index at,
                                         State& state) const {
    block.warp_barrier();  // the warp's own pairs
    for (int n = 0; n < Chunks * RowTile<T>::kSize; ++n) {
      const int i = n % RowTile<T>::kSize, r = RowTile<T>::row(block.thread(), i);
      const Index column =
          n / RowTile<T>::kSize * kTileDepth + RowTile<T>::column(block.thread(), i);
      const TileRange here = rows.range(r, at);
      if (column >= call.p.value_dim) continue;
      float more = 0;
      for (int j = 0; j < kTile; ++j) {
        if (!rows.sees(r, at, here, j)) continue;
        const T value = rows.key(true, at + j)[column];
        if (!is_finite(value))
          more +=
              static_cast<float>(a.pairs.load(r * kPairStride<T> + j)) * static_cast<float>(value);
      }
      EIGENFORMER_UNROLL_ALL
      for (int c = 0; c < Chunks; ++c) {
        EIGENFORMER_UNROLL_ALL
        for (int e = 0; e < RowTile<T>::kSize; ++e)
          if (c * RowTile<T>::kSize + e == n) state.sums[c].values[e] += more;
      }
    }
  }

  /// body(column, four neighbours of it) for the sums of row k, those within value_dim.
  template <typename Block, typename Body>
  EIGENFORMER_DEVICE void for_each_sum(Block& block, int k, const State& state,
                                       const Body& body) const {
    EIGENFORMER_UNROLL_ALL
    for (int c = 0; c < Chunks; ++c) {
      EIGENFORMER_UNROLL_ALL
      for (int e = 0; e < 2; ++e) {
        const auto& sums = state.sums[c].values;
        const int i = 2 * k + e;
        const Index column = c * kTileDepth + RowTile<T>::column(block.thread(), i);
        if (column < call.p.value_dim)
          body(column, Pack<float, 4>{{sums[i], sums[i + 4], sums[i + 8], sums[i + 12]}});
      }
    }
  }
  /// Four neighbours from `column` on, in rows of value_dim.
  template <typename U>
  EIGENFORMER_DEVICE void write(U* row, Index column, const Pack<U, 4>& four) const {
    if (column + 4 <= call.p.value_dim && packs_fit<4>(row + column, 0))
      store_pack(four, row + column);
    else
      for (int i = 0; i < 4 && column + i < call.p.value_dim; ++i) row[column + i] = four[i];
  }

  template <typename Block>
  EIGENFORMER_DEVICE void write_split(Block& block, const Rows& rows, Index split,
                                      const State& state, const AttentionPart (&found)[2]) const {
    EIGENFORMER_UNROLL_ALL
    for (int k = 0; k < 2; ++k) {
      const int r = Pairs::row(block.thread(), k);
      if (r >= rows.count) continue;
      const Index at = call.index_of(rows.query_of(r)) * splits + split;
      if (block.thread() % 4 == 0) parts[at] = found[k];
      for_each_sum(block, k, state, [&](Index column, const Pack<float, 4>& four) {
        write(part_sums + at * call.p.value_dim, column, four);
      });
    }
  }

  /// A split joins those before it; after the last one the output.
  template <typename Block>
  EIGENFORMER_DEVICE void merge(Block& block, const Rows& rows, const State& state,
                                const AttentionPart (&found)[2], AttentionPart (&totals)[2],
                                bool first, bool last) const {
    EIGENFORMER_UNROLL_ALL
    for (int k = 0; k < 2; ++k) {
      const AttentionQuery q = rows.query_of(Pairs::row(block.thread(), k));
      if (q.in_sequence >= q.s->tensor_rows) continue;
      const Index at = call.index_of(q) * call.p.value_dim;
      const auto merged = merge_parts<float>(totals[k], found[k]);
      totals[k] = merged.part;
      typename Call::End end;
      if (last) end = call.end_of(q, totals[k]);
      if (last && block.thread() % 4 == 0) call.write_log_sum_exp(q, end.log_sum_exp);
      for_each_sum(block, k, state, [&](Index column, Pack<float, 4> four) {
        Pack<T, 4> output;
        for (int i = 0; i < 4; ++i) {
          const bool here = !first && column + i < call.p.value_dim;
          four[i] = merge_sums(merged, here ? part_sums[at + column + i] : 0.0f, four[i]);
          output[i] =
              end.factor == 0
                  ? T(0)
                  : call.output_of(static_cast<double>(four[i]) * (end.factor / kFactor / 2));
        }
        if (last)
          write(call.p.output + at, column, output);
        else
          write(part_sums + at, column, four);
      });
    }
  }
};

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
