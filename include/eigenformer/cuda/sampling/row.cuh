/// \file
/// One row of logits as a block sees it, and the tokens still in play: the band of
/// problem/sampling_rules.h, as in cpu/sampling/row.h. Nothing is sorted or copied: every step
/// reads the row anew, which the L2 holds after the first.
#pragma once

#include <cstdint>
#include <limits>

#include "../../core/token_weight.h"
#include "../../problem/sampling.h"
#include "../../problem/sampling_rules.h"
#include "../packs.cuh"
#include "order.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

template <typename T>
struct SamplingRow {
  using C = compute_type<T>;
  const T* logits;    // as they came
  const C* adjusted;  // after penalties, bias and mask, aligned to 16 bytes; nullptr: as they came
  Index vocab;
  problem::Band<C> band;
  double inverse_temperature;

  EIGENFORMER_DEVICE C at(Index token) const {
    return adjusted != nullptr ? adjusted[token] : static_cast<C>(logits[token]);
  }
  /// Of a token in play.
  EIGENFORMER_DEVICE double weight(C logit) const {
    return detail::token_weight(static_cast<double>(logit), static_cast<double>(band.hi),
                                inverse_temperature);
  }
  /// (logit - best) / temperature of a token in play.
  EIGENFORMER_DEVICE double scaled(C logit) const {
    const double d =
        (static_cast<double>(logit) - static_cast<double>(band.hi)) * inverse_temperature;
    return d < 0.0 ? d : 0.0;
  }
  /// 0 where a token is out of play. Threads whose four are have nothing to do.
  EIGENFORMER_DEVICE FourWeights weights(Index token, Index apart) const {
    constexpr int count = FourWeights::kCount;
    C logits_of[count];
    bool in_play[count], any = false;
    for (int k = 0; k < count; ++k) {
      const Index t = token + k * apart;
      logits_of[k] = t < vocab ? at(t) : band.hi;
      in_play[k] = t < vocab && band.contains(logits_of[k], t);
      any = any || in_play[k];
    }
    FourWeights four{};
    if (!any) return four;
    for (int k = 0; k < count; ++k) {
      const double own = weight(in_play[k] ? logits_of[k] : band.hi);
      four.values[k] = in_play[k] ? own : 0.0;
    }
    return four;
  }
};

/// Its weights, as sums in token order ask for them.
template <typename T>
EIGENFORMER_DEVICE auto weights_of(const SamplingRow<T>& row) {
  return [&row](Index token, Index apart) { return row.weights(token, apart); };
}

/// What one pass finds out about a row.
template <typename C>
struct RowBest {
  C value;
  Index index;  // the lowest of that value; vocab where all are -infinity
  int flags;    // 1: NaN seen, 2: +infinity seen
};

struct BetterRow {
  template <typename C>
  EIGENFORMER_DEVICE RowBest<C> operator()(const RowBest<C>& a, const RowBest<C>& b) const {
    const bool first = a.value > b.value || (a.value == b.value && a.index <= b.index);
    return {first ? a.value : b.value, first ? a.index : b.index, a.flags | b.flags};
  }
};

/// Smallest and largest of some logits.
template <typename C>
struct Range {
  C lo, hi;
  EIGENFORMER_DEVICE friend Range operator+(const Range& a, const Range& b) {
    return {a.lo < b.lo ? a.lo : b.lo, a.hi > b.hi ? a.hi : b.hi};
  }
};

/// The shared memory of a block that samples.
template <typename Block, typename C>
struct SamplingArrays {
  template <typename V>
  using Shared = decltype(std::declval<Block&>().template shared<V>(1));
  OrderedSums<Block> sums;
  Shared<RowBest<C>> best;  // (warps), as are the next two
  Shared<Range<C>> ranges;
  Shared<Index> counts;
  Shared<double> digits;   // (16) masses of a digit's values
  Shared<unsigned> place;  // a counter
};

template <typename C, int Threads = kRowThreads>
constexpr std::size_t sampling_arrays_bytes() {
  constexpr int warps = Threads / kWarp;
  return ordered_sums_bytes<Threads> + shared_bytes<RowBest<C>>(warps) +
         shared_bytes<Range<C>>(warps) + shared_bytes<Index>(warps) + shared_bytes<double>(16) +
         shared_bytes<unsigned>(1);
}

template <typename C, int Threads = kRowThreads, typename Block>
EIGENFORMER_DEVICE SamplingArrays<Block, C> sampling_arrays(Block& block) {
  constexpr int warps = Threads / kWarp;
  const auto sums = ordered_sums<Threads>(block);
  const auto best = block.template shared<RowBest<C>>(warps);
  const auto ranges = block.template shared<Range<C>>(warps);
  const auto counts = block.template shared<Index>(warps);
  const auto digits = block.template shared<double>(16);
  const auto place = block.template shared<unsigned>(1);
  return {sums, best, ranges, counts, digits, place};
}

/// body(token, logits, count) for the packs of `count` neighbours of this thread, each a block's
/// packs after the one before. Which they are does not depend on alignment; where the row begins at
/// a multiple of 16 bytes a pack is one load, on its way while the body works on the one before.
template <typename Block, typename T, typename Body>
EIGENFORMER_DEVICE void for_each_pack_of_row(Block& block, const SamplingRow<T>& row, Body body) {
  using C = compute_type<T>;
  constexpr int width = pack_width<T>;
  const bool whole = row.adjusted != nullptr || packs_fit<width>(row.logits, width);
  const auto load = [&](Index t) {
    if (whole && t + width <= row.vocab)
      return row.adjusted != nullptr ? load_pack<C, width>(row.adjusted + t)
                                     : load_pack<C, width>(row.logits + t);
    Pack<C, width> x;
    for (int i = 0; i < width; ++i) x[i] = t + i < row.vocab ? row.at(t + i) : C(0);
    return x;
  };
  const Index first = static_cast<Index>(block.thread()) * width,
              step = static_cast<Index>(block.size()) * width;
  Pack<C, width> next = load(first);
  for (Index t = first; t < row.vocab; t += step) {
    const Pack<C, width> x = next;
    next = load(t + step);
    body(t, x, row.vocab - t < width ? static_cast<int>(row.vocab - t) : width);
  }
}

