/// \file
/// CPU kernel of the gradients of attention (Dao et al., "FlashAttention", 2022): probabilities are computed again from
/// log_sum_exp, block by block, so memory is that of the gradients plus those of one KV head's queries. With D_i the dot product of
/// grad_out_i and out_i:
///
///   P = exp(score - log_sum_exp)      dV = P^T grad_out     dP = grad_out V^T     dS = P * (dP - D) * softcap'
///   dQ = scale * dS K                 dK = scale * dS^T Q   dsink = -sum over rows of exp(sink - log_sum_exp) D
///
/// A task is (sequence, KV head): key blocks outside, query blocks inside, both at absolute positions, so that every sum has one
/// order and no two tasks write one element. Flops: 10 * head_dim for each visible pair, in the same two products as the forward
/// pass.
#pragma once

#include "attention.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

/// `forward` carries queries, keys, values and options; its output and log_sum_exp are not used.
template <typename T>
struct AttentionBackwardProblem {
  using Compute = compute_type<T>;
  AttentionProblem<T, T> forward;
  const T* output = nullptr;             // (rows, heads, value_dim)
  const T* grad_output = nullptr;        // (rows, heads, value_dim)
  const Compute* log_sum_exp = nullptr;  // as AttentionProblem::log_sum_exp
  T* grad_queries = nullptr;             // (rows, heads, head_dim)
  T* grad_keys = nullptr;                // (key rows, kv_heads, head_dim), laid out like the keys
  T* grad_values = nullptr;     // (key rows, kv_heads, value_dim), laid out like the values
  Index key_rows = 0;           // rows of a dense sequence, padding included; 0 where packed
  float* grad_sinks = nullptr;  // (heads) or nullptr
};

namespace cpu {

template <typename C>
struct AttentionBackwardScratch {
  C *queries, *grad_output, *probabilities,
      *grad_scores;  // a query block: (rows, width), (rows, value width), (rows, 64) twice
  C *keys, *packed_keys, *packed_values;   // a key block: rows and transposed
  C *grad_keys, *grad_values;              // a key block
  C *grad_queries, *deltas, *log_sum_exp;  // the whole sequence, rows (position, head of the group)
};

template <typename Isa, typename T>
class AttentionBackwardWorker {
  using C = compute_type<T>;
  using Tile = AttentionTile<C, Isa>;
  using V = typename Tile::V;
  using Problem = AttentionBackwardProblem<T>;
  static constexpr C kInfinity = std::numeric_limits<C>::infinity();
  static constexpr Index kBlock = kAttentionKeyBlock;

 public:
  static Index positions_per_block(const Problem& p) {
    return std::max<Index>(1, kBlock / std::max<Index>(1, p.forward.group()));
  }

