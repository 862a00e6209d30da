/// \file
/// CUDA kernel of attention forward for bfloat16 and half, on the tensor cores (Dao,
/// "FlashAttention-2", 2023): a block of 128 threads for 64 rows of a KV head's queries, position
/// by position and of each position the heads of the group, so that a step of decoding fills rows
/// with a group, and all read the keys once. Over tiles of 64 keys at absolute positions, the next
/// one on its way to shared memory while one is worked on; tiles that nobody sees are left out.
/// Scores stay in registers: powers of 2 in float (attention_tile_state.cuh), rounded to 16 bits
/// for their product with the values, which is summed in float. Where scores are products times a
/// scale, which is so without softcap, slopes, bias and function, that scale is one with the
/// logarithm's, and nothing but a branch is left of the rest. Splits of 512 keys are merged in
/// order (attention_call.cuh); where tiles do not fill the device, a block has one split only. A
/// split whose scores are too large for their rounding takes those rows' in double.
///
/// A key that a row does not see has weight 0 there. Values that are not finite are taken out of
/// tiles that some rows do not see in whole, and added to the rows that see them. Masks and biases
/// are read where they lie, for the keys that position lets a row see: 8 bytes of bias at a time by
/// neighbouring lanes, 4 bytes a pair beside 4 * head_dim flops, once for each use (twice where
/// scores are large). With them no tile counts as seen in whole, and a warp whose rows see nothing
/// of a tile leaves its products out. Their kernel is one of its own: it has no registers to spare
/// either.
///
/// Few rows: each key and value is read once for each 64 rows of a group, 2 (head_dim + value_dim)
/// bytes a key. Many: 4 * head_dim flops a visible pair, of which tensor cores see 1.1 (causal: the
/// tiles on the diagonal). Measured on an H200 (CUDA 13, bfloat16, 32 heads of 128, 8 of keys, a
/// cold L2): a causal prompt of 2048 tokens 374 us, of 8192 4.71 ms (117 TFLOP/s, 18% of what
/// mma.sync gives; PyTorch's flash attention, calls in a row: 160 us, 1.71 ms); a step of 64
/// sequences with 4096 keys each 633 us (40% of the bandwidth of copies).
#pragma once

#include <cmath>
#include <limits>

