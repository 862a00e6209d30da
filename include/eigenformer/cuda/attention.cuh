/// \file
/// CUDA kernel of attention forward: one block of 64 threads per query row and head, online softmax
/// (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018) over key blocks of
/// 64 at absolute positions, so that the bits of a row depend on nothing but what it sees. Of a key
/// block a thread takes the score of one key, then the weighted sums of its columns of the values:
/// sums of 64 keys in the compute type, of all blocks in double. A row whose greatest score is so
/// large that its rounding would show goes over its keys once more with scores in double.
///
/// 4 * head_dim flops a visible pair. Every row reads its keys and values itself, once: queries of
/// one group and neighbouring rows find them in L2, so that decoding (one row a sequence) reads
/// them from memory about once and should see a third of the bandwidth where heads x sequences fill
/// the device; prefill is bound by L2 and far from the limit of tensor cores, which are not used.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "attention_scores.cuh"
#include "collectives.cuh"
#include "kv_rows.cuh"
#include "launch.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

inline constexpr int kAttentionKeys = 64;  // of a block: one per thread

/// Shared memory of a block.
template <typename Sums, typename Weights, typename Values>
struct AttentionArrays {
  Weights query;    // (head_dim), scaled
  Sums sums;        // (value_dim), each of one thread
  Weights weights;  // (64) of a key block; negative: not seen
  Weights scales;   // (64) of its values
  Values values;    // (64) their rows
  Sums scratch;     // (warps)
};

template <typename TQ, typename TKV>
struct AttentionKernel {
  using C = compute_type<TQ>;
  static constexpr int kThreads = kAttentionKeys, kWarps = kThreads / kWarp;
  static constexpr bool kInt8 = std::is_same_v<TKV, std::int8_t>;
  problem::Attention<TQ, TKV> p;  // its arrays are those below
  KvRows<TKV> rows;
  const problem::AttentionSequence* sequences;
  const float* slopes;
  const float* sinks;
  Index row_count, group;

  static std::size_t shared_size(Index head_dim, Index value_dim) {
    return shared_bytes<C>(head_dim) + shared_bytes<double>(value_dim) + shared_bytes<C>(kThreads) +
           shared_bytes<C>(kThreads) + shared_bytes<const TKV*>(kThreads) +
           shared_bytes<double>(kWarps);
  }

  template <typename Block>
  EIGENFORMER_DEVICE void operator()(Block& block) const {
    const auto query = block.template shared<C>(p.head_dim);
    const auto sums = block.template shared<double>(p.value_dim);
    const auto weights = block.template shared<C>(kThreads);
    const auto scales = block.template shared<C>(kThreads);
    const auto values = block.template shared<const TKV*>(kThreads);
    const auto scratch = block.template shared<double>(kWarps);
    const AttentionArrays<decltype(sums), decltype(weights), decltype(values)> arrays{
        query, sums, weights, scales, values, scratch};
    for (Index at = block.index(); at < row_count * p.heads; at += block.count()) {
      const problem::AttentionSequence& s = sequences[sequence_of(at / p.heads)];
      const Row row = row_at(s, at / p.heads - s.query_begin, at % p.heads);
      if (row.seen.begin < row.seen.end || row.prefix_end > 0)
        attend(block, arrays, s, row);
      else
        write_empty(block, s, row);
    }
  }

 private:
  struct Row {
    Index in_sequence, head, position;
    problem::KeyRange seen;  // by position
    Index prefix_end;        // keys before it are seen as well

    EIGENFORMER_DEVICE Index begin() const {
      return prefix_end > 0 ? 0 : seen.begin / kAttentionKeys * kAttentionKeys;
    }
    EIGENFORMER_DEVICE Index end() const {
      return seen.begin < seen.end && seen.end > prefix_end ? seen.end : prefix_end;
    }
    EIGENFORMER_DEVICE bool sees(Index j) const {
      return j < prefix_end || (j >= seen.begin && j < seen.end);
    }
    EIGENFORMER_DEVICE bool sees_block(Index j) const {
      return j < prefix_end || (j + kAttentionKeys > seen.begin && j < seen.end);
    }
  };

  /// The greatest score, and the sum of the weights relative to it, times kFactor.
  struct Total {
    double maximum, weights;
  };

