/// \file
/// The tokens that filters left, side by side: once they are an eighth of the vocabulary or less,
/// what follows reads them and not the row. A list of the tokens in play and nothing else, in token
/// order, so that sums over it depend on the row alone.
#pragma once

#include "bulk.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

template <typename C>
struct KeptTokens {
  SamplingRow<C> row;         // of the list
  const std::int32_t* begin;  // (blocks + 1) place in the list of the first token of each block
  Band<C> band;               // that of the row when the list was made
};

struct KeptLimits {
  static constexpr Index least_vocab = 4096;  // below, a row is as good as a list
  static constexpr Index most(Index vocab) { return vocab / 8; }
};

/// Lists the tokens in play, if they are few.
template <typename Isa, typename T>
bool list_kept_tokens(const SamplingRow<T>& row, const SamplingScratch<compute_type<T>>& scratch) {
  using C = compute_type<T>;
  using V = simd::Vec<C, Isa>;
  if (row.vocab < KeptLimits::least_vocab) return false;
  const Index most = KeptLimits::most(row.vocab);
  alignas(64) C buffer[SamplingBlock::size];
  std::int32_t* const begin = scratch.kept_begin;
  Index n = 0, next = 0;
  for_each_block_index<Isa>(row, row.band.lo, [&](Index block) {
    if (n > most) return;
    while (next <= block) begin[next++] = static_cast<std::int32_t>(n);
    const C* const x = block_logits<Isa>(row, block, buffer);
    const BlockBits members = member_bits<Isa>(x, block, row.band, row.band.lo);
    n = store_logits<V>(x, members, scratch.kept_logits + n) - scratch.kept_logits;
  });
  if (n > most) return false;
  while (next <= row.blocks()) begin[next++] = static_cast<std::int32_t>(n);
  SamplingRow<C> list{scratch.kept_logits, n, scratch.kept_max, {}, 1.0};
  scan_row<Isa>(list);
  list.band = {row.band.hi, row.band.lo, n};
  list.inverse_temperature = row.inverse_temperature;
  *scratch.kept = {list, begin, row.band};
  return true;
}

/// The token at a place of the list.
template <typename Isa, typename T>
Index token_at(const SamplingRow<T>& row, const KeptTokens<compute_type<T>>& kept, Index place) {
  alignas(64) compute_type<T> x[SamplingBlock::size];
  const std::int32_t* const begin = kept.begin;
  const Index block = std::upper_bound(begin, begin + row.blocks() + 1, place) - begin - 1;
  const BlockBits members =
      member_bits<Isa>(block_logits<Isa>(row, block, x), block, kept.band, kept.band.lo);
  return block * SamplingBlock::size + members.nth(static_cast<int>(place - begin[block]) + 1);
}

template <typename C>
bool same_band(const Band<C>& a, const Band<C>& b) {
  return a.hi == b.hi && a.lo == b.lo && a.lo_end == b.lo_end && a.hi_begin == b.hi_begin;
}

/// The band of the row that holds the tokens in play of its list.
template <typename Isa, typename T>
void take_band_of_list(SamplingRow<T>& row, const KeptTokens<compute_type<T>>& kept) {
  const auto& list = kept.row;
  const auto& old = kept.band;
  const auto& now = list.band;
  row.band = {now.hi, now.lo, now.lo > old.lo ? row.vocab : old.lo_end,
              now.hi < old.hi ? 0 : old.hi_begin};
  row.inverse_temperature = list.inverse_temperature;
  row.kept = &kept;
  if (now.lo_end < list.vocab) {
    Index last = now.lo_end - 1;
    while (last >= 0 && list.logits[last] != now.lo) --last;
    row.band.lo_end = last < 0 ? 0 : token_at<Isa>(row, kept, last) + 1;
  }
  if (now.hi_begin > 0)
    row.band.hi_begin =
        token_at<Isa>(row, kept, find_equal<Isa>(list.logits, now.hi_begin, list.vocab, now.hi));
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
