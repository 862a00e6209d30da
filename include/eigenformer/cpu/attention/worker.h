/// \file
/// What one worker of attention's forward kernel does: a block of query positions, or a fold of its
/// keys. attention.h says how.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <span>
#include <utility>

#include "../backend.h"
#include "../vector/copy.h"
#include "products.h"
#include "row.h"
#include "score.h"
#include "scratch.h"
#include "tile.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

template <typename Isa, typename TQ, typename TKV, typename Function>
class AttentionWorker {
  using C = compute_type<TQ>;
  using Tile = AttentionTile<C, Isa>;
  using V = typename Tile::V;
  using Problem = problem::Attention<TQ, TKV, Function>;
  static constexpr C kInfinity = std::numeric_limits<C>::infinity();
  static constexpr C kLargest = (std::numeric_limits<C>::max)();

 public:
  AttentionWorker(const Problem& problem, const AttentionScratch<C>& scratch)
      : p_(problem),
        s_(scratch),
        group_(problem.group()),
        width_(Tile::padded(problem.value_dim)),
        products_(problem, scratch) {}

  /// Rows of keys and values of a block, nullptr where they are packed or there is none.
  const BlockRows<TKV>* rows_at(Index block) { return products_.rows_at(block); }

  /// A task is start, then score and add_values for one block of keys after the other, then finish.
  /// False: nothing to score. `then` are the rows that are read afterwards.
  bool start(const AttentionTask& task) {
    write_padding(task);
    fold_ = -1;
    folded_ = false;
    return begin(task);
  }
  void score(Index block, const TKV* const* then) {
    if (block / kAttentionFold != fold_) {
      if (fold_ >= 0) merge(s_.now, std::exchange(folded_, true));
      start_fold(block / kAttentionFold);
    }
    sees_ = find_ranges(block);
    if (!sees_) return;
    products_.score(block, then);
    softmax_rows(block);
  }
  void add_values(Index block, const TKV* const* then) {
    if (sees_) products_.add_values(block, then);
  }
  void finish() {
    if (fold_ < 0) start_fold(0);
    if (folded_) {
      merge(s_.now, true);
      copy_states(s_.folded, s_.now, rows_, width_, Tile::lanes);
    }
    write_rows();
  }

  /// The keys of one fold: start_fold, the same for its blocks, save_fold. What they make of the
  /// rows goes to `state`, and nothing to the output, which the folds of a task have in common.
  bool start_fold(const AttentionTask& task, Index fold) {
    if (!begin(task)) return false;
    start_fold(fold);
    return true;
  }
  void save_fold(const AttentionState<C>& state) {
    copy_states(s_.now, state, rows_, width_, Tile::lanes);
  }
  /// The states of all folds of a task, in order, `stride` apart, to its output: the bits of the
  /// above.
  void finish_folds(const AttentionTask& task, const AttentionState<C>* folds, Index count,
                    Index stride) {
    write_padding(task);
    if (!begin(task)) return;
    for (Index i = 0; i < count; ++i) merge(folds[i * stride], i > 0);
    copy_states(s_.folded, s_.now, rows_, width_, Tile::lanes);
    write_rows();
  }

  /// f(begin) for the blocks of keys that rows of a task see.
  template <typename F>
  void for_each_block(F&& f) const {
    for_each_block(*sequence_, queries_, f);
  }

 private:
  /// Sums to averages, and these to the output.
  void write_rows() {
    const problem::AttentionSequence& sequence = *sequence_;
    const Index kv_head = kv_head_, first = first_, queries = queries_;
    Index large = 0;
    for (Index r = 0; r < rows_; ++r) {
      s_.finite[r] = finish_row(r);
      if (has_large_scores(r)) s_.large_rows[large++] = r;
    }
    for (Index i = 0; i < large; i += kRowsInDouble)
      average_rows(
          sequence, kv_head, first, queries,
          {s_.large_rows + i, static_cast<std::size_t>((std::min)(kRowsInDouble, large - i))},
          true);
    for (Index i = 0; i < large; ++i) s_.finite[s_.large_rows[i]] = is_finite(s_.large_rows[i]);
    bool looked = false;
    for (Index r = 0; r < rows_; ++r) {
      if (s_.finite[r]) continue;
      if (!std::exchange(looked, true)) find_bad_values(sequence, kv_head, queries);
      if (overflowed(r)) average_rows(sequence, kv_head, first, queries, {&r, 1}, false);
    }
    for (Index r = 0; r < rows_; ++r)
      write_row(sequence, kv_head * group_ + r % group_, first + r / group_, r);
  }

