/// \file
/// One row of logits as sampling sees it: blocks of 128 tokens, each with its maximum, and the
/// tokens still in play.
///
/// Most filters keep a prefix of the tokens sorted by (logit descending, index ascending), XTC
/// takes one away, and typical-p keeps an interval of logits, so that the survivors of any chain of
/// filters are the tokens of one band: lo < logit < hi, of those equal to lo the ones of index
/// below lo_end, of those equal to hi the ones from hi_begin on. A filter narrows the band; nothing
/// is sorted but the few candidates for its new end. Blocks whose maximum lies below the band are
/// skipped, so that after the first scan of the row (the maximum of each block, one read of vocab *
/// sizeof(T) bytes) a filter reads only where survivors are.
///
/// Weights exp((logit - hi) / temperature) are computed in double, to a relative error of 1e-15,
/// and summed in double in a fixed order: 8 interleaved sums in a block, then the blocks from first
/// to last. They depend on the row alone.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>

#include "../../core/token_weight.h"
#include "../../problem/sampling_rules.h"
#include "../vector/copy.h"
#include "../vector/functions.h"
#include "changes.h"
#include "slices.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

template <typename C>
struct KeptTokens;
template <typename C>
struct WeighedRow;

/// The scratch of one worker. C is the compute type of the logits.
template <typename C>
struct SamplingScratch {
  C* block_max;       // (blocks)
  double* block_sum;  // (blocks)
  C* candidates;      // (vocab + 64 and, for each slice, a vector)
  double* bin_sum;    // (2048, 4)
  // where stages change logits, else nullptr: a row of which they change all, or copied blocks; few
  // changes
  C* adjusted;  // (vocab, rounded up to blocks)
  LogitChanges<C>* changes;
  // the list of few tokens (kept.h)
  KeptTokens<C>* kept;
  C *kept_logits, *kept_max;  // (vocab / 8 + 192), (their blocks)
  std::int32_t* kept_begin;   // (blocks + 1)
  WeighedRow<C>* weighed;     // weighing.h
  Index vocab;                // of the rows
};

using eigenformer::detail::token_weight;
using problem::Band;

template <typename T>
struct SamplingRow {
  using C = compute_type<T>;
  const T* logits;
  Index vocab;
  C* block_max;
  Band<C> band;
  double inverse_temperature;
  const KeptTokens<C>* kept = nullptr;  // the tokens in play as a list, or nullptr (kept.h)
  const Eigen::ThreadPoolDevice* pool = nullptr;  // whose threads share the passes (slices.h)
  // What became of `logits`, or nullptr (changes.h); block_logits and logit_at know it.
  const LogitChanges<C>* changes = nullptr;
  const WeighedRow<C>* weighed = nullptr;  // sums of a row of that band, or nullptr (weighing.h)
  // `reached_by` of the maxima of an unfiltered row are `reached` or more, if that was asked before
  C reached = {};
  Index reached_by = 0;

  Index blocks() const { return (vocab + SamplingBlock::size - 1) / SamplingBlock::size; }
};

/// Block `block` converted to the compute type, -infinity past the vocabulary.
template <typename Isa, typename T, typename C>
void load_block(const T* logits, Index vocab, Index block, C* x) {
  using V = simd::Vec<C, Isa>;
  const T* source = logits + block * SamplingBlock::size;
  const Index count = (std::min)(SamplingBlock::size, vocab - block * SamplingBlock::size);
  if (count < SamplingBlock::size)
    std::fill(x, x + SamplingBlock::size, -std::numeric_limits<C>::infinity());
  convert_line<V>(source, x, count);
}

/// By bits, that -ffast-math has no say in.
template <typename C>
bool holds_nan(C x) {
  using Bits = decltype(problem::order_key(x));
  return static_cast<Bits>(std::bit_cast<Bits>(x) << 1) >
         static_cast<Bits>(std::bit_cast<Bits>(std::numeric_limits<C>::infinity()) << 1);
}

/// Maxima of vectors, and whether a NaN was among them.
template <typename V>
struct LineMaximum {
  V most[4];
  decltype(unordered(V::zero(), V::zero())) nan = unordered(V::zero(), V::zero());

