/// \file
/// CPU kernel of the gradients of attention (after Dao et al., "FlashAttention", 2022). With P the
/// probabilities:
///
///   dP = grad_out V^T     D_i = sum over j of P_ij dP_ij     dS = P * (dP - D) * softcap'
///   dV = P^T grad_out     dQ = scale * dS K     dK = scale * dS^T Q
///   dsink = -sum over rows of P_sink D
///
/// A task is (sequence, KV head): query blocks outside, key blocks inside, both at absolute
/// positions, so that every sum has one order and no two tasks write one element. For a query block
/// of 64 rows scores and dP of all keys it sees are kept, 512 bytes per key in float: maximum, sum
/// and D come from the very scores and dP that P and dS are made of. Neither a rounded log_sum_exp
/// nor a rounded output takes part, and what cancels cancels: dP counts from that of the row's
/// greatest score, so that a row with nearly all weight on one key keeps the precision of the small
/// rest. Rows whose scores are too large for their rounding take them once more in double. Flops:
/// 10 * head_dim for each visible pair, in the same two products as the forward pass.
#pragma once

#include "../backend.h"
#include "attention.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

/// Scratch of one worker. "A query block's" of all its key blocks: (key blocks, rows, 64).
template <typename C>
struct AttentionBackwardScratch {
  C *queries, *grad_output, *grad_queries;  // a query block: (rows, width or value width)
  C *keys, *packed_keys, *packed_values;    // a key block: rows, and transposed
  C *probabilities, *grad_scores, *slopes;  // (key blocks, rows, 64); scores and dP at first
  C *grad_keys, *grad_values;               // the whole sequence
  C *query_sums, *key_sums, *value_sums;    // what one key block adds to the gradients
  BlockRange* row_ranges;                   // the keys that a row sees (key blocks, rows)
  BlockRange* key_ranges;                   // the rows that see a key of a block (64)
  Index* blocks;                            // where the key blocks begin
  double *query, *maxima;                   // a row whose scores are taken in double, by blocks
};

template <typename Isa, typename T>
class AttentionBackwardWorker {
  using C = compute_type<T>;
  using Tile = AttentionTile<C, Isa>;
  using V = typename Tile::V;
  using Problem = problem::AttentionBackward<T>;
  static constexpr C kInfinity = std::numeric_limits<C>::infinity();
  static constexpr Index kBlock = kAttentionKeyBlock;

 public:
  static Index positions_per_block(const Problem& p) {
    return std::max<Index>(1, kBlock / std::max<Index>(1, p.forward.group()));
  }

  /// Key blocks that a query block sees at most, of a sequence of `keys`.
  static Index most_blocks(const Problem& p, Index keys) {
    const problem::Visibility& v = p.forward.visibility;
    const Index all = (keys + kBlock - 1) / kBlock;
    const Index seen = v.left + v.right + 1 + positions_per_block(p);
    return (std::min)(all, v.prefix / kBlock + seen / kBlock + 3);
  }

  static AttentionBackwardScratch<C> take_scratch(const Problem& p, Index longest,
                                                  Workspace::Frame& frame) {
    const auto product = [](Index a, Index b) {
      return detail::checked_product(a, b, "attention_backward", "scratch");
    };
    const Index width = Tile::padded(p.forward.head_dim),
                value_width = Tile::padded(p.forward.value_dim);
    const Index rows = positions_per_block(p) * p.forward.group(), blocks = most_blocks(p, longest),
                pairs = product(product(blocks, rows), kBlock);
    AttentionBackwardScratch<C> s{frame.take<C>(product(rows, width)),
                                  frame.take<C>(product(rows, value_width)),
                                  frame.take<C>(product(rows, width)),
                                  frame.take<C>(product(kBlock, width)),
                                  frame.take<C>(product(kBlock, width)),
                                  frame.take<C>(product(kBlock, value_width)),
                                  frame.take<C>(pairs),
                                  frame.take<C>(pairs),
                                  p.forward.softcap > 0 ? frame.take<C>(pairs) : nullptr,
                                  frame.take<C>(product(longest, width)),
                                  frame.take<C>(product(longest, value_width)),
                                  frame.take<C>(product(rows, width)),
                                  frame.take<C>(product(kBlock, width)),
                                  frame.take<C>(product(kBlock, value_width)),
                                  frame.take<BlockRange>(product(blocks, rows)),
                                  frame.take<BlockRange>(kBlock),
                                  frame.take<Index>(blocks),
                                  frame.take<double>(p.forward.head_dim),
                                  frame.take<double>(blocks)};
    // Lanes nobody sees are computed with and thrown away.
    fill_line(s.probabilities, pairs, V::zero());
    fill_line(s.grad_scores, pairs, V::zero());
    return s;
  }

