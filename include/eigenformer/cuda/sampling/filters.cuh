/// \file
/// The filters, by a block: each narrows the band (row.cuh), as in cpu/sampling/filters.h. They
/// share one selection, without a sort: the masses of the tokens by the next 4 bits of their key,
/// added by each thread in a column of its own in shared memory, then over the threads in a fixed
/// tree: no atomics, and the same bits whatever the schedule. A pass per 4 bits: 4 for bfloat16, 5
/// for half, 8 for float, 16 for double and for typical-p.
///
/// Weights are those of the CPU. Sums of masses are doubles in an order of their own: where the
/// probability of a set comes to within a rounding (1e-13) of p, one device may keep a token more
/// than the other.
#pragma once

#include <bit>
#include <cmath>

#include "row.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

/// Where the shortest prefix ends, by descending key, whose weights reach a target: at the last
/// token that weighs anything where they do not.
struct PrefixEnd {
  std::uint64_t key;  // of the last tokens taken
  double above;       // the weight of those of larger key
};

/// Over the tokens in play. key(logit) has `bits` bits, of which the last `constant_bits` say
/// nothing that the others do not, and are left 0.
template <typename Block, typename Arrays, typename T, typename Key, typename Weight>
EIGENFORMER_DEVICE PrefixEnd select_prefix(Block& block, const Arrays& arrays,
                                           const SamplingRow<T>& row, double target, int bits,
                                           int constant_bits, Key key, Weight weight) {
  constexpr int digit_bits = 4, digits = 1 << digit_bits;
  const auto& masses = arrays.sums.numbers;  // (digits, threads)
  const Index threads = block.size();
  PrefixEnd end{0, 0};
  for (int shift = bits - digit_bits; shift >= constant_bits; shift -= digit_bits) {
    for (int digit = 0; digit < digits; ++digit)
      masses.store(digit * threads + block.thread(), 0.0);
    const std::uint64_t wanted = end.key >> shift >> digit_bits;
    for_each_pack_of_row(block, row, [&](Index t, const auto& x, int count) {
      constexpr int width = pack_width<T>;
      int digit_of[width];  // -1: not among those looked at
      bool any = false;
      for (int i = 0; i < width; ++i) {
        const std::uint64_t from_here = std::uint64_t{key(x[i])} >> shift;
        const bool looked_at =
            i < count && row.band.contains(x[i], t + i) && from_here >> digit_bits == wanted;
        digit_of[i] = looked_at ? static_cast<int>(from_here & (digits - 1)) : -1;
        any = any || looked_at;
      }
      if (!any) return;
      constexpr int together = width < FourWeights::kCount ? width : FourWeights::kCount;
      for (int first = 0; first < width; first += together) {
        double weights[together];
        for (int i = 0; i < together; ++i)
          weights[i] = weight(digit_of[first + i] < 0 ? row.band.hi : x[first + i]);
        for (int i = 0; i < together; ++i) {
          if (digit_of[first + i] < 0) continue;
          const Index at = digit_of[first + i] * threads + block.thread();
          masses.store(at, masses.load(at) + weights[i]);
        }
      }
    });
    block.barrier();
    // 16 neighbours of 256 threads, 32 of 512, add a digit
    const int members = block.size() / digits;
    const int digit = block.thread() / members, member = block.thread() % members;
    double sum = 0;
    for (Index i = member; i < threads; i += members) sum += masses.load(digit * threads + i);
    for (int apart = members / 2; apart > 0; apart /= 2) sum += block.shuffle_xor(sum, apart);
    if (member == 0) arrays.digits.store(digit, sum);
    block.barrier();
    std::uint64_t chosen = 0;
    double before = end.above;
    for (int d = digits - 1; d >= 0; --d) {
      const double mass = arrays.digits.load(d);
      if (mass == 0) continue;
      chosen = static_cast<std::uint64_t>(d);
      end.above = before;
      before += mass;
      if (before >= target) break;
    }
    end.key |= chosen << shift;
  }
  return end;
}