  EIGENFORMER_INLINE LineMaximum() { restart(); }
  EIGENFORMER_INLINE void restart() {
    for (V& m : most) m = V::set1(-std::numeric_limits<typename V::scalar>::infinity());
  }
  /// Of whole blocks.
  template <typename T>
  EIGENFORMER_INLINE void add(const T* p, Index count) {
    for (Index i = 0; i < count; i += 4 * V::lanes) {
      V x[4];
      for (int k = 0; k < 4; ++k) x[k] = V::load(p + i + k * V::lanes);
      nan = nan | unordered(x[0], x[1]) | unordered(x[2], x[3]);
      for (int k = 0; k < 4; ++k) most[k] = maximum(x[k], most[k]);
    }
  }
  EIGENFORMER_INLINE V all() const {
    return maximum(maximum(most[0], most[1]), maximum(most[2], most[3]));
  }
};

/// The status of a row of which these are the maximum and whether it holds NaN.
template <typename C>
SampleStatus status_of_maximum(C hi, bool nan) {
  constexpr C infinity = std::numeric_limits<C>::infinity();
  if (nan) return SampleStatus::nan;
  if (hi == infinity) return SampleStatus::positive_infinity;
  return hi == -infinity ? SampleStatus::no_token : SampleStatus::ok;
}

/// Writes the maximum of every `Tokens` tokens to `maxima` and returns the greatest in `hi`. Reads
/// the row once, at the speed of its memory.
template <typename Isa, Index Tokens, typename T>
SampleStatus scan_maxima(const T* logits, Index vocab, compute_type<T>* maxima,
                         compute_type<T>& hi) {
  using C = compute_type<T>;
  using V = simd::Vec<C, Isa>;
  LineMaximum<V> line;
  V best = line.all();
  const auto close = [&](Index at) {
    const V largest = line.all();
    best = maximum(largest, best);
    maxima[at] = reduce_max(largest);
    line.restart();
  };
  const Index whole = vocab / Tokens;
  for (Index at = 0; at < whole; ++at) {
    line.add(logits + at * Tokens, Tokens);
    close(at);
  }
  if (whole * Tokens < vocab) {
    alignas(64) C x[SamplingBlock::size];
    for (Index block = whole * (Tokens / SamplingBlock::size); block * SamplingBlock::size < vocab;
         ++block) {
      load_block<Isa>(logits, vocab, block, x);
      line.add(x, SamplingBlock::size);
    }
    close(whole);
  }
  hi = reduce_max(best) + C(0);  // of -0 and 0 either might be the maximum
  return status_of_maximum(hi, line.nan.bits() != 0);
}

/// The lowest index of a token whose logit equals `value` in [begin, vocab), where there is one.
template <typename Isa, typename T>
Index find_equal(const T* logits, Index begin, Index vocab, compute_type<T> value) {
  using V = simd::Vec<compute_type<T>, Isa>;
  Index i = begin;
  for (const V wanted = V::set1(value); i + V::lanes <= vocab; i += V::lanes)
    if (const std::uint32_t bits = equal(V::load(logits + i), wanted).bits(); bits != 0)
      return i + std::countr_zero(bits);
  while (i < vocab - 1 && static_cast<compute_type<T>>(logits[i]) != value) ++i;
  return i;
}

/// The same with the threads of a pool, that may be nullptr.
template <typename Isa, Index Tokens, typename T>
SampleStatus scan_maxima(const T* logits, Index vocab, compute_type<T>* maxima, compute_type<T>& hi,
                         const Eigen::ThreadPoolDevice* pool) {
  const RowSlices slices((vocab + Tokens - 1) / Tokens);
  const Index blocks = slices.blocks * (Tokens / SamplingBlock::size);
  if (pool == nullptr ||
      part_count(*pool, slices.count(), cost_of_slice(slices, blocks, kReadCycles)) == 1)
    return scan_maxima<Isa, Tokens>(logits, vocab, maxima, hi);
  compute_type<T> most[RowSlices::most];
  bool nan[RowSlices::most];
  for_slices(pool, slices, blocks, kReadCycles, [&](Index first, Index last) {
    for (Index s = first; s < last; ++s) {
      const Index begin = slices.begin(s), end = (std::min)(vocab, slices.begin(s + 1) * Tokens);
      nan[s] = scan_maxima<Isa, Tokens>(logits + begin * Tokens, end - begin * Tokens,
                                        maxima + begin, most[s]) == SampleStatus::nan;
    }
  });
  const Index count = slices.count();
  hi = *std::max_element(most, most + count);
  return status_of_maximum(hi, std::find(nan, nan + count, true) != nan + count);
}

