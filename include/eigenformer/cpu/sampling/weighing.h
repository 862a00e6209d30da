/// \file
/// One pass over a row that weighs its tokens in float: those from some logit on and the others
/// apart, and gathers the tokens of an interval of logits. What the pass leaves, the sums of slices
/// and of lanes of blocks, serves the draw, so that no token is weighed twice. On Zen 5 128256
/// tokens take 8 us, apart and gathered 14.
#pragma once

#include "bulk.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

/// Weights in float, times a factor that all of a row share: of 2^(x * scale + offset) the exponent
/// is rounded once, where the difference to the best logit is rounded before its product.
template <typename V>
struct FusedWeights {
  V scale, offset;    // without a fused multiply-add `offset` is the best logit
  double unit;        // times a weight: that relative to the best token
  double log_weight;  // error of a weight, of itself times |log of it|

  // Of itself: of the polynomial, two roundings, and that of the offset; and of a sum of the
  // weights of a block: additions in a row, 4 of 16 lanes, 7 of 4.
  static constexpr double weight = 2.7e-7, sum = (3 + SamplingBlock::size / V::lanes / 8) * 0x1p-24;

  template <typename T>
  explicit FusedWeights(const SamplingRow<T>& row) {
    const double best = static_cast<double>(row.band.hi),
                 exact = row.inverse_temperature * 1.44269504088896340736;
    const auto rounded = static_cast<float>(exact);
    const auto at_zero = static_cast<float>(-best * static_cast<double>(rounded));
    scale = V::set1(rounded);
    offset = V::set1(isa::kHasFma ? at_zero : row.band.hi);
    const double at_best = static_cast<double>(at_zero) + best * static_cast<double>(rounded);
    unit = isa::kHasFma ? std::exp2(-at_best) : 1.0;
    log_weight =
        (isa::kHasFma ? 0x1p-24 : 0x1p-23) + std::abs(static_cast<double>(rounded) / exact - 1);
  }

  /// Whether the exponents of a row are as right as this says: of float or narrower, and the best
  /// logit not far from 0.
  template <typename T>
  static bool serves(const SamplingRow<T>& row) {
    return serves_bulk(row) &&
           std::abs(static_cast<double>(row.band.hi)) * row.inverse_temperature < 1e6;
  }

  /// x[k] = the weight of x[k], as in BulkWeights.
  template <bool kClamp = true, int N>
  EIGENFORMER_INLINE void apply(V (&x)[N]) const {
    V n[N];
    EIGENFORMER_UNROLL
    for (int k = 0; k < N; ++k) {
      x[k] = isa::kHasFma ? fma(x[k], scale, offset) : (x[k] - offset) * scale;
      if constexpr (kClamp)
        x[k] = maximum(V::set1(BulkWeights<V>::kScales ? -160.0f : -127.0f), x[k]);
    }
    EIGENFORMER_UNROLL
    for (int k = 0; k < N; ++k) n[k] = round(x[k]);
    EIGENFORMER_UNROLL
    for (int k = 0; k < N; ++k) x[k] = n[k] - x[k];
    BulkWeights<V>::template power<N>(x, n);
  }

  /// The error of a sum, in `unit`s like it, of the weights of at most `tokens` tokens: their mean
  /// -log(weight) is log(tokens / sum) at most, where all are equal.
  double error_of(double mass, Index tokens) const {
    if (!(mass > 0)) return 1e-30;
    const double mean = std::log(static_cast<double>(tokens) / (mass * unit) + 1.0);
    return mass * (weight + sum + log_weight * mean) + 1e-30;
  }
  /// Of part - p * (part + rest).
  double error_of_share(double part, double rest, double p, Index tokens) const {
    return (1.0 - p) * error_of(part, tokens) + p * error_of((std::max)(rest, 0.0), tokens) +
           1e-12 * (part + rest);
  }
};

/// What a pass leaves of a row.
template <typename C>
struct WeighedRow {
  // of tokens from `least` on, of the others; of each slice
  double above[RowSlices::most], rest[RowSlices::most];
  double total_above = 0, total_rest = 0;
  // (blocks, 16) and (blocks + 1): those from `least` on, lane by lane, of each block; the first of
  // its tokens among those gathered
  C* lanes;
  std::int32_t* begin;
  C* gathered = nullptr;  // in token order
  Index count = 0;
  // For the draw: of those gathered the ones below `end` are not in play, and all this is true of a
  // row of this band and temperature.
  C end = 0;
  Band<C> band = {};
  double inverse_temperature = 0;

