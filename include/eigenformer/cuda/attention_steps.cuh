/// \file
/// CUDA kernel of attention forward for steps of decoding: few queries a sequence, over a long
/// cache. A warp for each split of 512 keys of a KV head, whose queries (those of the group at each
/// position) are the 16 rows of one product of tiles: each key and value is read once, 16 bytes at
/// a time, through a ring in shared memory that the warp fills itself and nobody waits for at a
/// barrier (attention_ring.cuh).
///
/// Up to 16 rows of a sequence and KV head, without masks and bias, in the arithmetic of
/// attention_tiles.cuh step by step, so that a row has its bits there, too: whoever changes one of
/// them changes the other.
///
/// 2 (head_dim + value_dim) bytes a key, and 12 KiB on their way to each warp, of which a
/// multiprocessor of sm_90 has room for 11. Measured on an H200 (CUDA 13, bfloat16, 32 heads of 128,
/// 8 of keys, a cold L2): a step of 64 sequences with 4096 keys each 406 us (62% of the bandwidth of
/// copies; PyTorch 254 us), of one with 32768 keys 147 us (PyTorch 50). What it waits for is a
/// warp's own instructions: with a ring of twice that size, and half of the warps, it took 771 us.
/// Since then, and not run on a GPU: addresses by divisions of 32 bits, and the weights of
/// attention_tile_state.cuh in the place of exponentials.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>

#include "attention_ring.cuh"
#include "attention_tile_state.cuh"
#include "tile/pairs.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

/// head_dim and value_dim are at most kWidth.
template <typename T, typename Function, bool Masked>
struct AttentionSteps {
  using Call = AttentionCall<T, T, Function>;
  using Rows = AttentionTileRows<Call, Masked>;
  using Pairs = PairTile<T>;
  static constexpr int kThreads = kWarp;
  using Ring = AttentionRing<Call, Rows>;
  static constexpr int kRows = 16;
  static constexpr int kWidth = Ring::kWidth, kEach = Ring::kEach, kPieceKeys = Ring::kPieceKeys;
  static constexpr int kHalves = kWidth / (8 * kEach);  // chunks of a value that a lane takes
  using State = AttentionTileState<T, kWidth / kTileDepth>;
  static constexpr float kLog2OfE = State::kLog2OfE, kInfinity = State::kInfinity;
  static constexpr double kFactor = State::kFactor;
  Call call;
  Index splits;          // 0: there is one at most, and a warp writes the output
  AttentionPart* parts;  // (rows, heads, splits)
  float* part_sums;      // (rows, heads, splits, value_dim), times kFactor

  static std::size_t shared_size() {
    return shared_bytes<T>(Ring::kSize) + shared_bytes<T>(kRows * kPairStride<T>);
  }

  template <typename Block>
  EIGENFORMER_DEVICE void operator()(Block& block) const {
    const auto ring = block.template shared<T>(Ring::kSize);
    const auto pairs = block.template shared<T>(kRows * kPairStride<T>);
    const Arrays<decltype(ring)> arrays{ring, pairs};
    const Index each = splits > 0 ? splits : 1, units = call.p.batch * call.p.kv_heads * each;
    for (Index u = block.index(); u < units; u += block.count()) {
      const Index part = u / call.p.kv_heads;
      attend(block, arrays, Rows(call, call.p.sequences[part / each], u % call.p.kv_heads, 0),
             part % each);
    }
  }

 private:
  template <typename Array>
  struct Arrays {
    Array ring;   // keys and values
    Array pairs;  // (kRows, 64), where values are not finite
  };

  using Queries = FragmentA<T>[kWidth / 16];

  template <typename Block, typename A>
  EIGENFORMER_DEVICE void attend(Block& block, const A& a, const Rows& rows, Index split) const {
    const Index low = split * kSplitKeys, high = low + kSplitKeys,
                end = high < rows.end ? high : rows.end, from = rows.begin / kTile * kTile;
    Index at = rows.next_tile(low < from ? from : low, end);
    if (splits > 0 && at >= end) return;
    Queries queries;
    load_queries(block, rows, queries);
    State state;
    AttentionPart found[2];
    state.clear();
    if (at < end) find_part(block, a, rows, queries, at, end, state, found);
    if (splits > 0)
      write_split(block, rows, split, state, found);
    else
      write_output(block, rows, state, found);
  }

