/// \file
/// What both forward kernels of attention share: the request on the device, and sums by splits of
/// 512 keys at absolute positions. A split gives a row its greatest score, the sum of its weights
/// relative to it and the weighted sums of the values; splits are merged in ascending order. Who
/// walks over them does not matter: one block that merges as it goes, or a block for each split and
/// then MergeSplits, so that the bits of a row do not depend on how full the device is.
#pragma once

#include <cmath>
#include <limits>
#include <span>
#include <tuple>
#include <type_traits>

#include "attention_score.cuh"
#include "collectives.cuh"
#include "kv_rows.cuh"
#include "launch.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

inline constexpr Index kSplitKeys = 512;

/// A query row and head.
struct AttentionQuery {
  const problem::AttentionSequence* s;
  Index in_sequence, head, position;
  problem::KeyRange seen;  // by position
  Index prefix_end;        // keys before it are seen as well

  EIGENFORMER_DEVICE bool sees_any() const { return seen.begin < seen.end || prefix_end > 0; }
  EIGENFORMER_DEVICE Index begin() const { return prefix_end > 0 ? 0 : seen.begin; }
  EIGENFORMER_DEVICE Index end() const {
    return seen.begin < seen.end && seen.end > prefix_end ? seen.end : prefix_end;
  }
  EIGENFORMER_DEVICE bool sees(Index j) const {
    return j < prefix_end || (j >= seen.begin && j < seen.end);
  }
  /// One of the keys [first, last).
  EIGENFORMER_DEVICE bool sees_any(Index first, Index last) const {
    return first < prefix_end || (last > seen.begin && first < seen.end && seen.begin < seen.end);
  }
};

/// The greatest score, the sum of the weights relative to it, and whether masks let the row see a
/// key.
struct AttentionPart {
  double maximum = -std::numeric_limits<double>::infinity(), weights = 0;
  bool seen = false;
};

/// Two parts in one, and the factors of their sums of values.
template <typename S>
struct MergedParts {
  AttentionPart part;
  S first, second;
};
template <typename S>
EIGENFORMER_DEVICE MergedParts<S> merge_parts(const AttentionPart& a, const AttentionPart& b) {
  const double maximum = LargerOrNan{}(a.maximum, b.maximum);
  const double reference = maximum == -std::numeric_limits<double>::infinity() ? 0.0 : maximum;
  const S first = std::exp(static_cast<S>(a.maximum - reference)),
          second = std::exp(static_cast<S>(b.maximum - reference));
  return {{maximum,
           std::fma(b.weights, static_cast<double>(second), a.weights * static_cast<double>(first)),
           a.seen || b.seen},
          first,
          second};
}
template <typename S>
EIGENFORMER_DEVICE S merge_sums(const MergedParts<S>& m, S first, S second) {
  return std::fma(second, m.second, first * m.first);
}

/// The request, with all arrays on the device.
template <typename TQ, typename TKV, typename Function>
struct AttentionCall {
  using C = compute_type<TQ>;
  using Key = TKV;
  static constexpr double kInfinity = std::numeric_limits<double>::infinity();
  problem::Attention<TQ, TKV, Function> p;
  KvRows<TKV> rows;
  Index row_count, group;

  EIGENFORMER_DEVICE AttentionQuery query_at(const problem::AttentionSequence& s, Index in_sequence,
                                             Index head) const {
    const Index position = s.first_position + in_sequence;
    if (in_sequence >= s.query_rows) return {&s, in_sequence, head, position, {0, 0}, 0};
    const Index prefix = p.visibility.prefix;
    return {&s,
            in_sequence,
            head,
            position,
            p.visibility.keys(position, s.key_length),
            prefix < s.key_length ? prefix : s.key_length};
  }
  /// Row `index` of (rows, heads).
  EIGENFORMER_DEVICE AttentionQuery query_at(Index index) const {
    const Index row = index / p.heads;
    const problem::AttentionSequence& s = p.sequences[sequence_at(
        p.batch, row, [&](Index b) { return p.sequences[b].query_begin; })];  // it has rows
    return query_at(s, row - s.query_begin, index % p.heads);
  }
  EIGENFORMER_DEVICE Index index_of(const AttentionQuery& q) const {
    return (q.s->query_begin + q.in_sequence) * p.heads + q.head;
  }
  EIGENFORMER_DEVICE const TQ* query(const AttentionQuery& q) const {
    return p.query(q.s->query_begin + q.in_sequence, q.head);
  }

  EIGENFORMER_DEVICE problem::ScoreRow score_row(const AttentionQuery& q) const {
    return {q.s - p.sequences, q.head, q.s->query_begin + q.in_sequence, q.position};
  }
  /// By its position, masks and bias; Masked false: there are none.
  template <bool Masked = true>
  EIGENFORMER_DEVICE bool sees(const AttentionQuery& q, Index j) const {
    return q.sees(j) && (!Masked || !p.masked() || p.unmasked(score_row(q), j));
  }