  static constexpr Index most_lanes = 16;
};

/// Sums of vectors, lane by lane in double.
template <typename V>
struct LaneTotals {
  alignas(64) double lane[V::lanes] = {};

  EIGENFORMER_INLINE void add(V x) { add_lanes(x, lane); }
  double sum() const {
    double all = 0;
    for (const double each : lane) all += each;
    return all;
  }
};

/// The weights of a block, lane by lane.
template <bool kClamp, typename V>
EIGENFORMER_INLINE V weigh_block(const FusedWeights<V>& weights, const float* x) {
  V sum = V::zero();
  for (Index at = 0; at < SamplingBlock::size; at += 8 * V::lanes) {
    V w[8];
    EIGENFORMER_UNROLL
    for (int k = 0; k < 8; ++k) w[k] = V::load(x + at + k * V::lanes);
    weights.template apply<kClamp>(w);
    sum = at == 0 ? sum_of(w) : sum + sum_of(w);
  }
  return sum;
}

/// What a pass looks for in a block.
enum class Apart {
  from_least,  ///< the weights of logits from `least` on
  gathering    ///< and those of the others, and which lie in [least, most]
};

/// The weights of a block in two parts.
template <bool kClamp, Apart kWhat, typename V>
EIGENFORMER_INLINE void weigh_block_apart(const FusedWeights<V>& weights, const float* x, V least,
                                          V most, V& above, V& rest, BlockBits& inside) {
  for (Index at = 0; at < SamplingBlock::size; at += 8 * V::lanes) {
    V w[8], a[2], r[2];
    decltype(less(least, least)) is_above[8];
    EIGENFORMER_UNROLL
    for (int k = 0; k < 8; ++k) {
      w[k] = V::load(x + at + k * V::lanes);
      is_above[k] = less_equal(least, w[k]);
      if constexpr (kWhat == Apart::gathering)
        inside.add(at + k * V::lanes, (is_above[k] & less_equal(w[k], most)).bits());
    }
    weights.template apply<kClamp>(w);
    EIGENFORMER_UNROLL
    for (int k = 0; k < 2; ++k) {
      a[k] = select(is_above[k], w[k], V::zero());
      r[k] = select(is_above[k], V::zero(), w[k]);
    }
    EIGENFORMER_UNROLL
    for (int k = 2; k < 8; ++k) {
      a[k % 2] = select(is_above[k], a[k % 2] + w[k], a[k % 2]);
      if constexpr (kWhat == Apart::gathering)
        r[k % 2] = select(is_above[k], r[k % 2], r[k % 2] + w[k]);
    }
    above = at == 0 ? a[0] + a[1] : above + (a[0] + a[1]);
    if constexpr (kWhat == Apart::gathering) rest = at == 0 ? r[0] + r[1] : rest + (r[0] + r[1]);
  }
}

/// Copies the chosen logits to `to`, which has room for 4 more; returns their end. Four at a time:
/// how many of 64 tokens there are is no pattern that a branch would learn.
EIGENFORMER_INLINE float* store_few(const float* x, const BlockBits& chosen, float* to) {
  EIGENFORMER_UNROLL
  for (int half = 0; half < 2; ++half) {
    const float* const from = x + 64 * half;
    std::uint64_t bits = chosen.word[half];
    float* const end = to + std::popcount(bits);
    do {
      EIGENFORMER_UNROLL
      for (int k = 0; k < 4; ++k, bits &= bits - 1) to[k] = from[std::countr_zero(bits) & 63];
      to += 4;
    } while (bits != 0);
    to = end;
  }
  return to;
}

/// Weighs the blocks of a row. `out` null: all tokens in play are above, else those from `least` on
/// are, and those in [least, most] are gathered there; it has room as SamplingScratch says.
template <typename Isa, typename T>
struct RowWeighing {
  using V = simd::Vec<float, Isa>;
  static constexpr float infinity = std::numeric_limits<float>::infinity();

  const SamplingRow<T>& row;
  FusedWeights<V> weights;
  float least = 0, most = 0;
  float* out = nullptr;