  /// As operand.cuh says: a lane's 16 bytes of a row are its parts of two instructions.
  template <typename Block>
  EIGENFORMER_DEVICE void load_queries(Block& block, const Rows& rows, Queries& queries) const {
    const auto row_of = [&](Index r) {
      return r < rows.count ? call.query(rows.query_of(r)) : nullptr;
    };
    const T *const low = row_of(block.lane() / 4), *const high = row_of(block.lane() / 4 + 8);
    EIGENFORMER_UNROLL_ALL
    for (int c = 0; c < Ring::kChunks / 4; ++c) {
      const Index column = c * kTileDepth + block.lane() % 4 * 8;
      const auto x = row_pack<8>(low, column, call.p.head_dim),
                 y = row_pack<8>(high, column, call.p.head_dim);
      EIGENFORMER_UNROLL_ALL
      for (int i = 0; i < 16; ++i)
        queries[2 * c + i / 8].values[i % 8] =
            (i / 2 % 2 == 0 ? x : y)[i / 8 * 4 + i % 8 / 4 * 2 + i % 2];
    }
  }

  /// The keys [begin, end) of one split, of which somebody sees the first.
  template <typename Block, typename A>
  EIGENFORMER_DEVICE void find_part(Block& block, const A& a, const Rows& rows,
                                    const Queries& queries, Index begin, Index end, State& state,
                                    AttentionPart (&found)[2]) const {
    EIGENFORMER_UNROLL_ALL
    for (int k = 0; k < 2; ++k) {
      state.wide[k] = false;
      state.references[k] = 0;
      state.unit[k] = is_plain() ? call.p.scale * kLog2OfE : kLog2OfE;
    }
    double maximum[2];
    for (;;) {
      state.clear();
      pass_over_keys(block, a, rows, queries, begin, end, state);
      bool large[2];
      EIGENFORMER_UNROLL_ALL
      for (int k = 0; k < 2; ++k) {
        state.weights[k] += block.shuffle_xor(state.weights[k], 1);
        state.weights[k] += block.shuffle_xor(state.weights[k], 2);
        maximum[k] = static_cast<double>(state.offset[k]) / -static_cast<double>(kLog2OfE);
        large[k] = is_large_score<T, T>(maximum[k]);  // weights are not to be trusted then
      }
      if (!block.any(large[0] || large[1])) break;
      EIGENFORMER_UNROLL_ALL
      for (int k = 0; k < 2; ++k)
        if (large[k]) {
          state.wide[k] = true;
          state.references[k] += maximum[k];
          state.unit[k] = kLog2OfE;
        }
    }
    EIGENFORMER_UNROLL_ALL
    for (int k = 0; k < 2; ++k) {
      // masks: a vote of the row's four lanes
      const bool seen = !Masked || (block.ballot(state.seen[k]) >> block.lane() / 4 * 4 & 15u) != 0;
      found[k] = {state.references[k] + maximum[k], static_cast<double>(state.weights[k]), seen};
    }
  }

  template <typename Block, typename A>
  EIGENFORMER_DEVICE void pass_over_keys(Block& block, const A& a, const Rows& rows,
                                         const Queries& queries, Index begin, Index end,
                                         State& state) const {
    const Ring ring{call, rows, end};
    auto here = ring.place_of(block, begin),
         next = ring.place_of(block, rows.next_tile(begin + kTile, end));
    block.warp_barrier();
    unroll<Ring::kPieces - 1>([&](auto i) {
      ring.template load<decltype(i)::value>(block, a.ring, here);
      block.commit_async();
    });
    while (here.at < end) {
      const Index at = here.at;
      // piece by piece; the one that the ring has room for is sent for before
      const auto take = [&](auto i) {
        constexpr int ahead = decltype(i)::value + Ring::kPieces - 1;
        block.template wait_async<Ring::kPieces - 2>();
        block.warp_barrier();
        ring.template load<ahead % Ring::kTilePieces>(block, a.ring,
                                                      ahead < Ring::kTilePieces ? here : next);
        block.commit_async();
      };
      Pairs pairs;
      pairs.clear();
      unroll<Ring::kOperandPieces>([&](auto i) {
        take(i);
        add_keys<decltype(i)::value>(block, a, queries, pairs);
      });
      const bool whole = rows.see_whole(at);
      weigh(block, a, rows, at, whole, pairs, state);
      bool not_finite = false;
      unroll<Ring::kOperandPieces>([&](auto i) {
        constexpr int piece = decltype(i)::value;
        take(std::integral_constant<int, Ring::kOperandPieces + piece>{});
        if (!whole) not_finite |= make_values_finite(block, a, Ring::kOperandPieces + piece);
        add_values<piece>(block, a, pairs, state);
      });
      if (!whole && block.any(not_finite)) add_not_finite(block, a, rows, at, state);
      here = next;
      next = ring.place_of(block, rows.next_tile(next.at + kTile, end));
    }
  }