#include "attention_call.cuh"
#include "attention_tile_rows.cuh"
#include "attention_tile_state.cuh"
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
  using State = AttentionTileState<T, Chunks>;
  static constexpr double kFactor = State::kFactor;
  static constexpr int kWarps = kTileRows / 16, kThreads = kWarps * kWarp;
  /// Tiles in shared memory: the next one as well, where heads leave room for it (one takes 113 of
  /// the 163 KiB of sm_80 at 256).
  static constexpr int kBuffers = Chunks > 4 ? 1 : 2;
  static constexpr float kInfinity = std::numeric_limits<float>::infinity();
  Call call;
  const Index* first_tile;  // (batch + 1)
  Index tiles, splits;      // splits 0: a block has all of its rows
  AttentionPart* parts;     // (rows, heads, splits)
  float* part_sums;         // (rows, heads, splits or 1, value_dim), times kFactor

  EIGENFORMER_HOST_DEVICE static Index chunks_of(Index width) {
    return (width + kTileDepth - 1) / kTileDepth;
  }
  static std::size_t shared_size(Index head_dim, Index value_dim) {
    return shared_bytes<T>(chunks_of(head_dim) * kQueries) +
           shared_bytes<T>(chunks_of(head_dim) * kKeys) * kBuffers +
           shared_bytes<T>(chunks_of(value_dim) * kValues) * kBuffers +
           shared_bytes<T>(kTileRows * kPairStride<T>) + shared_bytes<int>(2 * kWarps) +
           shared_bytes<AttentionPart>(kTileRows);
  }

  template <typename Block>
  EIGENFORMER_DEVICE void operator()(Block& block) const {
    const Index keys = chunks_of(call.p.head_dim) * kKeys,
                values = chunks_of(call.p.value_dim) * kValues;
    const auto query_array = block.template shared<T>(chunks_of(call.p.head_dim) * kQueries);
    const auto key_array = block.template shared<T>(kBuffers * keys);
    const auto value_array = block.template shared<T>(kBuffers * values);
    const auto pairs = block.template shared<T>(kTileRows * kPairStride<T>);
    const auto flags = block.template shared<int>(2 * kWarps);
    const auto totals = block.template shared<AttentionPart>(kTileRows);
    const Arrays<decltype(pairs), decltype(flags), decltype(totals)> arrays{
        query_array, key_array, value_array, pairs, flags, totals, keys, values};
    const Index each = splits > 0 ? splits : 1, units = tiles * call.p.kv_heads * each;
    for (Index u = block.index(); u < units; u += block.count()) {
      const Index unit = units - 1 - u;  // of a causal sequence the longest rows first
      const Index part = unit / call.p.kv_heads, tile = part / each,
                  b = sequence_at(call.p.batch, tile, [&](Index i) { return first_tile[i]; });
      attend(block, arrays,
             Rows(call, call.p.sequences[b], unit % call.p.kv_heads,
                  (tile - first_tile[b]) * kTileRows),
             part % each);
      block.barrier();
    }
  }

 private:
  /// Elements of a chunk of 32 columns.
  static constexpr Index kQueries = kTileRows * kPairOperand<T>, kKeys = kTile * kPairOperand<T>,
                         kValues = kTile * kRowOperand<T>;

  template <typename Operand, typename Flags, typename Totals>
  struct Arrays {
    Operand queries;       // (chunks, rows, 32)
    Operand keys, values;  // (kBuffers, chunks, 64, 32), a tile and the next one
    Operand pairs;         // (rows, 64), where values are not finite
    Flags flags;           // (2, warps)
    Totals totals;         // (rows) of the splits so far
    Index key_size, value_size;
  };

  template <typename Block, typename A>
  EIGENFORMER_DEVICE void attend(Block& block, const A& a, const Rows& rows, Index split) const {
    const Index low = splits > 0 ? split * kSplitKeys : 0,
                high = splits > 0 ? low + kSplitKeys : rows.end,
                end = high < rows.end ? high : rows.end, from = rows.begin / kTile * kTile;
    Index at = rows.next_tile(low < from ? from : low, end);
    if (splits > 0 && at >= end) return;
    load_queries(block, a, rows);
    bool first = true;
    do {
      State state;
      AttentionPart found[2];
      const Index split_end = (at / kSplitKeys + 1) * kSplitKeys;
      state.clear();
      if (at < end) find_part(block, a, rows, at, split_end < end ? split_end : end, state, found);
      at = rows.next_tile(split_end, end);
      if (splits > 0)
        write_split(block, rows, split, state, found);
      else
        merge(block, a, rows, state, found, first, at >= end);
      first = false;
    } while (at < end);
  }

  template <typename Block, typename A>
  EIGENFORMER_DEVICE void load_queries(Block& block, const A& a, const Rows& rows) const {
    const int lane = block.thread() % 4 * 8;
    for (int r = block.thread() / 4; r < kTileRows; r += kThreads / 4) {
      const T* const from = r < rows.count ? call.query(rows.query_of(r)) : nullptr;
      for (Index c = 0; c < chunks_of(call.p.head_dim); ++c)
        a.queries.store_pack(c * kQueries + r * kPairOperand<T> + lane,
                             row_pack<8>(from, c * kTileDepth + lane, call.p.head_dim));
    }
  }

  /// Whether scores are products times the scale.
  EIGENFORMER_DEVICE bool is_plain() const {
    const auto& p = call.p;
    if constexpr (problem::is_score_function<Function>) return false;
    return !(p.softcap > 0) && p.alibi_slopes == nullptr && !p.bias.present() && p.scale > 0 &&
           p.scale * State::kLog2OfE < kInfinity;
  }

  /// The keys [begin, end) of one split, of which somebody sees the first.
  template <typename Block, typename A>
  EIGENFORMER_DEVICE void find_part(Block& block, const A& a, const Rows& rows, Index begin,
                                    Index end, State& state, AttentionPart (&found)[2]) const {
    EIGENFORMER_UNROLL_ALL
    for (int k = 0; k < 2; ++k) {
      state.wide[k] = false;
      state.references[k] = 0;
      state.unit[k] = is_plain() ? call.p.scale * State::kLog2OfE : State::kLog2OfE;
    }
    double maximum[2];
    for (;;) {
      state.clear();
      pass_over_keys(block, a, rows, begin, end, state);
      bool large[2];
      EIGENFORMER_UNROLL_ALL
      for (int k = 0; k < 2; ++k) {
        state.weights[k] += block.shuffle_xor(state.weights[k], 1);
        state.weights[k] += block.shuffle_xor(state.weights[k], 2);
        maximum[k] = static_cast<double>(state.offset[k]) / -static_cast<double>(State::kLog2OfE);
        large[k] = is_large_score<T, T>(maximum[k]);  // weights are not to be trusted then
      }
      if (!any_in_block(block, a.flags, kWarps, large[0] || large[1])) break;
      EIGENFORMER_UNROLL_ALL
      for (int k = 0; k < 2; ++k)
        if (large[k]) {
          state.wide[k] = true;
          state.references[k] += maximum[k];  // to 2^-22 of it: the greatest scores take more turns
          state.unit[k] = State::kLog2OfE;
        }
    }
    EIGENFORMER_UNROLL_ALL
    for (int k = 0; k < 2; ++k) {
      // masks: a vote of the row's four lanes
      const bool seen = !Masked || (block.ballot(state.seen[k]) >> block.lane() / 4 * 4 & 15u) != 0;
      found[k] = {state.references[k] + maximum[k], static_cast<double>(state.weights[k]), seen};
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
      if (kBuffers > 1) {
        block.template wait_async<0>();
        block.barrier();  // the tile is here, and nobody needs the one before any more
        if (next < end) load_tile(block, a, rows, next, 1 - buffer);
        block.commit_async();
      } else {
        block.barrier();
        load_tile(block, a, rows, at, buffer);
        block.commit_async();
        block.template wait_async<0>();
        block.barrier();
      }
      const bool whole = rows.see_whole(at);
      bool not_finite = false;
      if (!whole)
        not_finite = any_in_block(block, a.flags, 0, make_values_finite(block, a, buffer));
      if (block.warp() * 16 < rows.count) {
        add_tile(block, a, rows, at, whole, not_finite, buffer, state);
        if (not_finite) add_not_finite(block, a, rows, at, state);
      }
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
    load_rows<false, kPairOperand<T>>(block, a.keys, buffer * a.key_size, call.p.head_dim, rows,
                                      at);
    load_rows<true, kRowOperand<T>>(block, a.values, buffer * a.value_size, call.p.value_dim, rows,
                                    at);
  }
  template <bool Value, int Stride, typename Block, typename Array>
  EIGENFORMER_DEVICE static void load_rows(Block& block, const Array& array, Index base,
                                           Index width, const Rows& rows, Index at) {
    const int column = block.thread() % 4 * 8, chunks = static_cast<int>(chunks_of(width));
    EIGENFORMER_UNROLL_ALL
    for (int r = block.thread() / 4; r < kTile; r += kThreads / 4) {
      const T* const from = rows.key(Value, at + r);
      const Index to = base + r * Stride + column;
      if (from != nullptr && packs_fit<8>(from, 0) && width % kTileDepth == 0) {
        for (int c = 0; c < chunks; ++c)
          block.copy_async(array, to + c * (kTile * Stride), from + column + c * kTileDepth);
        continue;
      }
      for (int c = 0; c < chunks; ++c)
        array.store_pack(to + c * (kTile * Stride),
                         row_pack<8>(from, column + c * kTileDepth, width));
    }
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
  EIGENFORMER_DEVICE static void find_seen(Block& block, const Rows& rows, Index at,
                                           unsigned (&seen)[2]) {
    EIGENFORMER_UNROLL_ALL
    for (int k = 0; k < 2; ++k) {
      const int r = Pairs::row(block.thread(), k);
      const TileRange here = rows.range(r, at);
      seen[k] =
          seen_columns<Pairs>(block.thread(), [&](int j) { return rows.sees(r, at, here, j); });
    }
  }

  template <typename Block, typename A>
  EIGENFORMER_DEVICE void add_tile(Block& block, const A& a, const Rows& rows, Index at, bool whole,
                                   bool not_finite, int buffer, State& state) const {
    unsigned seen[2] = {0xffff, 0xffff};  // bit c: whether row k sees the thread's column c
    if (!whole) {
      find_seen(block, rows, at, seen);
      if (!block.any((seen[0] | seen[1]) != 0)) return;  // nobody of the warp
    }
    Pairs pairs;
    multiply(block, a, buffer, pairs);
    score(block, rows, at, seen, pairs, state);
    if (!whole) State::hide(seen, pairs);
    EIGENFORMER_UNROLL_ALL
    for (int k = 0; k < 2; ++k) {
      if (Masked) state.seen[k] = state.seen[k] || seen[k] != 0;
      state.add_weights(block, k, pairs);
    }
    if (call.p.value_dim > (Chunks - 1) * kTileDepth)
      add_values<true>(block, a, buffer, pairs, state);
    else
      add_values<false>(block, a, buffer, pairs, state);
    if (!not_finite) return;
    EIGENFORMER_UNROLL_ALL
    for (int k = 0; k < 2; ++k) {
      EIGENFORMER_UNROLL_ALL
      for (int c = 0; c < Pairs::kColumns; ++c)
        a.pairs.store(
            Pairs::row(block.thread(), k) * kPairStride<T> + Pairs::column(block.thread(), c),
            static_cast<T>(pairs.at(k, c)));
    }
  }

  /// Weights times values. All: there are values of every chunk.
  template <bool All, typename Block, typename A>
  EIGENFORMER_DEVICE void add_values(Block& block, const A& a, int buffer, const Pairs& pairs,
                                     State& state) const {
    EIGENFORMER_UNROLL_ALL
    for (int k = 0; k < kTile / 16; ++k) {
      const auto fragment = pairs.fragment(block, k);
      EIGENFORMER_UNROLL_ALL
      for (int c = 0; c < Chunks; ++c)
        if (All || c * kTileDepth < call.p.value_dim)
          state.sums[c].add(block, fragment, k, a.values, buffer * a.value_size + c * kValues);
    }
  }

  template <typename Block, typename A>
  EIGENFORMER_DEVICE void multiply(Block& block, const A& a, int buffer, Pairs& pairs) const {
    const Index keys = buffer * a.key_size, chunks = chunks_of(call.p.head_dim);
    pairs.clear();
    Index c = 0;
    for (; c + 4 <= chunks; c += 4) {
      EIGENFORMER_UNROLL_ALL
      for (int i = 0; i < 4; ++i)
        pairs.add(block, a.queries, (c + i) * kQueries, a.keys, keys + (c + i) * kKeys, kTileDepth);
    }
    for (; c < chunks; ++c)
      pairs.add(block, a.queries, c * kQueries, a.keys, keys + c * kKeys, kTileDepth);
  }

  /// Products to scores, of the columns that are seen.
  template <typename Block>
  EIGENFORMER_DEVICE void score(Block& block, const Rows& rows, Index at, const unsigned (&seen)[2],
                                Pairs& pairs, const State& state) const {
    const auto& p = call.p;
    if (!is_plain()) {
      EIGENFORMER_UNROLL_ALL
      for (int k = 0; k < 2; ++k) {
        const int r = Pairs::row(block.thread(), k);
        if (r >= rows.count) continue;
        const auto row = call.score_row(rows.query_of(r));
        EIGENFORMER_UNROLL_ALL
        for (int c = 0; c < Pairs::kColumns; ++c)
          if ((seen[k] >> c & 1) != 0)
            pairs.at(k, c) = problem::score_of_product<float, Masked>(
                                 p, p.function, row, at + Pairs::column(block.thread(), c),
                                 pairs.at(k, c) * p.scale)
                                 .value;
      }
    }
    if (!state.wide[0] && !state.wide[1]) return;
    rescore(block, pairs, static_cast<Pairs*>(nullptr), state.wide, state.references,
            [&](int r, int j) -> problem::Score<double> {
              if (!rows.sees(r, at, rows.range(r, at), j)) return {0, 0};
              const AttentionQuery q = rows.query_of(r);
              return score_of_rows<double, Masked>(p, call.query(q), rows.key(false, at + j),
                                                   call.score_row(q), at + j);
            });
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

  /// body(column, it and its neighbour) for the sums of row k, those within value_dim.
  template <typename Block, typename Body>
  EIGENFORMER_DEVICE void for_each_sum(Block& block, int k, const State& state,
                                       const Body& body) const {
    EIGENFORMER_UNROLL_ALL
    for (int c = 0; c < Chunks; ++c) {
      EIGENFORMER_UNROLL_ALL
      for (int i = 2 * k; i < RowTile<T>::kSize; i += 4) {
        const Index column = c * kTileDepth + RowTile<T>::column(block.thread(), i);
        if (column < call.p.value_dim)
          body(column, Pack<float, 2>{{state.sums[c].values[i], state.sums[c].values[i + 1]}});
      }
    }
  }
  /// Two neighbours from `column` on, in rows of value_dim.
  template <typename U>
  EIGENFORMER_DEVICE void write(U* row, Index column, const Pack<U, 2>& two) const {
    if (column + 2 <= call.p.value_dim && packs_fit<2>(row + column, 0))
      store_pack(two, row + column);
    else
      for (int i = 0; i < 2 && column + i < call.p.value_dim; ++i) row[column + i] = two[i];
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
      for_each_sum(block, k, state, [&](Index column, const Pack<float, 2>& two) {
        write(part_sums + at * call.p.value_dim, column, two);
      });
    }
  }

  /// A split joins those before it; after the last one the output.
  template <typename Block, typename A>
  EIGENFORMER_DEVICE void merge(Block& block, const A& a, const Rows& rows, const State& state,
                                const AttentionPart (&found)[2], bool first, bool last) const {
    EIGENFORMER_UNROLL_ALL
    for (int k = 0; k < 2; ++k) {
      const int r = Pairs::row(block.thread(), k);
      const auto merged = merge_parts<float>(first ? AttentionPart{} : a.totals.load(r), found[k]);
      block.warp_barrier();  // the four lanes of the row have read it
      if (block.thread() % 4 == 0) a.totals.store(r, merged.part);
      const AttentionQuery q = rows.query_of(r);
      if (q.in_sequence >= q.s->tensor_rows) continue;
      const Index at = call.index_of(q) * call.p.value_dim;
      typename Call::End end;
      if (last) end = call.end_of(q, merged.part);
      if (last && block.thread() % 4 == 0) call.write_log_sum_exp(q, end.log_sum_exp);
      for_each_sum(block, k, state, [&](Index column, Pack<float, 2> two) {
        for (int i = 0; i < 2; ++i) {
          const bool here = !first && column + i < call.p.value_dim;
          two[i] = merge_sums(merged, here ? part_sums[at + column + i] : 0.0f, two[i]);
        }
        if (!last) return write(part_sums + at, column, two);
        Pack<T, 2> output;
        for (int i = 0; i < 2; ++i)
          output[i] =
              end.factor == 0
                  ? T(0)
                  : call.output_of(static_cast<double>(two[i]) * (end.factor / kFactor / 2));
        write(call.p.output + at, column, output);
      });
    }
  }
};

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
