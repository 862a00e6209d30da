/// \file
/// What the CUDA kernels of attention share: the score of a query and a key, and which tiles of
/// pairs anybody sees.
#pragma once

#include <cmath>
#include <limits>
#include <type_traits>

#include "../problem/attention.h"
#include "../problem/score.h"
#include "tile/pairs.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

/// Greatest scores beyond this are taken once more in double, as on the CPU (cpu/attention/row.h).
template <typename TQ, typename TKV>
inline constexpr double kLargeScore =
    std::is_same_v<TQ, float> && std::is_same_v<TKV, float> ? 32 : 1024;

/// Whether a row whose greatest score is this has to be taken in double.
template <typename TQ, typename TKV>
EIGENFORMER_DEVICE bool is_large_score(double greatest) {
  using C = compute_type<TQ>;
  const double size = std::fabs(greatest);
  return sizeof(C) == 4 && size > kLargeScore<TQ, TKV> &&
         size <= static_cast<double>((std::numeric_limits<C>::max)());
}

/// Elements of a key in one or two loads of 16 bytes.
template <typename T>
inline constexpr int kKeyPack = sizeof(T) <= 4 ? pack_width<T> : 4;

/// The product of a key and query(d), in four chains of one order, whether the key is aligned or
/// not. Elements are numbers of C before they are numbers of S.
template <typename S, typename C, typename T, typename Query>
EIGENFORMER_DEVICE S key_product(const T* key, Index head_dim, const Query& query) {
  S dots[4] = {0, 0, 0, 0};
  const auto add = [&](int chain, Index d, T element) {
    dots[chain] = std::fma(query(d), static_cast<S>(static_cast<C>(element)), dots[chain]);
  };
  Index d = 0;
  if (packs_fit<kKeyPack<T>>(key, 0))
    for (; d + kKeyPack<T> <= head_dim; d += kKeyPack<T>) {
      const auto pack = load_pack<T, kKeyPack<T>>(key + d);
      for (int i = 0; i < kKeyPack<T>; ++i) add(i % 4, d + i, pack[i]);
    }
  for (; d + 4 <= head_dim; d += 4)
    for (int i = 0; i < 4; ++i) add(i, d + i, key[d + i]);
  for (; d < head_dim; ++d) add(0, d, key[d]);
  return (dots[0] + dots[1]) + (dots[2] + dots[3]);
}

/// The score in S of key `at` of a sequence, from the elements of query and key.
template <typename S, bool Biased = true, typename T, typename Function>
EIGENFORMER_DEVICE problem::Score<S> score_of_rows(const problem::Attention<T, T, Function>& p,
                                                   const T* query, const T* key,
                                                   const problem::ScoreRow& row, Index at) {
  using C = compute_type<T>;
  const S scale = static_cast<S>(p.scale);
  const S product = key_product<S, C>(
      key, p.head_dim, [=](Index d) { return static_cast<S>(static_cast<C>(query[d])) * scale; });
  return problem::score_of_product<S, Biased>(p, p.function, row, at, product);
}

/// Those of a thread's columns in row k of a tile that sees(column), as bits.
template <typename Pairs, typename Sees>
EIGENFORMER_DEVICE unsigned seen_columns(int thread, const Sees& sees) {
  unsigned bits = 0;
  EIGENFORMER_UNROLL_ALL
  for (int c = 0; c < Pairs::kColumns; ++c)
    if (sees(Pairs::column(thread, c))) bits |= 1u << c;
  return bits;
}

/// Scores of this thread's wide rows, by double_score(row, column), relative to references; grads,
/// where given, times their slopes.
template <typename T, typename Block, typename DoubleScore>
EIGENFORMER_DEVICE void rescore(Block& block, PairTile<T>& scores, PairTile<T>* grads,
                                const bool (&wide)[PairTile<T>::kRows],
                                const double (&references)[PairTile<T>::kRows],
                                const DoubleScore& double_score) {
  using Pairs = PairTile<T>;
  using C = typename Pairs::C;
  EIGENFORMER_UNROLL_ALL
  for (int k = 0; k < Pairs::kRows; ++k) {
    if (!wide[k]) continue;
    for (int c = 0; c < Pairs::kColumns; ++c) {
      const problem::Score<double> score =
          double_score(Pairs::row(block.thread(), k), Pairs::column(block.thread(), c));
      EIGENFORMER_UNROLL_ALL
      for (int n = 0; n < Pairs::kColumns; ++n) {  // c is not known when this is compiled
        if (n != c) continue;
        scores.at(k, n) = static_cast<C>(score.value - references[k]);
        if (grads != nullptr) grads->at(k, n) *= static_cast<C>(score.slope);
      }
    }
  }
}

/// The last sequence that begins at `at` or before.
template <typename BeginOf>
EIGENFORMER_DEVICE Index sequence_at(Index batch, Index at, const BeginOf& begin_of) {
  Index first = 0, last = batch;
  while (last - first > 1) {
    const Index middle = (first + last) / 2;
    (begin_of(middle) <= at ? first : last) = middle;
  }
  return first;
}

/// Which keys of a tile a query sees, by their places in it.
struct TileRange {
  int prefix, begin, end;

  EIGENFORMER_DEVICE bool sees(int j) const { return j < prefix || (j >= begin && j < end); }
};

/// Of the keys [begin, begin + count), for a query at a position.
EIGENFORMER_DEVICE inline TileRange tile_range(const problem::Visibility& visibility,
                                               Index position, Index key_length, Index begin,
                                               int count) {
  const auto place = [&](Index key) {
    const Index at = key - begin;
    return at < 0 ? 0 : (at > count ? count : static_cast<int>(at));
  };
  const problem::KeyRange seen = visibility.keys(position, key_length);
  const Index prefix = visibility.prefix < key_length ? visibility.prefix : key_length;
  return {place(prefix), place(seen.begin), place(seen.end)};
}

/// Whether one of `rows` queries from a position on sees one of the keys [begin, end).
EIGENFORMER_HOST_DEVICE inline bool any_visible(const problem::Visibility& visibility,
                                                Index position, Index rows, Index begin,
                                                Index end) {
  if (rows <= 0 || begin >= end) return false;
  return begin < visibility.prefix ||
         (begin < position + rows + visibility.right && end > position - visibility.left);
}

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
