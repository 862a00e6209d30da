/// \file
/// One pass over a row that weighs its tokens in float. It sums those that surely come first by
/// some key apart from the others, sums moments where the key wants them, and gathers the tokens
/// about the place where a filter will end. What the pass leaves, the sums of slices and of lanes
/// of blocks, serves the draw, so that no token is weighed twice. On Zen 5 128256 tokens take 9 us,
/// apart and gathered 15, with moments 18; with two threads 6, 11 and 13.
#pragma once

#include "weigh_block.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

/// What a pass leaves of a row.
template <typename C>
struct WeighedRow {
  // of tokens that come before those gathered, of the others; of each slice
  double above[RowSlices::most], rest[RowSlices::most];
  double total_above = 0, total_rest = 0;
  // of all, in the units of the weights and of their log2: of w log2 w; of w (log2 w)^2, right to a
  // percent
  double moment[RowSlices::most], square[RowSlices::most];
  double total_moment = 0, total_square = 0;
  // (blocks, 16) and (blocks + 1): those that come before, lane by lane, of each block; the first
  // of its tokens among those gathered
  C* lanes;
  std::int32_t* begin;
  C* gathered = nullptr;  // in token order
  Index count = 0;
  C reference = 0;  // of the weights
  // For the draw: of those gathered the ones in [end, top] are in play, and all this is true of a
  // row of this band and temperature.
  C end = 0, top = 0;
  Band<C> band = {};
  double inverse_temperature = 0;

  static constexpr Index most_lanes = 16;

  /// Those gathered, to be narrowed: a copy, where they are at most half of a row's tokens, else
  /// they are given up.
  C* candidates(Index vocab) {
    C* const found = gathered;
    if (2 * count + 64 <= vocab) return std::copy(found, found + count, found + room()) - count;
    gathered = nullptr;
    return found;
  }
  Index room() const { return (count + 15) / 16 * 16; }
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

/// Weighs the blocks of a row. `out`, for the rules that gather, has room as SamplingScratch says.
template <typename Isa, typename T, typename Rule = AllInPlay>
struct RowWeighing {
  using V = simd::Vec<float, Isa>;
  static constexpr float infinity = std::numeric_limits<float>::infinity();

  const SamplingRow<T>& row;
  FusedWeights<V> weights;
  Rule rule = {};
  float* out = nullptr;

  struct Range {
    Index begin = 0, end = 0;  // of what a slice gathered, in `out`
  };
  /// Where a thread is.
  struct Progress {
    float* to;
    LaneTotals<V> above = {}, rest = {}, moment = {};
    V square = V::zero();
    alignas(64) float buffer[SamplingBlock::size];

    void restart() { above = rest = moment = {}, square = V::zero(); }
    bool has_nan() const { return holds_nan(above.sum() + rest.sum() + moment.sum()); }
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
    if (Rule::kGathers || cut) return in_play_logits<Isa>(row, block, buffer);
    if (row.band.lo > std::numeric_limits<float>::lowest())
      from = begin < row.band.lo_end ? row.band.lo : std::nextafter(row.band.lo, infinity);
    return block_logits<Isa>(row, block, buffer);
  }

  /// One block, x its logits.
  template <bool kClamp>
  EIGENFORMER_INLINE void add_block(Index block, const float* x, float from, Progress& at,
                                    WeighedRow<float>& left) const {
    BlockSums<V> sums;
    left.begin[block] = static_cast<std::int32_t>(at.to - out);
    if constexpr (!Rule::kGathers) {
      sums.above = from == -infinity ? weigh_block<kClamp>(weights, x)
                                     : weigh_block_from<kClamp>(weights, x, V::set1(from));
    } else {
      BlockBits inside;
      if (rule.reaches(row.block_max[block])) {
        // the caller has read these lines since the last pass: a thread that shares a row would
        // wait 35 ns for each, 4 us in all
        eigenformer::detail::prefetch_to_write(reinterpret_cast<std::uintptr_t>(at.to) + 384);
        rule.template weigh<kClamp>(weights, x, sums, at.square, inside);
        at.to = store_few(x, inside, at.to);
      } else if constexpr (Rule::kMoments) {
        rule.template weigh<kClamp, false>(weights, x, sums, at.square, inside);
      } else {
        sums.rest = weigh_block<kClamp>(weights, x);
      }
      at.rest.add(sums.rest);
    }
    if constexpr (Rule::kMoments) at.moment.add(sums.moment);
    at.above.add(sums.above);
    sums.above.store(left.lanes + block * WeighedRow<float>::most_lanes);
  }

  /// Blocks [begin, end) of a slice.
  void add_blocks(Index begin, Index end, Progress& at, WeighedRow<float>& left) const {
    Index next = begin;
    const auto skip_to = [&](Index block) {
      for (; next < block; ++next) {
        left.begin[next] = static_cast<std::int32_t>(at.to - out);
        V::zero().store(left.lanes + next * WeighedRow<float>::most_lanes);
      }
    };
    for_each_block_index<Isa>(row, begin, end, row.band.lo, [&](Index block) {
      skip_to(block);
      ++next;
      float from;
      const float* const x = members(block, at.buffer, from);
      add_block<true>(block, x, from, at, left);
    });
    skip_to(end);
  }