  void write_padding(const AttentionTask& task) const {
    for (Index i = task.queries(); i < task.count; ++i)
      for (Index g = 0; g < group_; ++g)
        write_empty_row(*task.sequence, task.kv_head * group_ + g, task.first + i);
  }

  /// False where none of the rows is a query.
  bool begin(const AttentionTask& task) {
    sequence_ = task.sequence;
    kv_head_ = task.kv_head;
    first_ = task.first;
    queries_ = task.queries();
    rows_ = queries_ * group_;
    first_position_ = sequence_->first_position + first_;
    const auto query = [&](Index r) {
      return p_.query(sequence_->query_begin + first_ + r / group_, head(r));
    };
    if constexpr (std::is_same_v<TKV, std::int8_t>)
      if (const float* const scales = channel_scales(p_, kv_head_); scales != nullptr) {
        const auto scaled = [&](Index r) { return s_.queries + r * p_.head_dim; };
        for (Index r = 0; r < rows_; ++r)
          multiply_line<simd::Vec<C, Isa>>(query(r), scales, scaled(r), p_.head_dim);
        products_.begin(*sequence_, kv_head_, rows_, scaled);
        return rows_ > 0;
      }
    products_.begin(*sequence_, kv_head_, rows_, query);
    return rows_ > 0;
  }

  Index head(Index r) const { return kv_head_ * group_ + r % group_; }

  /// A sink is a key with weight exp(sink - maximum) and no value, in the fold of the first key
  /// that the row sees: so a row's order of sums is its own.
  void start_fold(Index fold) {
    const AttentionState<C>& now = s_.now;
    fold_ = fold;
    full_ = false;
    for (Index r = 0; r < rows_; ++r) {
      bool sink =
          p_.sinks != nullptr && p_.sinks[head(r)] > -std::numeric_limits<float>::infinity();
      if (sink) {
        const problem::KeyRange keys =
            p_.visibility.keys(first_position_ + r / group_, sequence_->key_length);
        sink = (p_.visibility.prefix > 0 ? 0 : keys.begin / kAttentionFold) == fold;
      }
      now.sees[r] = sink;
      now.maxima[r] = sink ? static_cast<C>(p_.sinks[head(r)]) : -kInfinity;
      fill_line(now.lane_sums + r * Tile::lanes, Tile::lanes, V::zero());
      if (sink) now.lane_sums[r * Tile::lanes] = C(1);
    }
    fill_line(now.sums, rows_ * width_, V::zero());
  }

  void merge(const AttentionState<C>& later, bool again) {
    if (!again) return copy_states(later, s_.folded, rows_, width_, Tile::lanes);
    merge_states<Tile>(s_.folded, later, rows_, width_);
  }

  template <typename F>
  void for_each_block(const problem::AttentionSequence& sequence, Index queries, F&& f) const {
    for_each_key_block(p_.visibility, first_position_, queries, sequence.key_length, f);
  }

  /// The keys of a block that each row sees. False where there are none.
  bool find_ranges(Index block_begin) {
    const bool full_before = std::exchange(full_, all_see(block_begin));
    if (full_ && full_before) return true;
    products_.forget_ranges();
    bool any = false;
    for (Index r = 0; r < rows_; r += group_)
      for (Index g = 0; g < group_; ++g) {
        find_range(r + g, block_begin, g != 0 && !p_.masks_differ_by_head());
        const bool sees = !s_.ranges[r + g].empty();
        any = any || sees;
        s_.now.sees[r + g] = s_.now.sees[r + g] || sees;
      }
    return any;
  }

  /// Whether every row sees all keys of a block: so it is where the first and the last do, since
  /// neither end of what a position sees falls behind that of an earlier one.
  bool all_see(Index block_begin) const {
    const auto full = [&](Index query) {
      return block_range(p_.visibility, first_position_ + query, sequence_->key_length, block_begin)
          .full();
    };
    return s_.hidden == nullptr && full(0) && full(queries_ - 1);
  }

  void find_range(Index r, Index block_begin, bool as_the_row_before = false) {
    if (as_the_row_before) {
      s_.ranges[r] = s_.ranges[r - 1];
      if (s_.hidden != nullptr) s_.hidden[r] = s_.hidden[r - 1];
      return;
    }
    s_.ranges[r] = block_range(p_.visibility, first_position_ + r / group_, sequence_->key_length,
                               block_begin);
    if (s_.hidden != nullptr) s_.hidden[r] = hide_masked(p_, row_of(r), block_begin, s_.ranges[r]);
  }