/// Writes the maximum of every block and opens the band to all tokens above -infinity; says what is
/// wrong with the row.
template <typename Isa, typename T>
SampleStatus scan_row(SamplingRow<T>& row) {
  using C = compute_type<T>;
  C hi;
  const SampleStatus status =
      scan_maxima<Isa, SamplingBlock::size>(row.logits, row.vocab, row.block_max, hi, row.pool);
  row.band = {hi, std::numeric_limits<C>::lowest(), row.vocab};
  row.inverse_temperature = 1;
  return status;
}

/// Copies a block that has changes and changes them.
template <typename Isa, typename T, typename C>
void copy_changed_block(const SamplingRow<T>& row, const LogitChanges<C>& changes, Index block) {
  C* const copy = changes.logits + block * SamplingBlock::size;
  load_block<Isa>(row.logits, row.vocab, block, copy);
  if (!changes.mask.empty()) mask_block<Isa>(changes.allowed(block), copy, copy);
  for (std::int32_t i = changes.first[block]; i >= 0; i = changes.list[i].next)
    changes.logits[changes.list[i].token] = changes.list[i].value;
  changes.first[block] = kCopied;
}

/// The blocks from `first` on that have a bit, some time before they are read: what was stored
/// number by number makes a vector wait that is loaded at once.
template <typename Isa, typename T>
void copy_changed_blocks(const SamplingRow<T>& row, Index first, std::uint32_t bits) {
  for (; bits != 0; bits &= bits - 1)
    if (const Index block = first + std::countr_zero(bits); row.changes->first[block] >= 0)
      copy_changed_block<Isa>(row, *row.changes, block);
}

/// Calls f(block) for every block of [begin, end) whose maximum is `least` or more.
template <typename Isa, typename T, typename F>
EIGENFORMER_INLINE void for_each_block_index(const SamplingRow<T>& row, Index begin, Index end,
                                             compute_type<T> least, F&& f) {
  using V = simd::Vec<compute_type<T>, Isa>;
  const V bound = V::set1(least);
  for_each_vector<V>(begin, end, [&](Index at, auto part) {
    std::uint32_t bits = less_equal(bound, load<V>(row.block_max + at, part)).bits();
    if (end - at < V::lanes) bits &= (std::uint32_t{1} << (end - at)) - 1;
    if (row.changes != nullptr) [[unlikely]]
      copy_changed_blocks<Isa>(row, at, bits);
    for (; bits != 0; bits &= bits - 1) f(at + std::countr_zero(bits));
  });
}

template <typename Isa, typename T, typename F>
EIGENFORMER_INLINE void for_each_block_index(const SamplingRow<T>& row, compute_type<T> least,
                                             F&& f) {
  for_each_block_index<Isa>(row, 0, row.blocks(), least, std::forward<F>(f));
}

/// How many blocks have a maximum of `least` or more.
template <typename Isa, typename T>
Index count_blocks(const SamplingRow<T>& row, compute_type<T> least) {
  using V = simd::Vec<compute_type<T>, Isa>;
  const V bound = V::set1(least);
  Index count = 0, at = 0;
  for (; at + V::lanes <= row.blocks(); at += V::lanes)
    count += std::popcount(less_equal(bound, V::load(row.block_max + at)).bits());
  for (; at < row.blocks(); ++at) count += row.block_max[at] >= least;
  return count;
}

/// Calls body(first, last) on ranges of the slices of a row, for a pass over the blocks that may
/// hold tokens in play which takes `cycles` a token.
template <typename Isa, typename T, typename Body>
void for_slices_in_play(const SamplingRow<T>& row, double cycles, Body&& body) {
  const Index blocks = row.pool == nullptr ? 0 : count_blocks<Isa>(row, row.band.lo);
  for_slices(row.pool, RowSlices(row.blocks()), blocks, cycles, std::forward<Body>(body));
}

/// The 128 logits of a block in the compute type, in place where they lie so, else in `x`.
template <typename Isa, typename T>
EIGENFORMER_INLINE const compute_type<T>* given_logits(const SamplingRow<T>& row, Index block,
                                                       compute_type<T>* x) {
  if constexpr (std::is_same_v<T, compute_type<T>>)
    if ((block + 1) * SamplingBlock::size <= row.vocab)
      return row.logits + block * SamplingBlock::size;
  load_block<Isa>(row.logits, row.vocab, block, x);
  return x;
}