  static AttentionBackwardScratch<C> take_scratch(const Problem& p, Index longest,
                                                  Workspace::Frame& frame) {
    const Index width = Tile::padded(p.forward.head_dim),
                value_width = Tile::padded(p.forward.value_dim);
    const Index rows = positions_per_block(p) * p.forward.group(),
                all = longest * p.forward.group();
    AttentionBackwardScratch<C> s{frame.take<C>(rows * width),
                                  frame.take<C>(rows * value_width),
                                  frame.take<C>(rows * kBlock),
                                  frame.take<C>(rows * kBlock),
                                  frame.take<C>(kBlock * width),
                                  frame.take<C>(kBlock * width),
                                  frame.take<C>(kBlock * value_width),
                                  frame.take<C>(kBlock * width),
                                  frame.take<C>(kBlock * value_width),
                                  frame.take<C>(all * width),
                                  frame.take<C>(all),
                                  frame.take<C>(all)};
    Tile::fill(s.probabilities, rows * kBlock,
               C(0));  // lanes past the last key are computed with and thrown away
    Tile::fill(s.grad_scores, rows * kBlock, C(0));
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

  /// All gradients of one KV head in one sequence; grad_sinks (heads), the sums of this sequence, may be nullptr.
  void run(const AttentionSequence& sequence, Index kv_head, double* grad_sinks) {
    sequence_ = &sequence;
    kv_head_ = kv_head;
    Tile::fill(s_.grad_queries, sequence.query_rows * group_ * width_, C(0));
    for (Index i = 0; i < sequence.query_rows; ++i)
      for (Index g = 0; g < group_; ++g) load_row_sums(i, g);
    for (Index block = 0; block < sequence.key_length; block += kBlock) key_block(block);
    for (Index j = sequence.key_length; j < p_.key_rows; ++j) {
      std::fill_n(key_gradient(j), f_.head_dim, T(0));
      std::fill_n(value_gradient(j), f_.value_dim, T(0));
    }
    for (Index i = 0; i < sequence.tensor_rows; ++i)
      for (Index g = 0; g < group_; ++g) write_query_gradient(i, g);
    if (grad_sinks != nullptr)
      for (Index g = 0; g < group_; ++g) grad_sinks[kv_head * group_ + g] = sink_gradient(g);
  }

 private:
  Index head(Index g) const { return kv_head_ * group_ + g; }
  Index row(Index i, Index g) const { return (sequence_->query_begin + i) * f_.heads + head(g); }
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

  /// D_i and log_sum_exp of one row.
  void load_row_sums(Index i, Index g) {
    const T *out = p_.output + row(i, g) * f_.value_dim,
            *grad = p_.grad_output + row(i, g) * f_.value_dim;
    V sum = V::zero();
    Index d = 0;
    for (; d + Tile::lanes <= f_.value_dim; d += Tile::lanes)
      sum = fma(V::load(out + d), V::load(grad + d), sum);
    const int rest = static_cast<int>(f_.value_dim - d);
    sum = fma(V::load_partial(out + d, rest), V::load_partial(grad + d, rest), sum);
    s_.deltas[i * group_ + g] = reduce_add(sum);
    s_.log_sum_exp[i * group_ + g] =
        p_.log_sum_exp[sequence_->lse_begin + head(g) * f_.lse_head_stride + i];
  }

  void key_block(Index begin) {
    const int count = static_cast<int>(std::min<Index>(kBlock, sequence_->key_length - begin));
    const KeyBlock<T> block{f_.source, sequence_->key_sequence, kv_head_,
                            sequence_->key_begin + begin, count};
    const auto one = [](int) { return C(1); };
    Tile::pack_transposed(
        count, f_.head_dim, s_.packed_keys, [&](int j) { return block.key(j); }, one);
    Tile::pack_transposed(
        count, f_.value_dim, s_.packed_values, [&](int j) { return block.value(j); }, one);
    for (int j = 0; j < count; ++j)
      Tile::load_row(block.key(j), C(1), f_.head_dim, width_, s_.keys + j * width_);
    Tile::fill(s_.grad_keys, kBlock * width_, C(0));
    Tile::fill(s_.grad_values, kBlock * value_width_, C(0));
    for (Index first = 0; first < sequence_->query_rows; first += positions_) {
      const Index queries = (std::min)(positions_, sequence_->query_rows - first);
      if (sees(first, queries, begin)) query_block(first, queries * group_, begin, count);
    }
    for (int j = 0; j < count; ++j) {
      store_row(s_.grad_keys + j * width_, C(1), f_.head_dim, key_gradient(begin + j));
      store_row(s_.grad_values + j * value_width_, C(1), f_.value_dim, value_gradient(begin + j));
    }
  }

  /// Does one of the queries see one of the keys?
  bool sees(Index first, Index queries, Index begin) const {
    if (!f_.visibility.causal || begin < f_.visibility.prefix) return true;
    const Index position = sequence_->first_position + first;
    return position + queries - 1 >= begin &&
           f_.visibility.keys(position, sequence_->key_length).begin < begin + kBlock;
  }

  void query_block(Index first, Index rows, Index begin, int count) {
    for (Index r = 0; r < rows; ++r) {
      const Index at = row(first + r / group_, r % group_);
      Tile::load_row(f_.queries + at * f_.head_dim, f_.scale, f_.head_dim, width_,
                     s_.queries + r * width_);
      Tile::load_row(p_.grad_output + at * f_.value_dim, C(1), f_.value_dim, value_width_,
                     s_.grad_output + r * value_width_);
    }
    Tile::for_row_tiles(rows, [&](auto tile, Index r) {
      constexpr int R = decltype(tile)::value;
      for (int key = 0; key < count; key += Tile::kPanel) {
        Tile::template dot_panel<R>(s_.queries + r * width_, width_,
                                    s_.packed_keys + key * f_.head_dim, f_.head_dim,
                                    s_.probabilities + r * kBlock + key, kBlock);
        Tile::template dot_panel<R>(s_.grad_output + r * value_width_, value_width_,
                                    s_.packed_values + key * f_.value_dim, f_.value_dim,
                                    s_.grad_scores + r * kBlock + key, kBlock);
      }
    });
    for (Index r = 0; r < rows; ++r) softmax_backward_row(r, first * group_ + r, begin);
    const int inner = static_cast<int>(rows);
    Tile::for_row_tiles(count, [&](auto tile, Index j) {
      constexpr int R = decltype(tile)::value;
      Tile::template accumulate<R>({s_.probabilities + j, 1, kBlock}, s_.grad_output, value_width_,
                                   0, inner, nullptr, value_width_,
                                   s_.grad_values + j * value_width_, value_width_);
      Tile::template accumulate<R>({s_.grad_scores + j, 1, kBlock}, s_.queries, width_, 0, inner,
                                   nullptr, width_, s_.grad_keys + j * width_, width_);
    });
    Tile::for_row_tiles(rows, [&](auto tile, Index r) {
      Tile::template accumulate<decltype(tile)::value>(
          {s_.grad_scores + r * kBlock, kBlock, 1}, s_.keys, width_, 0, count, nullptr, width_,
          s_.grad_queries + (first * group_ + r) * width_, width_);
    });
  }

  /// Scores to probabilities and dP to dS in row r of the tile, row `index` of the sequence. What the row does not see is 0 in
  /// both.
  void softmax_backward_row(Index r, Index index, Index begin) {
    const Index position = sequence_->first_position + index / group_;
    const C lse = s_.log_sum_exp[index];
    BlockRange range = block_range(f_.visibility, position, sequence_->key_length, begin);
    if (lse == -kInfinity)
      range = {0, 0, 0};  // a row without weight: nothing visible, or all scores -infinity
    C *const probabilities = s_.probabilities + r * kBlock, *const grad_scores =
                                                                s_.grad_scores + r * kBlock;
    for (int c = 0; c < kBlock; c += Tile::lanes) {
      V x = V::load(probabilities + c);
      V slope = V::set1(C(1));
      if (f_.softcap > 0) {
        const V t = Tile::tanh(x / V::set1(f_.softcap));
        x = t * V::set1(f_.softcap);
        slope = fma(V::zero() - t, t, slope);
      }
      if (f_.alibi_slopes != nullptr)
        x = fma(V::set1(static_cast<C>(f_.alibi_slopes[head(index % group_)])),
                Tile::positions(c) + V::set1(static_cast<C>(begin - position)), x);
      const V p = exp(x - V::set1(lse));
      const V ds = p * (V::load(grad_scores + c) - V::set1(s_.deltas[index])) * slope;
      const auto seen = Tile::visible(range, Tile::positions(c));
      select(seen, p, V::zero()).store(probabilities + c);
      select(seen, ds, V::zero()).store(grad_scores + c);
    }
  }

  static void store_row(const C* source, C factor, Index width, T* row) {
    const V f = V::set1(factor);
    Index d = 0;
    for (; d + Tile::lanes <= width; d += Tile::lanes) (V::load(source + d) * f).store(row + d);
    if (d < width) (V::load(source + d) * f).store_partial(row + d, static_cast<int>(width - d));
  }

  void write_query_gradient(Index i, Index g) {
    T* const grad = p_.grad_queries + row(i, g) * f_.head_dim;
    if (i < sequence_->query_rows)
      store_row(s_.grad_queries + (i * group_ + g) * width_, f_.scale, f_.head_dim, grad);
    else
      std::fill_n(grad, f_.head_dim, T(0));
  }

  double sink_gradient(Index g) const {
    double sum = 0;
    for (Index i = 0; i < sequence_->query_rows; ++i) {
      const C lse = s_.log_sum_exp[i * group_ + g];
      if (lse > -kInfinity)
        sum -= std::exp(static_cast<double>(f_.sinks[head(g)]) - static_cast<double>(lse)) *
               static_cast<double>(s_.deltas[i * group_ + g]);
    }
    return sum;
  }

  const Problem& p_;
  const AttentionProblem<T, T>& f_;
  const AttentionBackwardScratch<C>& s_;
  Index group_, width_, value_width_, positions_;
  const AttentionSequence* sequence_ = nullptr;
  Index kv_head_ = 0;
};

template <typename Isa, CpuDevice D, typename T>
void attention_backward(Isa, const D& device, const AttentionBackwardProblem<T>& p,
                        Workspace& workspace) {
  using Worker = AttentionBackwardWorker<Isa, T>;
  const auto& f = p.forward;
  Workspace::Frame frame(workspace);
  const Index tasks = f.batch * f.kv_heads;
  const bool sinks = p.grad_sinks != nullptr && f.sinks != nullptr;
  double* const grad_sinks = sinks ? frame.take<double>(f.batch * f.heads) : nullptr;
  Index longest = 0;
  for (Index b = 0; b < f.batch; ++b) longest = (std::max)(longest, f.sequences[b].query_rows);
  if (tasks > 0) {
    const Index workers = attention_workers(device, f, tasks);
    auto* const scratch = frame.take<AttentionBackwardScratch<compute_type<T>>>(workers);
    for (Index w = 0; w < workers; ++w) scratch[w] = Worker::take_scratch(p, longest, frame);
    parallel_for(device, workers, 1, [&](Index begin, Index end, int) {
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