/// The logits of one type have keys whose last bits are always the same.
template <typename T>
inline constexpr int constant_key_bits = std::is_same_v<T, Eigen::bfloat16> ? 16
                                         : std::is_same_v<T, Eigen::half>   ? 12
                                                                            : 0;

/// The logit of a key whose last bits may be missing: the others of a logit are 0.
EIGENFORMER_DEVICE inline float logit_of_key(std::uint64_t key, float) {
  const auto word = static_cast<std::uint32_t>(key);
  return std::bit_cast<float>(word >> 31 != 0 ? word ^ 0x80000000u : ~word);
}
EIGENFORMER_DEVICE inline double logit_of_key(std::uint64_t key, double) {
  return std::bit_cast<double>(key >> 63 != 0 ? key ^ 0x8000000000000000u : ~key);
}

/// The last token of a prefix of the tokens in play, by logit and index.
template <typename C>
struct LastTaken {
  C value;
  Index taken, equals;  // of the tokens of that logit that are in play
};

/// Where the shortest prefix ends whose weights reach `target`: at the last token that weighs
/// anything where they do not.
template <typename Block, typename Arrays, typename T, typename Weight>
EIGENFORMER_DEVICE LastTaken<compute_type<T>> last_of_prefix(Block& block, const Arrays& arrays,
                                                             const SamplingRow<T>& row,
                                                             double target, Weight weight) {
  using C = compute_type<T>;
  constexpr int bits = 8 * static_cast<int>(sizeof(C));
  const int constant = row.adjusted != nullptr ? 0 : constant_key_bits<T>;
  auto end = select_prefix(
      block, arrays, row, target, bits, constant, [](C x) { return problem::order_key(x); },
      weight);
  // below 0 the bits of a key are the opposite ones
  if (end.key >> (bits - 1) == 0) end.key |= (std::uint64_t{1} << constant) - 1;
  const C value = logit_of_key(end.key, C(0));
  const Index equals = count_tokens(
      block, arrays, row, [&](Index t, C x) { return x == value && row.band.contains(x, t); });
  const double each = weight(value);
  const bool reached = end.above + static_cast<double>(equals) * each >= target;
  return {value, reached ? problem::equals_taken(end.above, each, equals, target) : equals, equals};
}

template <typename Block, typename Arrays, typename T>
EIGENFORMER_DEVICE void end_band_at(Block& block, const Arrays& arrays, SamplingRow<T>& row,
                                    const LastTaken<compute_type<T>>& end) {
  if (end.taken < end.equals)
    row.band.lo_end = nth_equal(block, arrays, row, end.value, end.taken) + 1;
  else if (end.value > row.band.lo)
    row.band.lo_end = row.vocab;
  row.band.lo = end.value;
}

/// Keeps the shortest prefix of the tokens in play, by logit and index, whose weights reach
/// `target`: all where they do not.
template <typename Block, typename Arrays, typename T, typename Weight>
EIGENFORMER_DEVICE void keep_prefix(Block& block, const Arrays& arrays, SamplingRow<T>& row,
                                    double target, bool all_equals, Weight weight) {
  auto end = last_of_prefix(block, arrays, row, target, weight);
  if (all_equals) end.taken = end.equals;
  end_band_at(block, arrays, row, end);
}

template <typename Block, typename Arrays, typename T>
EIGENFORMER_DEVICE void keep_top_k(Block& block, const Arrays& arrays, SamplingRow<T>& row, Index k,
                                   TopKTies ties) {
  if (k >= row.vocab) return;
  keep_prefix(block, arrays, row, static_cast<double>(k), ties == TopKTies::keep_all,
              [](auto) { return 1.0; });
}

template <typename Block, typename Arrays, typename T>
EIGENFORMER_DEVICE void keep_top_p(Block& block, const Arrays& arrays, SamplingRow<T>& row,
                                   double p) {
  if (p >= 1.0) return;
  const double total = sum_in_order(block, arrays.sums, row.vocab, weights_of(row));
  keep_prefix(block, arrays, row, (p > 0 ? p : 0.0) * total, false,
              [&](auto x) { return row.weight(x); });
}