  template <int Piece, typename Block, typename A>
  EIGENFORMER_DEVICE void add_keys(Block& block, const A& a, const Queries& queries,
                                   Pairs& pairs) const {
    EIGENFORMER_UNROLL_ALL
    for (int n = 0; n < kPieceKeys / 8; ++n) {
      const int at = Piece * (kPieceKeys / 8) + n;
      auto& v = pairs.values;
      FragmentD<T> sums{{v[4 * at], v[4 * at + 1], v[4 * at + 2], v[4 * at + 3]}};
      EIGENFORMER_UNROLL_ALL
      for (int c = 0; c < Ring::kChunks / 4; ++c) {
        if (c * 4 * kEach >= call.p.head_dim) break;
        const auto chunk = a.ring.template pack<Pack<T, kEach>>(
            Ring::at(Piece, 8 * n + block.lane() / 4, c * 4 + block.lane() % 4));
        EIGENFORMER_UNROLL_ALL
        for (int i = 0; i < kEach / 4; ++i)
          block.mma(
              sums, queries[c * (kEach / 4) + i],
              FragmentB<T>{{chunk[4 * i], chunk[4 * i + 1], chunk[4 * i + 2], chunk[4 * i + 3]}});
      }
      EIGENFORMER_UNROLL_ALL
      for (int i = 0; i < 4; ++i) v[4 * at + i] = sums.values[i];
    }
  }

  /// Ts to weights.
  template <typename Block, typename A>
  EIGENFORMER_DEVICE void weigh(Block& block, const A& a, const Rows& rows, Index at, bool whole,
                                Pairs& pairs, State& state) const {
    unsigned seen[2];  // bit c: whether row k sees the lane's column c
    EIGENFORMER_UNROLL_ALL
    for (int k = 0; k < 2; ++k) {
      const int r = Pairs::row(block.lane(), k);
      if (whole) {
        seen[k] = r < rows.count ? kAllLanes : 0;
      } else {
        const TileRange here = rows.range(r, at);
        seen[k] =
            seen_columns<Pairs>(block.lane(), [&](int j) { return rows.sees(r, at, here, j); });
      }
      if constexpr (Masked) state.seen[k] = state.seen[k] || seen[k] != 0;
    }
    if (!is_plain() || state.wide[0] || state.wide[1]) score(block, rows, at, seen, pairs, state);
    if (!whole) State::hide(seen, pairs);
    EIGENFORMER_UNROLL_ALL
    for (int k = 0; k < 2; ++k) {
      if (8 * k >= rows.count) continue;
      state.add_weights(block, k, pairs);
    }
    if (!whole) {  // for add_not_finite
      EIGENFORMER_UNROLL_ALL
      for (int i = 0; i < Pairs::kRows * Pairs::kColumns; ++i) {
        const int k = i / Pairs::kColumns, c = i % Pairs::kColumns;
        a.pairs.store(Pairs::row(block.lane(), k) * kPairStride<T> + Pairs::column(block.lane(), c),
                      static_cast<T>(pairs.at(k, c)));
      }
    }
  }

  /// Whether a score is a product times a scale that is one with the logarithm's.
  EIGENFORMER_DEVICE bool is_plain() const {
    const auto& p = call.p;
    if constexpr (problem::is_score_function<Function>) return false;
    return !(p.softcap > 0) && p.alibi_slopes == nullptr && !p.bias.present() && p.scale > 0 &&
           p.scale * kLog2OfE < kInfinity;
  }