/// body(token, logit) for the tokens of this thread, in order.
template <typename Block, typename T, typename Body>
EIGENFORMER_DEVICE void for_each_logit(Block& block, const SamplingRow<T>& row, Body body) {
  for_each_pack_of_row(block, row, [&](Index t, const auto& x, int count) {
    for (int i = 0; i < pack_width<T>; ++i)
      if (i < count) body(t + i, x[i]);
  });
}

template <typename Block, typename Scratch, typename T>
EIGENFORMER_DEVICE RowBest<compute_type<T>> best_of_row(Block& block, const Scratch& scratch,
                                                        const SamplingRow<T>& row) {
  using C = compute_type<T>;
  constexpr C infinity = std::numeric_limits<C>::infinity();
  RowBest<C> best{-infinity, row.vocab, 0};
  for_each_logit(block, row, [&](Index t, C x) {
    best.flags |= (x != x ? 1 : 0) | (x == infinity ? 2 : 0);
    if (x > best.value) {
      best.value = x;
      best.index = t;
    }
  });
  return reduce_block(block, scratch, best, BetterRow{});
}

template <typename C>
EIGENFORMER_DEVICE SampleStatus status_of(const RowBest<C>& best, Index vocab) {
  if ((best.flags & 1) != 0) return SampleStatus::nan;
  if ((best.flags & 2) != 0) return SampleStatus::positive_infinity;
  return best.index == vocab ? SampleStatus::no_token : SampleStatus::ok;
}

/// Opens the band to all tokens above -infinity; says what is wrong with the row.
template <typename Block, typename Arrays, typename T>
EIGENFORMER_DEVICE SampleStatus scan_row(Block& block, const Arrays& arrays, SamplingRow<T>& row) {
  using C = compute_type<T>;
  const RowBest<C> best = best_of_row(block, arrays.best, row);
  row.band = {best.value, std::numeric_limits<C>::lowest(), row.vocab};
  row.inverse_temperature = 1;
  return status_of(best, row.vocab);
}

/// Number of tokens of which is(token, logit), for every thread.
template <typename Block, typename Arrays, typename T, typename Is>
EIGENFORMER_DEVICE Index count_tokens(Block& block, const Arrays& arrays, const SamplingRow<T>& row,
                                      Is is) {
  Index count = 0;
  for_each_logit(block, row, [&](Index t, auto x) { count += is(t, x) ? 1 : 0; });
  return reduce_block(block, arrays.counts, count, Add{});
}

/// The `nth` token (1: the first) whose logit equals `value`, of those in play where that is the
/// largest logit; there are that many. Every warp counts a run of neighbours, and the one that has
/// it looks for it.
template <typename Block, typename Arrays, typename T>
EIGENFORMER_DEVICE Index nth_equal(Block& block, const Arrays& arrays, const SamplingRow<T>& row,
                                   compute_type<T> value, Index nth) {
  const Index warps = block.size() / kWarp;
  const Index run = ((row.vocab + warps - 1) / warps + kWarp - 1) / kWarp * kWarp;
  const Index begin = block.warp() * run, end = begin + run < row.vocab ? begin + run : row.vocab;
  const Index from = value == row.band.hi ? row.band.hi_begin : 0;
  const auto is_one = [&](Index t) { return t >= from && t < end && row.at(t) == value; };
  Index count = 0;
  for (Index t = begin + block.lane(); t < end; t += kWarp) count += is_one(t) ? 1 : 0;
  count = reduce_warp(block, count, Add{});
  if (block.lane() == 0) arrays.counts.store(block.warp(), count);
  block.barrier();
  Index before = 0;
  for (int warp = 0; warp < block.warp(); ++warp) before += arrays.counts.load(warp);
  if (before < nth && nth <= before + count) {
    for (Index t = begin; before < nth; t += kWarp) {
      const Index own = t + block.lane();
      const unsigned equals = block.ballot(is_one(own));
      for (int lane = 0; lane < kWarp && before < nth; ++lane)
        if ((equals >> lane & 1) != 0 && ++before == nth && block.lane() == lane)
          arrays.sums.token.store(0, own);
    }
  }
  block.barrier();
  const Index found = arrays.sums.token.load(0);
  block.barrier();
  return found;
}

/// Puts `count` elements of device memory into the order that better(a, b) says, by a network of
/// compare-and-swaps (Batcher, "Sorting Networks and Their Applications", 1968; the form whose
/// comparisons all point one way takes any count). log^2(count) / 2 steps.
template <typename Block, typename V, typename Better>
EIGENFORMER_DEVICE void sort_block(Block& block, V* data, Index count, Better better) {
  const auto step = [&](Index partner_bits, Index i) {
    const Index other = i ^ partner_bits;
    if (other <= i || other >= count || !better(data[other], data[i])) return;
    const V moved = data[i];
    data[i] = data[other];
    data[other] = moved;
  };
  block.barrier();
  for (Index size = 2; size < 2 * count; size *= 2)
    for (Index apart = size / 2; apart > 0; apart /= 2) {
      const Index bits = apart == size / 2 ? size - 1 : apart;  // at first as in a mirror
      for (Index i = block.thread(); i < count; i += block.size()) step(bits, i);
      block.barrier();
    }
}

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