/// The range of the tokens in play whose logit is one of those kept(logit) says.
template <typename Block, typename Arrays, typename T, typename Kept>
EIGENFORMER_DEVICE Range<compute_type<T>> range_of(Block& block, const Arrays& arrays,
                                                   const SamplingRow<T>& row, Kept kept) {
  using C = compute_type<T>;
  Range<C> range{row.band.hi, row.band.lo};
  for_each_logit(block, row, [&](Index t, C x) {
    if (row.band.contains(x, t) && kept(x)) range = range + Range<C>{x, x};
  });
  return reduce_block(block, arrays.ranges, range, Add{});
}

template <typename Block, typename Arrays, typename T>
EIGENFORMER_DEVICE void keep_min_p(Block& block, const Arrays& arrays, SamplingRow<T>& row,
                                   double min_p) {
  if (min_p <= 0.0) return;
  const auto least =
      range_of(block, arrays, row, [&](auto x) { return row.weight(x) >= min_p; }).lo;
  if (least > row.band.lo) row.band.lo_end = row.vocab;
  row.band.lo = least;
}

/// Sums over the tokens in play, of their weights and of weight * (logit - best) / temperature.
struct WeightSums {
  double total, moment;

  EIGENFORMER_DEVICE double mean() const { return moment / total; }
  /// In nats.
  EIGENFORMER_DEVICE double entropy() const { return std::log(total) - mean(); }
};

template <typename Block, typename Arrays, typename T>
EIGENFORMER_DEVICE WeightSums weight_sums(Block& block, const Arrays& arrays,
                                          const SamplingRow<T>& row) {
  const double total = sum_in_order(block, arrays.sums, row.vocab, weights_of(row));
  const double moment = sum_in_order(block, arrays.sums, row.vocab, [&](Index t, Index apart) {
    FourWeights four = row.weights(t, apart);
    for (int k = 0; k < FourWeights::kCount; ++k)
      if (four.values[k] > 0) four.values[k] *= row.scaled(row.at(t + k * apart));
    return four;
  });
  return {total, moment};
}

/// Keeps the tokens whose information is nearest to the entropy, with all as near as the last,
/// until weight(logit) of them sums to `target`. The distance is |d - mean of d| with d = (logit -
/// best) / temperature, see cpu/sampling/filters.h.
template <typename Block, typename Arrays, typename T, typename Weight>
EIGENFORMER_DEVICE void keep_nearest(Block& block, const Arrays& arrays, SamplingRow<T>& row,
                                     double mean, double target, Weight weight) {
  using C = compute_type<T>;
  const auto distance = [&](C x) { return std::abs(row.scaled(x) - mean); };
  const auto end = select_prefix(
      block, arrays, row, target, 64, 0,
      [&](C x) { return ~std::bit_cast<std::uint64_t>(distance(x)); },  // near is first
      weight);
  const double farthest = std::bit_cast<double>(~end.key);
  const Range<C> kept = range_of(block, arrays, row, [&](C x) { return distance(x) <= farthest; });
  row.band = {kept.hi, kept.lo, kept.lo > row.band.lo ? row.vocab : row.band.lo_end,
              kept.hi < row.band.hi ? 0 : row.band.hi_begin};
}

template <typename Block, typename Arrays, typename T>
EIGENFORMER_DEVICE void keep_typical_p(Block& block, const Arrays& arrays, SamplingRow<T>& row,
                                       double p) {
  if (p >= 1.0) return;
  const WeightSums sums = weight_sums(block, arrays, row);
  keep_nearest(block, arrays, row, sums.mean(), p * sums.total,
               [row](auto x) { return row.weight(x); });
}

template <typename Block, typename Arrays, typename T>
EIGENFORMER_DEVICE void set_temperature(Block& block, const Arrays& arrays, SamplingRow<T>& row,
                                        double temperature) {
  if (temperature == 0.0) {
    row.band.lo_end = nth_equal(block, arrays, row, row.band.hi, 1) + 1;
    row.band.lo = row.band.hi;
  } else {
    row.inverse_temperature = problem::inverse_temperature(temperature);
  }
}

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