  /// Weights are made smaller, so that sums of finite values are finite: of 64 keys in float, of
  /// all in double.
  static constexpr double kFactor = sizeof(C) == 8 ? 0x1p-46 : 0x1p-6;
  static constexpr double kInfinity = std::numeric_limits<double>::infinity();

  EIGENFORMER_DEVICE Index sequence_of(Index row) const {
    Index first = 0, last = p.batch;  // the last that begins there or before: it has rows
    while (last - first > 1) {
      const Index middle = (first + last) / 2;
      (sequences[middle].query_begin <= row ? first : last) = middle;
    }
    return first;
  }

  EIGENFORMER_DEVICE Row row_at(const problem::AttentionSequence& s, Index in_sequence,
                                Index head) const {
    const Index position = s.first_position + in_sequence;
    if (in_sequence >= s.query_rows) return {in_sequence, head, position, {0, 0}, 0};  // padding
    const Index prefix = p.visibility.causal ? p.visibility.prefix : 0;
    return {in_sequence, head, position, p.visibility.keys(position, s.key_length),
            prefix < s.key_length ? prefix : s.key_length};
  }

  EIGENFORMER_DEVICE Index output_row(const problem::AttentionSequence& s, const Row& row) const {
    return (s.query_begin + row.in_sequence) * p.heads + row.head;
  }
  template <typename Block>
  EIGENFORMER_DEVICE void write_lse(Block& block, const problem::AttentionSequence& s,
                                    const Row& row, double value) const {
    if (p.log_sum_exp != nullptr && block.thread() == 0)
      p.log_sum_exp[s.lse_begin + row.head * p.lse_head_stride + row.in_sequence] =
          static_cast<C>(value);
  }
  template <typename Block>
  EIGENFORMER_DEVICE void write_empty(Block& block, const problem::AttentionSequence& s,
                                      const Row& row) const {
    TQ* const to = p.output + output_row(s, row) * p.value_dim;
    for (Index d = block.thread(); d < p.value_dim; d += block.size()) to[d] = TQ(0);
    write_lse(block, s, row, -kInfinity);
  }

  template <typename Block, typename A>
  EIGENFORMER_DEVICE void attend(Block& block, const A& arrays, const problem::AttentionSequence& s,
                                 const Row& row) const {
    Total total = pass_over_keys<C>(block, arrays, s, row);
    // all threads of the block, or none
    if (is_large_score<TQ, TKV>(total.maximum) && total.weights > 0 && total.weights < kInfinity)
      total = pass_over_keys<double>(block, arrays, s, row);
    TQ* const to = p.output + output_row(s, row) * p.value_dim;
    constexpr double most = static_cast<double>((std::numeric_limits<C>::max)()) / 2;
    for (Index d = block.thread(); d < p.value_dim; d += block.size()) {
      // rounding must not take the average of the greatest numbers out of their range
      double half = total.weights == 0 ? 0.0 : arrays.sums.load(d) / total.weights / 2;
      if (std::fabs(half) < kInfinity) half = half > most ? most : (half < -most ? -most : half);
      to[d] = static_cast<TQ>(static_cast<C>(half * 2));
    }
    write_lse(block, s, row,
              total.weights == 0 ? -kInfinity : total.maximum + std::log(total.weights / kFactor));
  }

  /// Leaves the weighted sums of the values; scores are of S.
  template <typename S, typename Block, typename A>
  EIGENFORMER_DEVICE Total pass_over_keys(Block& block, const A& arrays,
                                          const problem::AttentionSequence& s,
                                          const Row& row) const {
    const TQ* const query = p.queries + output_row(s, row) * p.head_dim;
    for (Index d = block.thread(); d < p.head_dim; d += block.size())
      arrays.query.store(d, static_cast<C>(query[d]) * p.scale);
    for (Index d = block.thread(); d < p.value_dim; d += block.size()) arrays.sums.store(d, 0.0);
    block.barrier();
    double maximum = sinks == nullptr ? -kInfinity : static_cast<double>(sinks[row.head]);
    double weights = maximum > -kInfinity && block.thread() == 0 ? kFactor : 0.0;  // this thread's
    for (Index begin = row.begin(); begin < row.end(); begin += kAttentionKeys) {
      if (!row.sees_block(begin)) continue;
      const bool seen = row.sees(begin + block.thread());
      const double score =
          seen ? static_cast<double>(score_of<S>(block, arrays, s, row, begin)) : -kInfinity;
      const double before = maximum;
      maximum = LargerOrNan{}(before, reduce_block(block, arrays.scratch, score, LargerOrNan{}));
      const bool nothing = maximum == -kInfinity;  // all scores so far are -infinity
      const double fall = nothing ? 1.0 : std::exp(before - maximum);
      const C weight = std::exp(static_cast<C>(static_cast<S>(score) -
                                               static_cast<S>(nothing ? 0.0 : maximum))) *
                       static_cast<C>(kFactor);
      weights = weights * fall + (seen ? static_cast<double>(weight) : 0.0);
      arrays.weights.store(block.thread(), seen ? weight : C(-1));
      block.barrier();
      add_values(block, arrays, fall);
      block.barrier();
    }
    return {maximum, reduce_block(block, arrays.scratch, weights, Add{})};
  }