  AttentionBackwardWorker(const Problem& problem, const AttentionBackwardScratch<C>& scratch)
      : p_(problem),
        f_(problem.forward),
        s_(scratch),
        group_(f_.group()),
        width_(Tile::padded(f_.head_dim)),
        value_width_(Tile::padded(f_.value_dim)),
        positions_(positions_per_block(problem)) {}

  /// All gradients of one KV head in one sequence; grad_sinks (heads), the sums of this sequence,
  /// may be nullptr.
  void run(const problem::AttentionSequence& sequence, Index kv_head, double* grad_sinks) {
    sequence_ = &sequence;
    kv_head_ = kv_head;
    grad_sinks_ = grad_sinks;
    fill_line(s_.grad_keys, sequence.key_length * width_, V::zero());
    fill_line(s_.grad_values, sequence.key_length * value_width_, V::zero());
    if (grad_sinks != nullptr) std::fill_n(grad_sinks + head(0), group_, 0.0);
    for (Index first = 0; first < sequence.query_rows; first += positions_)
      query_block(first, (std::min)(positions_, sequence.query_rows - first));
    for (Index i = sequence.query_rows; i < sequence.tensor_rows; ++i)
      for (Index g = 0; g < group_; ++g)
        std::fill_n(p_.grad_queries + row(i, g) * f_.head_dim, f_.head_dim, T(0));
    for (Index j = 0; j < sequence.key_length; ++j) {
      store_row(s_.grad_keys + j * width_, C(1), f_.head_dim, key_gradient(j));
      store_row(s_.grad_values + j * value_width_, C(1), f_.value_dim, value_gradient(j));
    }
    for (Index j = sequence.key_length; j < p_.key_rows; ++j) {
      std::fill_n(key_gradient(j), f_.head_dim, T(0));
      std::fill_n(value_gradient(j), f_.value_dim, T(0));
    }
  }

 private:
  Index head(Index g) const { return kv_head_ * group_ + g; }
  Index row(Index i, Index g) const { return (sequence_->query_begin + i) * f_.heads + head(g); }
  problem::ScoreRow row_of(Index r) const {
    const Index i = first_ + r / group_;
    return {sequence_ - f_.sequences, head(r % group_), sequence_->query_begin + i,
            sequence_->first_position + i};
  }
  T* key_gradient(Index j) const {
    return p_.grad_keys +
           (f_.source.key_row(sequence_->key_sequence, kv_head_, sequence_->key_begin + j) -
            f_.source.keys);
  }
  T* value_gradient(Index j) const {
    return p_.grad_values +
           (f_.source.value_row(sequence_->key_sequence, kv_head_, sequence_->key_begin + j) -
            f_.source.values);
  }
  KeyBlock<T> key_block(Index begin) const {
    return {f_.source, sequence_->key_sequence, kv_head_, sequence_->key_begin + begin,
            static_cast<int>(std::min<Index>(kBlock, sequence_->key_length - begin))};
  }
  /// Row r of key block n.
  Index at(Index n, Index r) const { return (n * rows_ + r) * kBlock; }

  void query_block(Index first, Index queries) {
    rows_ = queries * group_;
    first_ = first;
    first_position_ = sequence_->first_position + first;
    for (Index r = 0; r < rows_; ++r) {
      const Index from = row(first + r / group_, r % group_);
      Tile::load_row(f_.queries + from * f_.head_dim, f_.scale, f_.head_dim, width_,
                     s_.queries + r * width_);
      Tile::load_row(p_.grad_output + from * f_.value_dim, C(1), f_.value_dim, value_width_,
                     s_.grad_output + r * value_width_);
    }
    fill_line(s_.grad_queries, rows_ * width_, V::zero());
    blocks_ = 0;
    for_each_key_block(f_.visibility, first_position_, queries, sequence_->key_length,
                       [&](Index begin) { score_block(blocks_++, begin); });
    for (Index r = 0; r < rows_; ++r) softmax_row(r);
    for (Index n = 0; n < blocks_; ++n) gradient_block(n, s_.blocks[n]);
    for (Index r = 0; r < rows_; ++r)
      store_row(s_.grad_queries + r * width_, f_.scale, f_.head_dim,
                p_.grad_queries + row(first + r / group_, r % group_) * f_.head_dim);
  }