/// The same with what changes the row has.
template <typename Isa, typename T>
const compute_type<T>* changed_logits(const SamplingRow<T>& row, Index block, compute_type<T>* x) {
  const LogitChanges<compute_type<T>>& changes = *row.changes;
  if (changes.first[block] >= 0) copy_changed_block<Isa>(row, changes, block);
  if (changes.first[block] == kCopied) return changes.logits + block * SamplingBlock::size;
  const compute_type<T>* const given = given_logits<Isa>(row, block, x);
  if (changes.first[block] == kNoChange) return given;
  mask_block<Isa>(changes.allowed(block), given, x);
  return x;
}

template <typename Isa, typename T>
EIGENFORMER_INLINE const compute_type<T>* block_logits(const SamplingRow<T>& row, Index block,
                                                       compute_type<T>* x) {
  if (row.changes != nullptr && row.changes->first[block] != kNoChange) [[unlikely]]
    return changed_logits<Isa>(row, block, x);
  return given_logits<Isa>(row, block, x);
}

template <typename T>
compute_type<T> logit_at(const SamplingRow<T>& row, Index token) {
  const auto logit = static_cast<compute_type<T>>(row.logits[token]);
  return row.changes == nullptr ? logit : row.changes->logit(token, logit);
}

/// Calls f(block, x) for every block that may hold a token of the band, x its 128 logits in the
/// compute type.
template <typename Isa, typename T, typename F>
EIGENFORMER_INLINE void for_each_block(const SamplingRow<T>& row, compute_type<T> least, F&& f) {
  alignas(64) compute_type<T> x[SamplingBlock::size];
  for_each_block_index<Isa>(row, least,
                            [&](Index block) { f(block, block_logits<Isa>(row, block, x)); });
}

/// weights[j] of any 128 logits.
template <typename C>
void block_weights(const C* x, double best, double inverse_temperature, double* weights) {
  for (Index j = 0; j < SamplingBlock::size; ++j)
    weights[j] = token_weight(static_cast<double>(x[j]), best, inverse_temperature);
}

/// Copies the chosen logits of a block to `to`, in order; returns the end of them. `to` has room
/// for a vector more. Few are copied one by one: a vector of 16 takes 5 cycles on Zen 5, a logit 2.
template <typename V, typename C>
EIGENFORMER_INLINE C* store_logits(const C* x, const BlockBits& chosen, C* to) {
  constexpr int few = 40;
  if (chosen.count() < few) {
    chosen.for_each([&](Index j) { *to++ = x[j]; });
    return to;
  }
  for (Index i = 0; i < SamplingBlock::size; i += V::lanes) {
    const std::uint64_t bits = chosen.word[i / 64] >> (i % 64);
    to += store_selected(V::load(x + i), V::mask_of(static_cast<std::uint32_t>(bits)), to);
  }
  return to;
}

/// The tokens of a block whose logit equals `value`.
template <typename Isa, typename C>
EIGENFORMER_INLINE BlockBits equal_bits(const C* x, C value) {
  using V = simd::Vec<C, Isa>;
  const V wanted = V::set1(value);
  BlockBits found;
  for (Index i = 0; i < SamplingBlock::size; i += V::lanes)
    found.add(i, equal(V::load(x + i), wanted).bits());
  return found;
}

/// The tokens of a block whose index is below `end`.
inline BlockBits bits_before(Index block, Index end) {
  BlockBits bits;
  for (Index w = 0; w < 2; ++w) {
    const Index count = std::clamp<Index>(end - block * SamplingBlock::size - 64 * w, 0, 64);
    bits.word[w] = count == 64 ? ~std::uint64_t{0} : (std::uint64_t{1} << count) - 1;
  }
  return bits;
}

/// Index of the `nth` token (1: the first) whose logit equals `value`, of those that hi_begin
/// leaves.
template <typename Isa, typename T>
Index nth_equal(const SamplingRow<T>& row, compute_type<T> value, Index nth) {
  alignas(64) compute_type<T> x[SamplingBlock::size];
  for (Index block = 0; block < row.blocks(); ++block) {
    if (row.block_max[block] < value) continue;
    BlockBits found = equal_bits<Isa>(block_logits<Isa>(row, block, x), value);
    const BlockBits excluded = bits_before(block, value == row.band.hi ? row.band.hi_begin : 0);
    for (int w = 0; w < 2; ++w) found.word[w] &= ~excluded.word[w];
    if (nth > found.count()) {
      nth -= found.count();
      continue;
    }
    return block * SamplingBlock::size + found.nth(static_cast<int>(nth));
  }
  return row.vocab - 1;  // not reached: the caller has seen that many
}