  struct Range {
    Index begin = 0, end = 0;  // of what a slice gathered, in `out`
  };
  /// Where a thread is.
  struct Progress {
    float* to;
    LaneTotals<V> above = {}, rest = {};
    alignas(64) float buffer[SamplingBlock::size];
  };

  /// A row without filters, of which no block is changed as it is read: loops over its blocks have
  /// nothing to ask.
  bool is_plain() const {
    return std::is_same_v<T, float> && (row.changes == nullptr || row.changes->copied) &&
           row.band.lo == std::numeric_limits<float>::lowest() && row.band.lo_end == row.vocab &&
           row.band.hi_begin == 0 &&
           count_blocks<Isa>(row, std::nextafter(row.band.hi, infinity)) == 0;
  }

  /// The logits of a block; those out of play are -infinity, unless they lie below `from`.
  EIGENFORMER_NOINLINE const float* members(Index block, float* buffer, float& from) const {
    const Index begin = block * SamplingBlock::size,
                end = (std::min)(begin + SamplingBlock::size, row.vocab);
    const bool cut = (begin < row.band.lo_end && row.band.lo_end < end) ||
                     row.band.hi_begin > begin || row.block_max[block] > row.band.hi;
    from = -infinity;
    if (out != nullptr || cut) return in_play_logits<Isa>(row, block, buffer);
    if (row.band.lo > std::numeric_limits<float>::lowest())
      from = begin < row.band.lo_end ? row.band.lo : std::nextafter(row.band.lo, infinity);
    return block_logits<Isa>(row, block, buffer);
  }

  /// One block, x its logits.
  template <bool kApart, bool kClamp>
  EIGENFORMER_INLINE void add_block(Index block, const float* x, float from, Progress& at,
                                    WeighedRow<float>& sums) const {
    V above = V::zero(), rest = V::zero();
    const V lo = V::set1(kApart ? least : from), hi = V::set1(most);
    BlockBits inside;
    sums.begin[block] = static_cast<std::int32_t>(at.to - out);
    if (kApart && row.block_max[block] >= least) {
      weigh_block_apart<kClamp, Apart::gathering>(weights, x, lo, hi, above, rest, inside);
      at.to = store_few(x, inside, at.to);
    } else if (kApart) {
      rest = weigh_block<kClamp>(weights, x);
    } else if (from == -infinity) {
      above = weigh_block<kClamp>(weights, x);
    } else {
      weigh_block_apart<kClamp, Apart::from_least>(weights, x, lo, hi, above, rest, inside);
    }
    if (kApart) at.rest.add(rest);
    at.above.add(above);
    above.store(sums.lanes + block * WeighedRow<float>::most_lanes);
  }

  /// Blocks [begin, end) of a slice.
  template <bool kApart>
  void add_blocks(Index begin, Index end, Progress& at, WeighedRow<float>& sums) const {
    Index next = begin;
    const auto skip_to = [&](Index block) {
      for (; next < block; ++next) {
        sums.begin[next] = static_cast<std::int32_t>(at.to - out);
        V::zero().store(sums.lanes + next * WeighedRow<float>::most_lanes);
      }
    };
    for_each_block_index<Isa>(row, begin, end, row.band.lo, [&](Index block) {
      skip_to(block);
      ++next;
      float from;
      const float* const x = members(block, at.buffer, from);
      add_block<kApart, true>(block, x, from, at, sums);
    });
    skip_to(end);
  }

  /// Slices [first, last), which gather side by side.
  template <bool kApart>
  void weigh_slices(const RowSlices& slices, Index first, Index last, WeighedRow<float>& sums,
                    Range* gathered) const {
    Progress at;
    at.to = kApart ? out + slices.begin(first) * SamplingBlock::size + first * RowSlices::slack
                   : nullptr;
    const Index whole = is_plain() ? row.vocab / SamplingBlock::size : 0;
    for (Index s = first; s < last; ++s) {
      gathered[s].begin = at.to - out;
      at.above = at.rest = {};
      const Index begin = slices.begin(s), end = slices.begin(s + 1),
                  plain = std::clamp(whole, begin, end);
      if constexpr (std::is_same_v<T, float>)
        for (Index block = begin; block < plain; ++block) {
          const bool copied = row.changes != nullptr && row.changes->first[block] == kCopied;
          const float* const x = copied ? row.changes->logits : row.logits;
          add_block<kApart, !BulkWeights<V>::kScales>(block, x + block * SamplingBlock::size,
                                                      -infinity, at, sums);
        }
      if (!holds_nan(at.above.sum() + at.rest.sum())) {
        add_blocks<kApart>(plain, end, at, sums);
      } else {  // -infinity, seldom there, gives NaN without a clamp
        at.above = at.rest = {};
        at.to = out + gathered[s].begin;
        add_blocks<kApart>(begin, end, at, sums);
      }
      sums.above[s] = at.above.sum();
      sums.rest[s] = at.rest.sum();
      gathered[s].end = at.to - out;
    }
  }