  problem::ScoreRow row_of(Index r) const {
    const Index row = first_ + r / group_;
    return {sequence_ - p_.sequences, head(r), sequence_->query_begin + row,
            sequence_->first_position + row};
  }
  KeyBits hidden(Index r) const { return s_.hidden == nullptr ? 0 : s_.hidden[r]; }

  /// Dot products to weights relative to the new maxima, in place; the factors that bring earlier
  /// sums to those maxima.
  void softmax_rows(Index block_begin) {
    if (full_ && is_plain())
      softmax_tiles<true>(block_begin);
    else
      softmax_tiles<false>(block_begin);
  }

  /// As many rows at a time as a vector has lanes: their scores stay in L1. Plain: whether all rows
  /// see all keys and scores are dot products.
  template <bool Plain>
  void softmax_tiles(Index block_begin) {
    for (Index first = 0; first < rows_; first += Tile::lanes) {
      const int count = static_cast<int>((std::min)(Index{Tile::lanes}, rows_ - first));
      raise_maxima<Plain>(first, count, block_begin);
      for (Index r = first; r < first + count; ++r)
        if (Plain || !s_.ranges[r].empty()) weigh_row(r);
    }
  }

  /// Whether scores are the dot products of keys that are seen.
  bool is_plain() const {
    return !problem::is_score_function<Function> && !(p_.softcap > 0) &&
           p_.alibi_slopes == nullptr && !p_.bias.present();
  }

  /// The maximum of a row's scores, by lanes.
  EIGENFORMER_INLINE V top_of(const C* scores) const {
    V top = V::set1(-kInfinity);
    // this order lets a NaN pass by: it reaches the row through its weight
    for (int c = 0; c < kAttentionKeyBlock; c += Tile::lanes)
      top = maximum(V::load(scores + c), top);
    return top;
  }

  /// Dot products to scores, in place, -infinity where the row sees nothing. Their maximum by
  /// lanes.
  V score_row(Index r, Index block_begin) {
    C* const scores = s_.scores + r * kAttentionKeyBlock;
    constexpr bool called = problem::is_score_function<Function>;
    const BlockScores<C, Isa, Function> rule(p_, row_of(r), block_begin, s_.ranges[r], hidden(r),
                                             &p_.function);
    if constexpr (called) rule.call_function(scores);
    for (int c = 0; c < kAttentionKeyBlock; c += Tile::lanes)
      if constexpr (!called) rule(V::load(scores + c), c).store(scores + c);
    return top_of(scores);
  }

  /// Transposed, the maxima of all rows are a vector.
  template <bool Plain>
  EIGENFORMER_INLINE void raise_maxima(Index first, int n, Index block_begin) {
    V tops[Tile::lanes];
    for (int i = 0; i < Tile::lanes; ++i) {
      const Index r = first + i;
      if (i >= n || (!Plain && s_.ranges[r].empty()))
        tops[i] = V::set1(-kInfinity);
      else
        tops[i] = Plain ? top_of(s_.scores + r * kAttentionKeyBlock) : score_row(r, block_begin);
    }
    transpose(tops);
    const V before = V::load_partial(s_.now.maxima + first, n);
    V after = before;
    for (const V& top : tops) after = maximum(top, after);
    after.store_partial(s_.now.maxima + first, n);
    exp_of_nonpositive(before - reference(after)).store_partial(s_.factors + first, n);
  }

  /// What scores are taken relative to. All of a row -infinity: weights 0, not exp(NaN).
  static V reference(V maxima) {
    return select(equal(maxima, V::set1(-kInfinity)), V::zero(), maxima);
  }

  void weigh_row(Index r) {
    C* const scores = s_.scores + r * kAttentionKeyBlock;
    const V maximum = reference(V::set1(s_.now.maxima[r]));
    V sum = V::zero();
    for (int c = 0; c < kAttentionKeyBlock; c += Tile::lanes) {
      const V weight = exp_of_nonpositive(V::load(scores + c) - maximum);
      if constexpr (kPairProducts<Isa, TQ, TKV>)
        tile::store_for_pairs(Isa{}, weight, PairProducts<Isa>::weights_of(scores) + c);
      else
        weight.store(scores + c);
      sum = sum + weight;
    }
    C* const lane_sums = s_.now.lane_sums + r * Tile::lanes;
    fma(V::load(lane_sums), V::set1(s_.factors[r]), sum).store(lane_sums);
  }

  C weight_sum(Index r) const { return reduce_add(V::load(s_.now.lane_sums + r * Tile::lanes)); }