  /// Q K^T and dP of key block n, at `begin`.
  void score_block(Index n, Index begin) {
    s_.blocks[n] = begin;
    const KeyBlock<T> block = key_block(begin);
    const auto one = [](int) { return C(1); };
    Tile::pack_transposed(
        block.count, f_.head_dim, s_.packed_keys, [&](int j) { return block.key(j); }, one);
    Tile::pack_transposed(
        block.count, f_.value_dim, s_.packed_values, [&](int j) { return block.value(j); }, one);
    BlockRange* const ranges = s_.row_ranges + n * rows_;
    for (Index r = 0; r < rows_; ++r)
      ranges[r] = r % group_ == 0 ? block_range(f_.visibility, first_position_ + r / group_,
                                                sequence_->key_length, begin)
                                  : ranges[r - 1];
    Tile::for_row_tiles(rows_, [&](auto tile, Index r) {
      constexpr int R = decltype(tile)::value;
      const auto [from, to] = seen_by_tile(ranges + r, R);
      for (int key = from / Tile::kPanel * Tile::kPanel; key < to; key += Tile::kPanel) {
        Tile::template dot_panel<R>(s_.queries + r * width_, width_,
                                    s_.packed_keys + key * f_.head_dim, f_.head_dim,
                                    s_.probabilities + at(n, r) + key, kBlock);
        Tile::template dot_panel<R>(s_.grad_output + r * value_width_, value_width_,
                                    s_.packed_values + key * f_.value_dim, f_.value_dim,
                                    s_.grad_scores + at(n, r) + key, kBlock);
      }
    });
  }

  /// The greatest score of row r and the dP that belongs to it.
  struct Top {
    C score, grad;
  };

  /// Dot products of row r to scores, in place, -infinity where it sees nothing; the slopes of the
  /// softcap.
  Top score_row(Index r, C sink) {
    V top = V::set1(-kInfinity), top_grad = V::zero();
    for (Index n = 0; n < blocks_; ++n) {
      const BlockRange range = s_.row_ranges[n * rows_ + r];
      if (range.empty()) continue;
      const BlockScores<C, Isa> scores(f_, row_of(r), s_.blocks[n], range, 0);
      for (int c = 0; c < kBlock; c += Tile::lanes) {
        V x = V::load(s_.probabilities + at(n, r) + c),
          grad = V::load(s_.grad_scores + at(n, r) + c);
        x = scores(x, c, f_.softcap > 0 ? s_.slopes + at(n, r) + c : nullptr);
        if (scores.hides_some()) {
          grad = select(scores.seen(c), grad, V::zero());
          grad.store(s_.grad_scores + at(n, r) + c);
        }
        x.store(s_.probabilities + at(n, r) + c);
        const auto higher = less(top, x);
        top = select(higher, x, top);
        top_grad = select(higher, grad, top_grad);
      }
    }
    C scores[Tile::lanes], grads[Tile::lanes];
    top.store(scores);
    top_grad.store(grads);
    Top result{sink, C(0)};  // a sink is a key whose value is 0
    for (int i = 0; i < Tile::lanes; ++i)
      if (scores[i] > result.score) result = {scores[i], grads[i]};
    return result;
  }