/// The tokens of a block that are in play and whose logit is `least` or more.
template <typename Isa, typename C>
EIGENFORMER_INLINE BlockBits member_bits(const C* x, Index block, const Band<C>& band, C least) {
  using V = simd::Vec<C, Isa>;
  const V lo = V::set1(band.lo), hi = V::set1(band.hi), bound = V::set1((std::max)(least, band.lo));
  BlockBits members, ends, tops;
  if (band.lo_end >= (block + 1) * SamplingBlock::size &&
      band.hi_begin <= block * SamplingBlock::size) {  // all equals of the ends are in play
    for (Index i = 0; i < SamplingBlock::size; i += V::lanes) {
      const V v = V::load(x + i);
      members.add(i, (less_equal(bound, v) & less_equal(v, hi)).bits());
    }
    return members;
  }
  for (Index i = 0; i < SamplingBlock::size; i += V::lanes) {
    const V v = V::load(x + i);
    members.add(i, (less_equal(bound, v) & less_equal(v, hi)).bits());
    ends.add(i, equal(v, lo).bits());
    tops.add(i, equal(v, hi).bits());
  }
  // of the tokens at lo those before this place are in play, of those at hi the others
  const BlockBits low = bits_before(block, band.lo_end), high = bits_before(block, band.hi_begin);
  for (int w = 0; w < 2; ++w)
    members.word[w] &= (~ends.word[w] | low.word[w]) & ~(tops.word[w] & high.word[w]);
  return members;
}

/// weights[j] of the tokens of a block that are in play, 0 for the others. Few tokens are computed
/// one by one, with the same bits.
template <typename Isa, typename C>
void member_weights(const C* x, Index block, const Band<C>& band, double inverse_temperature,
                    double* weights) {
  const double best = static_cast<double>(band.hi);
  const BlockBits members = member_bits<Isa>(x, block, band, band.lo);
  constexpr int few = 24;  // a whole block takes as long as about 40 tokens one by one
  if (members.count() <= few) {
    std::fill(weights, weights + SamplingBlock::size, 0.0);
    members.for_each([&](Index j) {
      weights[j] = token_weight(static_cast<double>(x[j]), best, inverse_temperature);
    });
    return;
  }
  block_weights(x, best, inverse_temperature, weights);
  const BlockBits others{{~members.word[0], ~members.word[1]}};
  others.for_each([&](Index j) { weights[j] = 0.0; });
}

/// Sum of 128 doubles in a fixed order.
inline double block_sum(const double* weights) {
  double partial[8] = {};
  for (Index i = 0; i < SamplingBlock::size; i += 8)
    for (int lane = 0; lane < 8; ++lane) partial[lane] += weights[i + lane];
  return ((partial[0] + partial[4]) + (partial[2] + partial[6])) +
         ((partial[1] + partial[5]) + (partial[3] + partial[7]));
}

/// Sum of the weights of all tokens in play; leaves the sum of each block in `sums`.
template <typename Isa, typename T>
double sum_weights(const SamplingRow<T>& row, double* sums) {
  std::fill(sums, sums + row.blocks(), 0.0);
  const RowSlices slices(row.blocks());
  for_slices_in_play<Isa>(row, kExpCycles, [&](Index first, Index last) {
    alignas(64) double weights[SamplingBlock::size];
    alignas(64) compute_type<T> x[SamplingBlock::size];
    for_each_block_index<Isa>(row, slices.begin(first), slices.begin(last), row.band.lo,
                              [&](Index block) {
                                member_weights<Isa>(block_logits<Isa>(row, block, x), block,
                                                    row.band, row.inverse_temperature, weights);
                                sums[block] = block_sum(weights);
                              });
  });
  double total = 0;
  for (Index block = 0; block < row.blocks(); ++block) total += sums[block];
  return total;
}

/// Copies the logits in play that are `least` or more to `out` in token order; returns how many.
template <typename Isa, typename T>
Index gather_candidates(const SamplingRow<T>& row, compute_type<T> least, compute_type<T>* out) {
  Index n = 0;
  for_each_block<Isa>(row, (std::max)(least, row.band.lo), [&](Index block, const auto* x) {
    const BlockBits members = member_bits<Isa>(x, block, row.band, least);
    members.for_each([&](Index j) { out[n++] = x[j]; });
  });
  return n;
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