  /// Slices [first, last), which gather side by side; the blocks before `whole` are plain.
  void weigh_slices(const RowSlices& slices, Index first, Index last, Index whole,
                    WeighedRow<float>& left, Range* gathered) const {
    Progress at;
    at.to = Rule::kGathers
                ? out + slices.begin(first) * SamplingBlock::size + first * RowSlices::slack
                : nullptr;
    for (Index s = first; s < last; ++s) {
      gathered[s].begin = at.to - out;
      at.restart();
      const Index begin = slices.begin(s), end = slices.begin(s + 1),
                  plain = std::clamp(whole, begin, end);
      if constexpr (std::is_same_v<T, float>)
        for (Index block = begin; block < plain; ++block) {
          const bool copied = row.changes != nullptr && row.changes->first[block] == kCopied;
          const float* const x = copied ? row.changes->logits : row.logits;
          add_block<!BulkWeights<V>::kScales>(block, x + block * SamplingBlock::size, -infinity, at,
                                              left);
        }
      if (!at.has_nan()) {
        add_blocks(plain, end, at, left);
      } else {  // -infinity, seldom there, gives NaN without a clamp
        at.restart();
        at.to = out + gathered[s].begin;
        add_blocks(begin, end, at, left);
      }
      left.above[s] = at.above.sum();
      left.rest[s] = at.rest.sum();
      left.moment[s] = at.moment.sum();
      left.square[s] = static_cast<double>(reduce_add(at.square));
      gathered[s].end = at.to - out;
    }
  }

  void operator()(WeighedRow<float>& left) const {
    const RowSlices slices(row.blocks());
    Range gathered[RowSlices::most];
    // asked here: another thread would wait for the maxima, which this one has in its cache
    const Index whole = is_plain() ? row.vocab / SamplingBlock::size : 0;
    for_slices_in_play<Isa>(row, kWeightCycles, [&](Index first, Index last) {
      weigh_slices(slices, first, last, whole, left, gathered);
    });
    left.gathered = out;
    left.total_above = left.total_rest = left.total_moment = left.total_square = 0;
    left.count = 0;
    for (Index s = 0; s < slices.count(); ++s) {
      left.total_above += left.above[s];
      left.total_rest += left.rest[s];
      left.total_moment += left.moment[s];
      left.total_square += left.square[s];
      const Index apart = gathered[s].begin - left.count;  // where another thread wrote
      if (apart > 0) {
        std::copy(out + gathered[s].begin, out + gathered[s].end, out + left.count);
        for (Index block = slices.begin(s); block < slices.begin(s + 1); ++block)
          left.begin[block] -= static_cast<std::int32_t>(apart);
      }
      left.count += gathered[s].end - gathered[s].begin;
    }
    left.begin[row.blocks()] = static_cast<std::int32_t>(left.count);
  }
};

/// A block, and the sum of the weights before it.
struct BlockFound {
  Index block = -1;
  double before = 0;
};

/// The sums of a weighed row with the gathered tokens that are in play.
template <typename Isa>
struct WeighedSums {
  using V = simd::Vec<float, Isa>;
  const WeighedRow<float>& weighed;
  const FusedWeights<V>& weights;

  /// Of the gathered tokens of blocks [begin, end), those in play.
  double stayed(Index begin, Index end) const {
    if (weighed.count == 0) return 0;
    const V least = V::set1(weighed.end), most = V::set1(weighed.top);
    LaneTotals<V> all;
    const Index last = weighed.begin[end];
    for (Index at = weighed.begin[begin]; at < last; at += V::lanes) {
      // there is room for a vector behind the last of them
      V w[1] = {V::load(weighed.gathered + at)};
      const auto own = V::mask_of(at + V::lanes <= last ? ~std::uint32_t{0}
                                                        : (std::uint32_t{1} << (last - at)) - 1);
      const auto is_in = less_equal(least, w[0]) & less_equal(w[0], most) & own;
      weights.apply(w);
      all.add(select(is_in, w[0], V::zero()));
    }
    return all.sum();
  }
  double of_block(Index block) const {
    LaneTotals<V> lanes;
    lanes.add(V::load(weighed.lanes + block * WeighedRow<float>::most_lanes));
    return lanes.sum() + stayed(block, block + 1);
  }

  /// As find_block, of the block in which the sum passes u times that of all, in `target`; `error`:
  /// that of the sum before it less `target`. All in units of the row's weights.
  BlockFound find(Index blocks, Index tokens, double u, double& target, double& error) const {
    const RowSlices slices(blocks);
    double masses[RowSlices::most], total = 0;
    for (Index s = 0; s < slices.count(); ++s) {
      masses[s] = weighed.above[s] + stayed(slices.begin(s), slices.begin(s + 1));
      total += masses[s];
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
    error = weights.error_of_share(found.before, total - found.before, u, tokens);
    return found;
  }
};

/// The sums of the row, whose band now is [band.lo, band.hi], for the draw.
template <typename T>
void keep_sums(SamplingRow<T>& row, WeighedRow<compute_type<T>>& weighed) {
  if (weighed.gathered == nullptr) return;
  weighed.end = row.band.lo, weighed.top = row.band.hi;
  weighed.band = row.band;
  weighed.inverse_temperature = row.inverse_temperature;
  row.weighed = &weighed;
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