  /// Dot products and dP of row r to probabilities and dS. A row without weight on a key (nothing
  /// visible, or all scores -infinity) gives no gradient whatever it holds.
  void softmax_row(Index r) {
    const BlockRange* const ranges = s_.row_ranges + r;
    const C sink = f_.sinks == nullptr ? -kInfinity : static_cast<C>(f_.sinks[head(r % group_)]);
    const Top top = score_row(r, sink);
    C reference = top.score == -kInfinity ? C(0) : top.score;
    double maximum = static_cast<double>(reference);
    if (is_large_score(top.score, kAttentionLargeScore<T, T>)) {
      maximum = rescore_row(r, static_cast<double>(sink));
      reference = C(0);
    }
    const double sink_weight =
        sink > -kInfinity ? std::exp(static_cast<double>(sink) - maximum) : 0.0;
    double sum = 0, delta = 0;  // float would lose half a digit of D over 200,000 keys
    for (Index n = 0; n < blocks_; ++n) {
      if (ranges[n * rows_].empty()) continue;
      V weights = V::zero(), grads = V::zero();
      for (int c = 0; c < kBlock; c += Tile::lanes) {
        const V weight = exp(V::load(s_.probabilities + at(n, r) + c) - V::set1(reference));
        const V grad = V::load(s_.grad_scores + at(n, r) + c) - V::set1(top.grad);
        weight.store(s_.probabilities + at(n, r) + c);
        grad.store(s_.grad_scores + at(n, r) + c);
        weights = weights + weight;
        grads = fma(weight, grad, grads);
      }
      sum += static_cast<double>(reduce_add(weights));
      delta += static_cast<double>(reduce_add(grads));
    }
    if (sum == 0) return silence(r);
    sum += sink_weight;
    delta = (delta - sink_weight * static_cast<double>(top.grad)) / sum;
    // A sink of -infinity takes no part, whatever the row's gradient holds: 0 * NaN would be NaN.
    if (grad_sinks_ != nullptr && sink > -kInfinity)
      grad_sinks_[head(r % group_)] -= sink_weight / sum * (static_cast<double>(top.grad) + delta);
    scale_row(r, static_cast<C>(1 / sum), static_cast<C>(delta));
  }

  /// The scores of row r in double, less their maximum, which is returned.
  double rescore_row(Index r, double sink) {
    query_in_double(f_, row(first_ + r / group_, r % group_), s_.query);
    RunningMaximum maximum{sink};
    for (Index n = 0; n < blocks_; ++n) {
      const BlockRange& range = s_.row_ranges[n * rows_ + r];
      if (!range.empty())
        scores_in_double<Isa>(f_, s_.query, key_block(s_.blocks[n]), row_of(r), s_.blocks[n], range,
                              0, maximum, s_.probabilities + at(n, r),
                              f_.softcap > 0 ? s_.slopes + at(n, r) : nullptr);
      s_.maxima[n] = maximum.value;
    }
    for (Index n = 0; n < blocks_ && s_.maxima[n] < maximum.value; ++n) {
      if (s_.row_ranges[n * rows_ + r].empty()) continue;
      const V rise = V::set1(static_cast<C>(maximum.value - s_.maxima[n]));
      for (int c = 0; c < kBlock; c += Tile::lanes) {
        C* const scores = s_.probabilities + at(n, r) + c;
        (V::load(scores) - rise).store(scores);
      }
    }
    return maximum.value;
  }

  /// Weights and dP of row r to P and dS.
  void scale_row(Index r, C factor, C delta) {
    for (Index n = 0; n < blocks_; ++n) {
      if (s_.row_ranges[n * rows_ + r].empty()) continue;
      for (int c = 0; c < kBlock; c += Tile::lanes) {
        const V p = V::load(s_.probabilities + at(n, r) + c) * V::set1(factor);
        V ds = p * (V::load(s_.grad_scores + at(n, r) + c) - V::set1(delta));
        if (f_.softcap > 0) ds = ds * V::load(s_.slopes + at(n, r) + c);
        p.store(s_.probabilities + at(n, r) + c);
        ds.store(s_.grad_scores + at(n, r) + c);
      }
    }
  }

  /// Row r takes no part: it gets no gradient, and what it holds is not multiplied with.
  void silence(Index r) {
    for (Index n = 0; n < blocks_; ++n) {
      s_.row_ranges[n * rows_ + r] = {0, 0, 0};
      fill_line(s_.probabilities + at(n, r), kBlock, V::zero());
      fill_line(s_.grad_scores + at(n, r), kBlock, V::zero());
    }
    fill_line(s_.queries + r * width_, width_, V::zero());
    fill_line(s_.grad_output + r * value_width_, value_width_, V::zero());
  }

