/// \file
/// One row of logits as sampling sees it: blocks of 128 tokens, each with its maximum, and the
/// tokens still in play.
///
/// Top-k, top-p and min-p keep a prefix of the tokens sorted by (logit descending, index
/// ascending), and typical-p keeps an interval of logits, so that the survivors of any chain of
/// filters are the tokens of one band: lo < logit <= hi, and of those equal to lo the ones of index
/// below lo_end. A filter narrows the band; nothing is sorted but the few candidates for its new
/// end. Blocks whose maximum lies below the band are skipped, so that after the first scan of the
/// row (the maximum of each block, one read of vocab * sizeof(T) bytes) a filter reads only where
/// survivors are.
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

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

struct SamplingBlock {
  static constexpr Index size = 128;  // 512 bytes of float: 1002 maxima for a vocabulary of 128256
};

/// The scratch of one worker. C is the compute type of the logits.
template <typename C>
struct SamplingScratch {
  C* block_max;       // (blocks)
  double* block_sum;  // (blocks)
  C* candidates;      // (vocab)
  double* bin_sum;    // (2048, 4)
  C* adjusted;        // (vocab) logits after penalties, bias and mask; nullptr where no row has any
  std::int32_t* counts;  // (vocab) occurrences of each token; nullptr where no row has penalties
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

/// Writes the maximum of every block and opens the band to all tokens above -infinity; says what is
/// wrong with the row.
template <typename Isa, typename T>
SampleStatus scan_row(SamplingRow<T>& row) {
  using C = compute_type<T>;
  using V = simd::Vec<C, Isa>;
  constexpr C infinity = std::numeric_limits<C>::infinity();
  V best = V::set1(-infinity);
  auto nan = is_nan(V::zero());
  const auto scan_block = [&](const auto* p, Index block) {
    V largest = V::set1(-infinity);
    for (Index i = 0; i < SamplingBlock::size; i += V::lanes) {
      const V x = V::load(p + i);
      nan = nan | is_nan(x);
      largest = maximum(x, largest);
    }
    best = maximum(largest, best);
    row.block_max[block] = reduce_max(largest);
  };
  const Index full = row.vocab / SamplingBlock::size;
  for (Index block = 0; block < full; ++block)
    scan_block(row.logits + block * SamplingBlock::size, block);
  if (full < row.blocks()) {
    alignas(64) C x[SamplingBlock::size];
    load_block<Isa>(row.logits, row.vocab, full, x);
    scan_block(x, full);
  }
  const C hi = reduce_max(best);
  row.band = {hi, std::numeric_limits<C>::lowest(), row.vocab};
  row.inverse_temperature = 1;
  if (nan.bits() != 0) return SampleStatus::nan;
  if (hi == infinity) return SampleStatus::positive_infinity;
  return hi == -infinity ? SampleStatus::no_token : SampleStatus::ok;
}

/// Calls f(block, x) for every block that may hold a token of the band, x its 128 logits in the
/// compute type.
template <typename Isa, typename T, typename F>
EIGENFORMER_INLINE void for_each_block(const SamplingRow<T>& row, compute_type<T> least, F&& f) {
  alignas(64) compute_type<T> x[SamplingBlock::size];
  const Index blocks = row.blocks();
  for (Index block = 0; block < blocks; ++block) {
    if (row.block_max[block] < least) continue;
    load_block<Isa>(row.logits, row.vocab, block, x);
    f(block, x);
  }
}

/// Index of the `nth` token (1: the first) whose logit equals `value`.
template <typename Isa, typename T>
Index nth_equal(const SamplingRow<T>& row, compute_type<T> value, Index nth) {
  alignas(64) compute_type<T> x[SamplingBlock::size];
  for (Index block = 0; block < row.blocks(); ++block) {
    if (row.block_max[block] < value) continue;
    load_block<Isa>(row.logits, row.vocab, block, x);
    for (Index j = 0; j < SamplingBlock::size; ++j)
      if (x[j] == value && --nth == 0) return block * SamplingBlock::size + j;
  }
  return row.vocab - 1;  // not reached: the caller has seen that many
}

/// weights[j] of any 128 logits.
template <typename C>
void block_weights(const C* x, double best, double inverse_temperature, double* weights) {
  for (Index j = 0; j < SamplingBlock::size; ++j)
    weights[j] = token_weight(static_cast<double>(x[j]), best, inverse_temperature);
}

/// One bit for each of the 128 tokens of a block.
struct BlockBits {
  std::uint64_t word[2] = {0, 0};
  int count() const { return std::popcount(word[0]) + std::popcount(word[1]); }

  /// Calls f(j) for every set bit, in order.
  template <typename F>
  EIGENFORMER_INLINE void for_each(F&& f) const {
    for (int w = 0; w < 2; ++w)
      for (std::uint64_t bits = word[w]; bits != 0; bits &= bits - 1)
        f(Index{64} * w + std::countr_zero(bits));
  }
};

/// The tokens of a block that are in play and whose logit is `least` or more.
template <typename Isa, typename C>
EIGENFORMER_INLINE BlockBits member_bits(const C* x, Index block, const Band<C>& band, C least) {
  using V = simd::Vec<C, Isa>;
  const V lo = V::set1(band.lo), hi = V::set1(band.hi), bound = V::set1((std::max)(least, band.lo));
  BlockBits members, ends;
  for (Index i = 0; i < SamplingBlock::size; i += V::lanes) {
    const V v = V::load(x + i);
    members.word[i / 64] |= std::uint64_t{(less_equal(bound, v) & less_equal(v, hi)).bits()}
                            << (i % 64);
    ends.word[i / 64] |= std::uint64_t{equal(v, lo).bits()} << (i % 64);
  }
  // of the tokens at lo, those before this place are in play
  const Index ties = band.lo_end - block * SamplingBlock::size;
  for (Index w = 0; w < 2; ++w) {
    const Index before = std::clamp<Index>(ties - 64 * w, 0, 64);
    const std::uint64_t in_play =
        before == 64 ? ~std::uint64_t{0} : (std::uint64_t{1} << before) - 1;
    members.word[w] &= ~ends.word[w] | in_play;
  }
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
  alignas(64) double weights[SamplingBlock::size];
  std::fill(sums, sums + row.blocks(), 0.0);
  for_each_block<Isa>(row, row.band.lo, [&](Index block, const auto* x) {
    member_weights<Isa>(x, block, row.band, row.inverse_temperature, weights);
    sums[block] = block_sum(weights);
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