  /// Ts to scores, of the columns that are seen.
  template <typename Block>
  EIGENFORMER_DEVICE void score(Block& block, const Rows& rows, Index at, const unsigned (&seen)[2],
                                Pairs& pairs, const State& state) const {
    const auto& p = call.p;
    EIGENFORMER_UNROLL_ALL
    for (int k = 0; k < 2; ++k) {
      const int r = Pairs::row(block.lane(), k);
      const AttentionQuery q = rows.query_of(r);
      const auto row = call.score_row(q);
      int c = 0;
      for (unsigned rest = seen[k] & 0xffffu; rest != 0; rest >>= 1, ++c) {
        if ((rest & 1) == 0) continue;
        const Index key = at + Pairs::column(block.lane(), c);
        float product = 0;
        EIGENFORMER_UNROLL_ALL
        for (int n = 0; n < Pairs::kColumns; ++n)  // c is not known when this is compiled
          if (n == c) product = pairs.at(k, n);
        const float found =
            state.wide[k] ? static_cast<float>(score_of_rows<double, Masked>(
                                                   p, call.query(q), rows.key(false, key), row, key)
                                                   .value -
                                               state.references[k])
            : is_plain()  ? product
                          : problem::score_of_product<float, Masked>(p, p.function, row, key,
                                                                    product * p.scale)
                               .value;
        EIGENFORMER_UNROLL_ALL
        for (int n = 0; n < Pairs::kColumns; ++n)
          if (n == c) pairs.at(k, n) = found;
      }
    }
  }

  /// Whether this lane has found values that are not finite, which are 0 from now on.
  template <typename Block, typename A>
  EIGENFORMER_DEVICE bool make_values_finite(Block& block, const A& a, int piece) const {
    const int chunks = static_cast<int>((call.p.value_dim - 1) / kEach) + 1;
    bool found = false;
    for (int i = block.lane(); i < kPieceKeys * chunks; i += kWarp) {
      const Index at = Ring::at(piece, i / chunks, i % chunks);
      auto values = a.ring.template pack<Pack<T, kEach>>(at);
      if (!make_finite(values)) continue;
      a.ring.store_pack(at, values);
      found = true;
    }
    block.warp_barrier();
    return found;
  }

  template <int Piece, typename Block, typename A>
  EIGENFORMER_DEVICE void add_values(Block& block, const A& a, const Pairs& pairs,
                                     State& state) const {
    const int value_chunks = static_cast<int>((call.p.value_dim - 1) / kEach) + 1;
    EIGENFORMER_UNROLL_ALL
    for (int k = 0; k < kPieceKeys / 16; ++k) {
      const auto weights = pairs.fragment(block, Piece * (kPieceKeys / 16) + k);
      EIGENFORMER_UNROLL_ALL
      for (int h = 0; h < kHalves; ++h) {
        if (h * 8 * kEach >= call.p.value_dim) break;
        const int chunk = h * 8 + block.lane() / 4;  // columns outside are not written
        Pack<T, kEach> chunks[4];
        EIGENFORMER_UNROLL_ALL
        for (int i = 0; i < 4; ++i)
          chunks[i] = a.ring.template pack<Pack<T, kEach>>(
              Ring::at(Ring::kOperandPieces + Piece, 16 * k + FragmentB<T>::row(block.lane(), i),
                       chunk < value_chunks ? chunk : value_chunks - 1));
        EIGENFORMER_UNROLL_ALL
        for (int n = 0; n < kEach; ++n) {
          float* const at = sum_of(state, h * kEach + n);
          FragmentD<T> sums{{at[0], at[1], at[2], at[3]}};
          block.mma(sums, weights,
                    FragmentB<T>{{chunks[0][n], chunks[1][n], chunks[2][n], chunks[3][n]}});
          EIGENFORMER_UNROLL_ALL
          for (int i = 0; i < 4; ++i) at[i] = sums.values[i];
        }
      }
    }
  }

  /// The sums of product n: a FragmentD.
  template <typename S>
  EIGENFORMER_DEVICE static auto* sum_of(S& state, int n) {
    return state.sums[n / 4].values + n % 4 * 4;
  }
  /// Column of element i of them.
  template <typename Block>
  EIGENFORMER_DEVICE static Index column(Block& block, int n, int i) {
    return (n / kEach * 8 + FragmentD<T>::column(block.lane(), i)) * kEach + n % kEach;
  }