  /// What the pairs of key block n add to the gradients: each pair that is visible, and no other,
  /// which may hold NaN. The block is summed by itself first, because one chain over 200,000 keys
  /// would lose half a digit.
  void gradient_block(Index n, Index begin) {
    const KeyBlock<T> block = key_block(begin);
    for (int j = 0; j < block.count; ++j) {
      Tile::load_row(block.key(j), C(1), f_.head_dim, width_, s_.keys + j * width_);
      s_.key_ranges[j] = rows_that_see(begin + j);
    }
    fill_line(s_.query_sums, rows_ * width_, V::zero());
    fill_line(s_.key_sums, kBlock * width_, V::zero());
    fill_line(s_.value_sums, kBlock * value_width_, V::zero());
    const C* const p = s_.probabilities + at(n, 0);
    const C* const ds = s_.grad_scores + at(n, 0);
    Tile::for_row_tiles(block.count, [&](auto tile, Index j) {
      constexpr int R = decltype(tile)::value;
      Tile::template accumulate_ranges<R>({p + j, 1, kBlock}, s_.grad_output, value_width_,
                                          s_.key_ranges + j, value_width_,
                                          s_.value_sums + j * value_width_, value_width_);
      Tile::template accumulate_ranges<R>({ds + j, 1, kBlock}, s_.queries, width_,
                                          s_.key_ranges + j, width_, s_.key_sums + j * width_,
                                          width_);
    });
    Tile::for_row_tiles(rows_, [&](auto tile, Index r) {
      Tile::template accumulate_ranges<decltype(tile)::value>(
          {ds + r * kBlock, kBlock, 1}, s_.keys, width_, s_.row_ranges + n * rows_ + r, width_,
          s_.query_sums + r * width_, width_);
    });
    add(s_.query_sums, rows_ * width_, s_.grad_queries);
    add(s_.key_sums, block.count * width_, s_.grad_keys + begin * width_);
    add(s_.value_sums, block.count * value_width_, s_.grad_values + begin * value_width_);
  }

  /// The widths are whole vectors.
  static void add(const C* terms, Index count, C* sums) {
    for (Index i = 0; i < count; i += Tile::lanes)
      (V::load(sums + i) + V::load(terms + i)).store(sums + i);
  }

  BlockRange rows_that_see(Index key) const {
    const problem::Visibility& v = f_.visibility;
    const Index queries = rows_ / group_;
    if (key < v.prefix) return {0, 0, static_cast<int>(rows_)};
    const Index begin = std::clamp<Index>(key - v.right - first_position_, 0, queries);
    const Index end = std::clamp<Index>(key + v.left + 1 - first_position_, begin, queries);
    return {0, static_cast<int>(begin * group_), static_cast<int>(end * group_)};
  }

  static void store_row(const C* source, C factor, Index width, T* row) {
    scale_line(source, V::set1(factor), row, width);
  }

  const Problem& p_;
  const problem::Attention<T, T>& f_;
  const AttentionBackwardScratch<C>& s_;
  Index group_, width_, value_width_, positions_;
  const problem::AttentionSequence* sequence_ = nullptr;
  Index kv_head_ = 0;
  double* grad_sinks_ = nullptr;
  Index rows_ = 0, first_ = 0, first_position_ = 0, blocks_ = 0;  // of the query block
};

template <typename D, typename Isa, typename T>
void execute(const Backend<D, Isa>& on, const problem::AttentionBackward<T>& p) {
  using Worker = AttentionBackwardWorker<Isa, T>;
  const auto& f = p.forward;
  Workspace::Frame frame(on.workspace);
  const Index tasks = f.batch * f.kv_heads;
  const bool sinks = p.grad_sinks != nullptr && f.sinks != nullptr;
  double* const grad_sinks = sinks ? frame.take<double>(f.batch * f.heads) : nullptr;
  Index longest = 0;
  for (Index b = 0; b < f.batch; ++b) longest = (std::max)(longest, f.sequences[b].key_length);
  if (tasks > 0) {
    const Index workers = attention_workers(on, f, tasks);
    auto* const scratch = frame.take<AttentionBackwardScratch<compute_type<T>>>(workers);
    for (Index w = 0; w < workers; ++w) scratch[w] = Worker::take_scratch(p, longest, frame);
    parallel_for(on, workers, kWorthAThread, [&](Index begin, Index end, int) {
      for (Index w = begin; w < end; ++w) {
        Worker worker(p, scratch[w]);
        for (Index task = w; task < tasks; task += workers) {
          const Index b = task / f.kv_heads;
          worker.run(f.sequences[b], task % f.kv_heads, sinks ? grad_sinks + b * f.heads : nullptr);
        }
      }
    });
  }
  if (p.grad_sinks == nullptr) return;
  for (Index h = 0; h < f.heads; ++h) {
    double sum = 0;
    if (sinks)
      for (Index b = 0; b < f.batch; ++b) sum += grad_sinks[b * f.heads + h];
    p.grad_sinks[h] = static_cast<float>(sum);
  }
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