  /// Sums of weighted values to averages. False where one is not finite though the weights are.
  bool finish_row(Index r) {
    const C sum = weight_sum(r);
    const V factor = V::set1(sum == C(0) ? C(0) : C(1) / sum);
    for (Index d = 0; d < width_; d += Tile::lanes)
      (V::load(s_.now.sums + r * width_ + d) * factor).store(s_.now.sums + r * width_ + d);
    return is_finite(r) || !(sum > 0 && sum < kInfinity);
  }

  bool is_finite(Index r) const { return Tile::all_finite(s_.now.sums + r * width_, C(1), width_); }

  /// For each column the first and the last key with a value that is no finite number, among the
  /// keys that a row of the block sees.
  void find_bad_values(const problem::AttentionSequence& sequence, Index kv_head, Index queries) {
    std::fill_n(s_.bad_values, p_.value_dim, KeyEnds{-1, -1});
    for_each_block(sequence, queries, [&](Index begin) {
      const KeyBlock<TKV> block = key_block(p_.source, sequence, kv_head, begin);
      for (int j = 0; j < block.count; ++j)
        for (Index d = 0; d < p_.value_dim; ++d) {
          const C value = static_cast<C>(block.value(j)[d]) * static_cast<C>(block.value_scale(j));
          if (std::abs(value) <= kLargest) continue;
          KeyEnds& bad = s_.bad_values[d];
          bad = {bad.first < 0 ? begin + j : bad.first, begin + j};
        }
    });
  }

  /// Whether a sum of row r may have left the range by itself, rather than by a value that is no
  /// number. So one such value costs the rows that see it nothing more.
  bool overflowed(Index r) const {
    const problem::ScoreRow row = row_of(r);
    for (Index d = 0; d < p_.value_dim; ++d) {
      if (std::abs(s_.now.sums[r * width_ + d]) <= kLargest) continue;
      const KeyEnds bad = s_.bad_values[d];
      if (bad.first < 0 || !(p_.sees(row, bad.first) || p_.sees(row, bad.last))) return true;
    }
    return false;
  }

  bool has_large_scores(Index r) const {
    const C sum = weight_sum(r);
    return is_large_score(s_.now.maxima[r], kAttentionLargeScore<TQ, TKV>) && sum > 0 &&
           sum < kInfinity;
  }

  /// Some rows once more over their keys, scores and sums in double. All of a row, or only what is
  /// not finite: a sum may overflow where the average does not, so weights are made smaller.
  void average_rows(const problem::AttentionSequence& sequence, Index kv_head, Index first,
                    Index queries, std::span<const Index> rows, bool all) {
    // Float sums the 64 keys of a block, double all of them.
    const C factor = all ? C(1) : static_cast<C>(sizeof(C) == 8 ? 0x1p-46 : 0x1p-6);
    RunningMaximum maxima[kRowsInDouble];
    double sums[kRowsInDouble];
    for (std::size_t i = 0; i < rows.size(); ++i) {
      const Index head = kv_head * group_ + rows[i] % group_;
      if (p_.sinks != nullptr) maxima[i].value = static_cast<double>(p_.sinks[head]);
      sums[i] = maxima[i].value > -std::numeric_limits<double>::infinity() ? double{factor} : 0.0;
    }
    std::fill_n(s_.averages, static_cast<Index>(rows.size()) * width_, 0.0);
    for_each_block(sequence, queries, [&](Index begin) {
      const KeyBlock<TKV> block = key_block(p_.source, sequence, kv_head, begin);
      products_.load_values(block);
      for (std::size_t i = 0; i < rows.size(); ++i) {
        const Index r = rows[i], head = kv_head * group_ + r % group_;
        find_range(r, begin);
        if (s_.ranges[r].empty()) continue;
        query_in_double(p_, (sequence.query_begin + first + r / group_) * p_.heads + head,
                        s_.query);
        const double rise =
            scores_in_double<Isa>(p_, s_.query, block, row_of(r), begin, s_.ranges[r], hidden(r),
                                  maxima[i], s_.scores + r * kAttentionKeyBlock);
        add_block_in_double(r, factor, std::exp(-rise), sums[i],
                            s_.averages + static_cast<Index>(i) * width_);
      }
    });
    for (std::size_t i = 0; i < rows.size(); ++i) {
      const Index r = rows[i];
      finish_row_in_double(r, s_.averages + static_cast<Index>(i) * width_, sums[i], all);
      if (!all) continue;
      s_.now.maxima[r] = static_cast<C>(maxima[i].value);
      fill_line(s_.now.lane_sums + r * Tile::lanes, Tile::lanes, V::zero());
      s_.now.lane_sums[r * Tile::lanes] = static_cast<C>(sums[i]);
    }
  }