  void operator()(WeighedRow<float>& sums) const {
    const RowSlices slices(row.blocks());
    Range gathered[RowSlices::most];
    for_slices_in_play<Isa>(row, kWeightCycles, [&](Index first, Index last) {
      out == nullptr ? weigh_slices<false>(slices, first, last, sums, gathered)
                     : weigh_slices<true>(slices, first, last, sums, gathered);
    });
    sums.gathered = out;
    sums.total_above = sums.total_rest = 0;
    sums.count = 0;
    for (Index s = 0; s < slices.count(); ++s) {
      sums.total_above += sums.above[s];
      sums.total_rest += sums.rest[s];
      const Index apart = gathered[s].begin - sums.count;  // where another thread wrote
      if (apart > 0) {
        std::copy(out + gathered[s].begin, out + gathered[s].end, out + sums.count);
        for (Index block = slices.begin(s); block < slices.begin(s + 1); ++block)
          sums.begin[block] -= static_cast<std::int32_t>(apart);
      }
      sums.count += gathered[s].end - gathered[s].begin;
    }
    sums.begin[row.blocks()] = static_cast<std::int32_t>(sums.count);
  }
};

/// A block, and the sum of the weights before it.
struct BlockFound {
  Index block = -1;
  double before = 0;
};

/// The sums of a weighed row without the gathered tokens that fell out of play.
template <typename Isa>
struct WeighedSums {
  using V = simd::Vec<float, Isa>;
  const WeighedRow<float>& weighed;
  const FusedWeights<V>& weights;

  /// Of the gathered tokens of blocks [begin, end), those below the end.
  double fallen(Index begin, Index end) const {
    if (weighed.count == 0) return 0;
    const V least = V::set1(weighed.end);
    LaneTotals<V> all;
    const Index last = weighed.begin[end];
    for (Index at = weighed.begin[begin]; at < last; at += V::lanes) {
      // there is room for a vector behind the last of them
      V w[1] = {V::load(weighed.gathered + at)};
      const auto own = V::mask_of(at + V::lanes <= last ? ~std::uint32_t{0}
                                                        : (std::uint32_t{1} << (last - at)) - 1);
      const auto is_below = less(w[0], least) & own;
      weights.apply(w);
      all.add(select(is_below, w[0], V::zero()));
    }
    return all.sum();
  }
  double of_block(Index block) const {
    LaneTotals<V> lanes;
    lanes.add(V::load(weighed.lanes + block * WeighedRow<float>::most_lanes));
    return lanes.sum() - fallen(block, block + 1);
  }

  /// As find_block, of the block in which the sum passes u times that of all, in `target`; `error`:
  /// that of the sum before it less `target`. All in units of the row's weights.
  BlockFound find(Index blocks, Index tokens, double u, double& target, double& error) const {
    const RowSlices slices(blocks);
    double masses[RowSlices::most], total = 0, all_fallen = 0;
    for (Index s = 0; s < slices.count(); ++s) {
      const double out = fallen(slices.begin(s), slices.begin(s + 1));
      masses[s] = weighed.above[s] - out;
      total += masses[s];
      all_fallen += out;
    }
    target = u * total;
    Index slice = 0;
    double before = 0;
    while (slice + 1 < slices.count() && before + masses[slice] <= target)
      before += masses[slice++];
    BlockFound found{slices.begin(slice), before};
    for (Index block = slices.begin(slice); block < slices.begin(slice + 1); ++block) {
      const double mass = of_block(block);
      found = {block, before};
      if ((before += mass) > target) break;
    }
    error = weights.error_of_share(found.before, total - found.before, u, tokens) +
            2 * weights.sum * all_fallen;
    return found;
  }
};

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