  /// The score of this thread's key, and where its value is.
  template <typename S, typename Block, typename A>
  EIGENFORMER_DEVICE S score_of(Block& block, const A& arrays, const problem::AttentionSequence& s,
                                const Row& row, Index begin) const {
    const Index b = s.key_sequence, h = row.head / group, j = begin + block.thread(),
                at = s.key_begin + j;
    arrays.values.store(block.thread(), rows.row(true, b, h, at));
    const TKV* const key = rows.row(false, b, h, at);
    const TQ* const query = p.queries + output_row(s, row) * p.head_dim;
    S product = key_product<S, C>(key, p.head_dim, [&](Index d) {
      if constexpr (std::is_same_v<S, C>)
        return arrays.query.load(d);
      else
        return static_cast<S>(query[d]) * static_cast<S>(p.scale);
    });
    if constexpr (kInt8) {
      product *= static_cast<S>(*rows.scale(false, b, h, at));
      arrays.scales.store(block.thread(), static_cast<C>(*rows.scale(true, b, h, at)));
    }
    return score_of_product<S>(product, static_cast<S>(p.softcap),
                               static_cast<S>(slopes == nullptr ? 0.0f : slopes[row.head]),
                               j - row.position)
        .value;
  }

  /// sums * fall + what the values of a key block add.
  template <typename Block, typename A>
  EIGENFORMER_DEVICE void add_values(Block& block, const A& arrays, double fall) const {
    for (Index d = block.thread(); d < p.value_dim; d += block.size()) {
      C sum = 0;
      for (int i = 0; i < kAttentionKeys; ++i) {
        const C weight = arrays.weights.load(i);
        if (weight < 0) continue;
        C value = static_cast<C>(arrays.values.load(i)[d]);
        if constexpr (kInt8) value *= arrays.scales.load(i);
        sum = std::fma(weight, value, sum);
      }
      arrays.sums.store(d, arrays.sums.load(d) * fall + static_cast<double>(sum));
    }
  }
};

template <typename D, typename TQ, typename TKV>
void execute(const Backend<D>& on, const problem::Attention<TQ, TKV>& p) {
  using Kernel = AttentionKernel<TQ, TKV>;
  if (p.batch == 0 || p.heads == 0) return;
  const problem::AttentionSequence& last = p.sequences[p.batch - 1];
  const Index row_count = last.query_begin + last.tensor_rows;
  if (row_count == 0) return;
  // a paged source has the sequences of the request
  const auto touched = [&](Index b) {
    const problem::AttentionSequence& s = p.sequences[b];
    if (s.query_rows == 0) return Positions{0, 0};
    const Index first = p.visibility.keys(s.first_position, s.key_length).begin;
    return Positions{p.visibility.prefix > 0 ? 0 : first, s.key_length};
  };
  const auto count = [](const auto* array, Index size) {
    return static_cast<std::size_t>(array == nullptr ? 0 : size);
  };
  const auto [rows, sequences, slopes, sinks] = stage_rows(
      on, "attention", p.source, touched,
      std::span<const problem::AttentionSequence>(p.sequences, count(p.sequences, p.batch)),
      std::span<const float>(p.alibi_slopes, count(p.alibi_slopes, p.heads)),
      std::span<const float>(p.sinks, count(p.sinks, p.heads)));
  launch_rows(on, "attention", row_count * p.heads, Kernel::shared_size(p.head_dim, p.value_dim),
              Kernel{p, rows, sequences, slopes, sinks, row_count, p.group()});
}

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
