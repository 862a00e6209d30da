/// \file
/// CUDA kernel of the scores of attention: a block of 128 threads per row and head, a key per
/// thread in turn, products and rule in double. For probabilities it goes over the keys twice, for
/// the greatest score and for the exponentials, and over these once more for their sum. 2 *
/// head_dim flops in double a score, every row reads its keys itself: to look at, not for speed.
#pragma once

#include <cmath>
#include <limits>

#include "../problem/attention_scores.h"
#include "attention_call.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

template <typename T, typename Function>
struct AttentionScoreLines {
  using C = compute_type<T>;
  static constexpr int kThreads = 128;
  static constexpr double kInfinity = std::numeric_limits<double>::infinity();
  AttentionCall<T, T, Function> call;
  C* scores;
  Index lines, rows, keys;
  bool probabilities;

  static std::size_t shared_size(Index head_dim) {
    return shared_bytes<double>(head_dim) + shared_bytes<double>(kThreads / kWarp);
  }

  template <typename Block>
  EIGENFORMER_DEVICE void operator()(Block& block) const {
    const auto& p = call.p;
    const auto query = block.template shared<double>(p.head_dim);
    const auto scratch = block.template shared<double>(kThreads / kWarp);
    for (Index line = block.index(); line < lines; line += block.count()) {
      const AttentionQuery q =
          call.query_at(p.sequences[line / rows / p.heads], line % rows, line / rows % p.heads);
      C* const to = scores + line * keys;
      if (q.in_sequence < q.s->query_rows) {
        const T* const from = call.query(q);
        for (Index d = block.thread(); d < p.head_dim; d += block.size())
          query.store(d,
                      static_cast<double>(static_cast<C>(from[d])) * static_cast<double>(p.scale));
      }
      block.barrier();
      if (probabilities)
        write_probabilities(block, scratch, query, q, to);
      else
        for (Index j = block.thread(); j < keys; j += block.size())
          to[j] = static_cast<C>(score(query, q, j));
      block.barrier();
    }
  }

 private:
  /// -infinity where the row does not see the key.
  template <typename Query>
  EIGENFORMER_DEVICE double score(const Query& query, const AttentionQuery& q, Index j) const {
    if (!call.sees(q, j)) return -kInfinity;
    const T* const key =
        call.rows.row(false, q.s->key_sequence, q.head / call.group, q.s->key_begin + j);
    const double product =
        key_product<double, C>(key, call.p.head_dim, [&](Index d) { return query.load(d); });
    return problem::score_of_product<double>(call.p, call.p.function, call.score_row(q), j, product)
        .value;
  }

  template <typename Block, typename Scratch, typename Query>
  EIGENFORMER_DEVICE void write_probabilities(Block& block, const Scratch& scratch,
                                              const Query& query, const AttentionQuery& q,
                                              C* to) const {
    double maximum = -kInfinity, sum = 0;
    for (Index j = block.thread(); j < keys; j += block.size())
      maximum = LargerOrNan{}(maximum, score(query, q, j));
    maximum = reduce_block(block, scratch, maximum, LargerOrNan{});
    const double sink =
        call.p.sinks == nullptr ? -kInfinity : static_cast<double>(call.p.sinks[q.head]);
    maximum = LargerOrNan{}(maximum, sink);
    if (maximum == -kInfinity) maximum = 0;
    maximum += maximum * 0;  // infinity to NaN, which finite scores beside it become as well
    for (Index j = block.thread(); j < keys; j += block.size()) {
      const double x = score(query, q, j), weight = x == -kInfinity ? 0.0 : std::exp(x - maximum);
      to[j] = static_cast<C>(weight);
      sum += weight;
    }
    sum = reduce_block(block, scratch, sum, Add{}) + std::exp(sink - maximum);
    for (Index j = block.thread(); j < keys; j += block.size())
      to[j] = to[j] == 0 ? C(0) : static_cast<C>(static_cast<double>(to[j]) / sum);
  }
};

template <typename D, typename T, typename Function>
void execute(const Backend<D>& on, const problem::AttentionScores<T, Function>& p) {
  constexpr auto name = "attention_scores";
  using Kernel = AttentionScoreLines<T, Function>;
  const auto call = std::get<0>(stage_attention(on, name, p.forward, {}));
  launch_rows(on, name, p.lines(), Kernel::shared_size(p.forward.head_dim),
              Kernel{call, p.scores, p.lines(), p.rows, p.keys, p.probabilities});
}

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