  /// The sink joins the weights of a row that sees a key: the factor of the sums of values, and
  /// log_sum_exp.
  struct End {
    double factor = 0, log_sum_exp = -kInfinity;
  };
  EIGENFORMER_DEVICE End end_of(const AttentionQuery& q, const AttentionPart& part) const {
    if (!part.seen || !q.sees_any()) return {};
    const double sink = p.sinks == nullptr ? -kInfinity : static_cast<double>(p.sinks[q.head]);
    const auto all = merge_parts<double>(part, {sink, sink > -kInfinity ? 1.0 : 0.0});
    if (all.part.weights == 0) return {};
    return {all.first / all.part.weights, all.part.maximum + std::log(all.part.weights)};
  }
  /// From half of an average: rounding must not take the greatest numbers out of their range.
  EIGENFORMER_DEVICE static TQ output_of(double halved) {
    constexpr double most = (std::is_same_v<TKV, half>       ? 65504.0
                             : std::is_same_v<TKV, bfloat16> ? 0x1.fep127
                                                             : (std::numeric_limits<C>::max)()) /
                            2;
    if (std::fabs(halved) < kInfinity)
      halved = halved > most ? most : (halved < -most ? -most : halved);
    return static_cast<TQ>(static_cast<C>(halved * 2));
  }
  EIGENFORMER_DEVICE void write_log_sum_exp(const AttentionQuery& q, double value) const {
    if (p.log_sum_exp != nullptr)
      p.log_sum_exp[q.s->lse_begin + q.head * p.lse_head_stride + q.in_sequence] =
          static_cast<C>(value);
  }
};

/// run(std::bool_constant<masked>): a kernel without masks and bias needs fewer registers. Those of
/// functions of scores are of one kind.
template <typename Problem, typename Run>
void with_masked(const Problem& p, const Run& run) {
  if constexpr (!problem::is_score_function<decltype(Problem::function)>)
    if (!p.masked()) return run(std::false_type{});
  run(std::true_type{});
}

/// The request with its arrays on the device, and one more array.
template <typename D, typename TQ, typename TKV, typename Function>
std::tuple<AttentionCall<TQ, TKV, Function>, const Index*> stage_attention(
    const Backend<D>& on, const char* name, const problem::Attention<TQ, TKV, Function>& p,
    std::span<const Index> more) {
  // a paged source has the sequences of the request
  const auto touched = [&](Index b) {
    const problem::AttentionSequence& s = p.sequences[b];
    if (s.query_rows == 0) return Positions{0, 0};
    const Index first = p.visibility.keys(s.first_position, s.key_length).begin;
    return Positions{p.visibility.prefix > 0 ? 0 : first, s.key_length};
  };
  const auto span_of = [](const auto* array, Index count) {
    return std::span(array, static_cast<std::size_t>(array == nullptr ? 0 : count));
  };
  const problem::AttentionSequence& last = p.sequences[p.batch - 1];
  AttentionCall<TQ, TKV, Function> call{p, {}, last.query_begin + last.tensor_rows, p.group()};
  const Index* staged = nullptr;
  std::tie(call.rows, call.p.sequences, call.p.alibi_slopes, call.p.sinks,
           call.p.bit_mask.first_keys, staged) =
      stage_rows(on, name, p.source, touched, span_of(p.sequences, p.batch),
                 span_of(p.alibi_slopes, p.heads), span_of(p.sinks, p.heads),
                 span_of(p.bit_mask.first_keys, p.batch), more);
  return {call, staged};
}

/// The output from what the splits of each row have left: a block for each row and head. sums are
/// those of values, times `unit`.
template <typename Call, typename S>
struct MergeSplits {
  using Output = std::remove_pointer_t<decltype(Call::p.output)>;
  static constexpr int kThreads = 128;
  Call call;
  Index splits;
  const AttentionPart* parts;  // (rows, heads, splits), written where the row sees a key of it
  const S* sums;               // (rows, heads, splits, value_dim)
  double unit;

  template <typename Block>
  EIGENFORMER_DEVICE void operator()(Block& block) const {
    const auto& p = call.p;
    for (Index at = block.index(); at < call.row_count * p.heads; at += block.count()) {
      const AttentionQuery q = call.query_at(at);
      if (block.thread() == 0) {
        const AttentionPart all = merge(q, at, [](const auto&, Index) {});
        call.write_log_sum_exp(q, call.end_of(q, all).log_sum_exp);
      }
      for (Index d = block.thread(); d < p.value_dim; d += kThreads) {
        S sum = 0;
        const AttentionPart all = merge(q, at, [&](const MergedParts<S>& m, Index split) {
          sum = merge_sums(m, sum, sums[(at * splits + split) * p.value_dim + d]);
        });
        const double factor = call.end_of(q, all).factor;
        p.output[at * p.value_dim + d] =
            factor == 0 ? Output(0)
                        : call.output_of(static_cast<double>(sum) * (factor / unit / 2));
      }
    }
  }

 private:
  template <typename Add>
  EIGENFORMER_DEVICE AttentionPart merge(const AttentionQuery& q, Index at, const Add& add) const {
    AttentionPart all;
    for (Index split = 0; split < splits; ++split) {
      if (!q.sees_any(split * kSplitKeys, (split + 1) * kSplitKeys)) continue;
      const auto merged = merge_parts<S>(all, parts[at * splits + split]);
      add(merged, split);
      all = merged.part;
    }
    return all;
  }
};

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