  /// The weights of row r in a block, from its scores less the maximum, and what they add to sums
  /// that are relative to an earlier one.
  void add_block_in_double(Index r, C factor, double fall, double& weight_sum, double* sums) {
    C* const scores = s_.scores + r * kAttentionKeyBlock;
    V sum = V::zero();
    for (int c = 0; c < kAttentionKeyBlock; c += Tile::lanes) {
      const V weight = exp_of_nonpositive(V::load(scores + c)) * V::set1(factor);
      weight.store(scores + c);
      sum = sum + weight;
    }
    weight_sum = weight_sum * fall + static_cast<double>(reduce_add(sum));
    fill_line(s_.block_sums, width_, V::zero());
    for_each_run(keys_of(s_.ranges[r]) & ~hidden(r), [&](int begin, int end) {
      Tile::template accumulate<1>({scores, kAttentionKeyBlock, 1}, s_.values,
                                   Tile::value_stride(width_), begin, end, width_, s_.block_sums,
                                   width_);
    });
    for (Index d = 0; d < width_; ++d)
      sums[d] = sums[d] * fall + static_cast<double>(s_.block_sums[d]);
  }

  void finish_row_in_double(Index r, const double* sums, double weight_sum, bool all) {
    constexpr double most = static_cast<double>(kLargest) / 2;
    for (Index d = 0; d < p_.value_dim; ++d) {
      C& average = s_.now.sums[r * width_ + d];
      if (!all && std::abs(average) <= kLargest) continue;
      const double half = sums[d] / weight_sum / 2;  // infinite or NaN where a value is
      average = static_cast<C>(std::isfinite(half) ? std::clamp(half, -most, most) * 2 : half);
    }
  }

  C* log_sum_exp(const problem::AttentionSequence& sequence, Index head, Index row) const {
    return p_.log_sum_exp + sequence.lse_begin + head * p_.lse_head_stride + row;
  }

  TQ* output(const problem::AttentionSequence& sequence, Index head, Index row) const {
    return p_.output + ((sequence.query_begin + row) * p_.heads + head) * p_.value_dim;
  }

  void write_empty_row(const problem::AttentionSequence& sequence, Index head, Index row) const {
    std::fill_n(output(sequence, head, row), p_.value_dim, TQ(0));
    if (p_.log_sum_exp != nullptr) *log_sum_exp(sequence, head, row) = -kInfinity;
  }

  /// Whether masks leave row r a key. A sink counts as one in `sees`: keys are looked at again.
  bool sees_a_key(Index r) {
    if (p_.sinks == nullptr || !s_.now.sees[r]) return s_.now.sees[r];
    const Index position = first_position_ + r / group_;
    Index begin =
        p_.visibility.prefix > 0 ? 0 : p_.visibility.keys(position, sequence_->key_length).begin;
    for (begin -= begin % kAttentionKeyBlock; begin < sequence_->key_length;
         begin += kAttentionKeyBlock) {
      find_range(r, begin);
      if (!s_.ranges[r].empty()) return true;
    }
    return false;
  }

  void write_row(const problem::AttentionSequence& sequence, Index head, Index row, Index r) {
    const Index position = sequence.first_position + row;
    const problem::KeyRange keys = p_.visibility.keys(position, sequence.key_length);
    const bool sees_prefix = p_.visibility.prefix > 0 && sequence.key_length > 0;
    if ((keys.begin >= keys.end && !sees_prefix) || (s_.hidden != nullptr && !sees_a_key(r)))
      return write_empty_row(sequence, head, row);
    const C* const averages = s_.now.sums + r * width_;
    TQ* const out = output(sequence, head, row);
    convert_line<V>(averages, out, p_.value_dim);
    if (p_.log_sum_exp == nullptr) return;
    const C sum = weight_sum(r);
    *log_sum_exp(sequence, head, row) = sum == C(0) ? -kInfinity : s_.now.maxima[r] + std::log(sum);
  }

  const Problem& p_;
  const AttentionScratch<C>& s_;
  Index group_, width_;
  const problem::AttentionSequence* sequence_ = nullptr;
  Index kv_head_ = 0, first_ = 0, queries_ = 0;  // of the task
  Index rows_ = 0, first_position_ = 0;
  Index fold_ = -1;      // the present one,
  bool folded_ = false;  // and whether there are others before it
  bool sees_ = false;    // whether a row sees a key of the present block,
  bool full_ = false;    // whether all rows see all of them
  AttentionProducts<Isa, TQ, TKV> products_;
};

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