  /// What values that are not finite give to the rows that see them.
  template <typename Block, typename A>
  EIGENFORMER_DEVICE void add_not_finite(Block& block, const A& a, const Rows& rows, Index at,
                                         State& state) const {
    block.warp_barrier();
    for (int e = 0; e < kHalves * kEach * 4; ++e) {
      const int r = FragmentD<T>::row(block.lane(), e % 4);
      const Index d = column(block, e / 4, e % 4);
      const TileRange here = rows.range(r, at);
      if (d >= call.p.value_dim) continue;
      float more = 0;
      for (int j = 0; j < kTile; ++j) {
        if (!rows.sees(r, at, here, j)) continue;
        const T value = rows.key(true, at + j)[d];
        if (!is_finite(value))
          more +=
              static_cast<float>(a.pairs.load(r * kPairStride<T> + j)) * static_cast<float>(value);
      }
      EIGENFORMER_UNROLL_ALL
      for (int n = 0; n < kHalves * kEach * 4; ++n)  // e is not known when this is compiled
        if (n == e) *(sum_of(state, n / 4) + n % 4) += more;
    }
    block.warp_barrier();
  }

  /// body(column, four neighbours of it) for the sums of row k, those within value_dim.
  template <typename Block, typename Body>
  EIGENFORMER_DEVICE void for_each_sum(Block& block, int k, const State& state,
                                       const Body& body) const {
    EIGENFORMER_UNROLL_ALL
    for (int n = 0; n < kHalves * kEach; n += 4) {
      EIGENFORMER_UNROLL_ALL
      for (int i = 2 * k; i < 2 * k + 2; ++i) {
        const Index d = column(block, n, i);
        if (d < call.p.value_dim)
          body(d, Pack<float, 4>{{sum_of(state, n)[i], sum_of(state, n + 1)[i],
                                  sum_of(state, n + 2)[i], sum_of(state, n + 3)[i]}});
      }
    }
  }
  /// Four neighbours from column `d` on, in rows of value_dim.
  template <typename U>
  EIGENFORMER_DEVICE void write(U* row, Index d, const Pack<U, 4>& four) const {
    if (d + 4 <= call.p.value_dim && packs_fit<4>(row + d, 0))
      store_pack(four, row + d);
    else
      for (int i = 0; i < 4 && d + i < call.p.value_dim; ++i) row[d + i] = four[i];
  }

  template <typename Block>
  EIGENFORMER_DEVICE void write_split(Block& block, const Rows& rows, Index split,
                                      const State& state, const AttentionPart (&found)[2]) const {
    EIGENFORMER_UNROLL_ALL
    for (int k = 0; k < 2; ++k) {
      const int r = Pairs::row(block.lane(), k);
      if (r >= rows.count) continue;
      const Index at = call.index_of(rows.query_of(r)) * splits + split;
      if (block.lane() % 4 == 0) parts[at] = found[k];
      for_each_sum(block, k, state, [&](Index d, const Pack<float, 4>& four) {
        write(part_sums + at * call.p.value_dim, d, four);
      });
    }
  }

  /// Of the one split that there is.
  template <typename Block>
  EIGENFORMER_DEVICE void write_output(Block& block, const Rows& rows, const State& state,
                                       const AttentionPart (&found)[2]) const {
    EIGENFORMER_UNROLL_ALL
    for (int k = 0; k < 2; ++k) {
      const AttentionQuery q = rows.query_of(Pairs::row(block.lane(), k));
      if (q.in_sequence >= q.s->tensor_rows) continue;
      const auto end = call.end_of(q, found[k]);
      if (block.lane() % 4 == 0) call.write_log_sum_exp(q, end.log_sum_exp);
      T* const row = call.p.output + call.index_of(q) * call.p.value_dim;
      for_each_sum(block, k, state, [&](Index d, const Pack<float, 4>& four) {
        Pack<T, 4> output;
        for (int i = 0; i < 4; ++i)
          output[i] =
              end.factor == 0
                  ? T(0)
                  : call.output_of(static_cast<double>(four[i]) * (end.factor / kFactor / 2));
        write(row, d, output);
      });
    }
  }
};

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
