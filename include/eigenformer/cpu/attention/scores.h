/// \file
/// CPU kernel of the scores of attention, row by row in double: products of the query with every
/// key, the rule, and for probabilities an exponential of each. 2 * head_dim flops a score, every
/// key converted for each row that reads it: for looking at, not for speed.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "../../problem/attention_scores.h"
#include "../../problem/score.h"
#include "../backend.h"
#include "row.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

/// line[0, key_length): scores of row i of a sequence and head, -infinity where it does not see the
/// key. Returns whether it sees one. query: (head_dim).
template <typename Isa, typename T, typename Function>
bool find_scores(const problem::Attention<T, T, Function>& p, Index b, Index head, Index i,
                 double* query, double* line) {
  const problem::AttentionSequence& s = p.sequences[b];
  const problem::ScoreRow row{b, head, s.query_begin + i, s.first_position + i};
  query_in_double(p, row.row * p.heads + head, query);
  bool any = false;
  for (Index j = 0; j < s.key_length; ++j) {
    line[j] = -std::numeric_limits<double>::infinity();
    if (!p.visibility.visible(row.position, j) || !p.unmasked(row, j)) continue;
    any = true;
    const T* const key = p.source.key_row(s.key_sequence, head / p.group(), s.key_begin + j);
    line[j] = problem::score_of_product<double>(p, p.function, row, j,
                                                dot_in_double<Isa>(query, key, p.head_dim))
                  .value;
  }
  return any;
}

/// Scores to probabilities; `sink` joins the denominator.
inline void find_probabilities(double* line, Index count, double sink) {
  double maximum = sink;
  for (Index j = 0; j < count; ++j)
    if (line[j] > maximum || line[j] != line[j]) maximum = line[j];  // NaN stays
  if (maximum == -std::numeric_limits<double>::infinity()) maximum = 0;
  maximum += maximum * 0;  // infinity to NaN, which finite scores beside it become as well
  double sum = std::exp(sink - maximum);
  for (Index j = 0; j < count; ++j) {
    line[j] = line[j] == -std::numeric_limits<double>::infinity() ? 0 : std::exp(line[j] - maximum);
    sum += line[j];
  }
  for (Index j = 0; j < count; ++j) line[j] = line[j] == 0 ? 0 : line[j] / sum;
}

template <typename D, typename Isa, typename T, typename Function>
void execute(const Backend<D, Isa>& on, const problem::AttentionScores<T, Function>& p) {
  using C = compute_type<T>;
  const auto& f = p.forward;
  Workspace::Frame frame(on.workspace);
  double* const scratch = frame.take<double>(worker_count(on) * (f.head_dim + p.keys));
  const auto find_line = [&](Index at, double* query, double* line) {
    const Index i = at % p.rows, head = at / p.rows % f.heads, b = at / p.rows / f.heads;
    const problem::AttentionSequence& s = f.sequences[b];
    C* const to = p.scores + at * p.keys;
    const bool seen = i < s.query_rows && find_scores<Isa>(f, b, head, i, query, line);
    if (seen && p.probabilities)
      find_probabilities(line, s.key_length,
                         f.sinks == nullptr ? -std::numeric_limits<double>::infinity()
                                            : static_cast<double>(f.sinks[head]));
    const Index written = seen ? s.key_length : 0;
    for (Index j = 0; j < written; ++j) to[j] = static_cast<C>(line[j]);
    std::fill(to + written, to + p.keys,
              p.probabilities ? C(0) : -std::numeric_limits<C>::infinity());
  };
  parallel_for(on, p.lines(),
               Cost{p.keys, kExpCycles + kMoveCycles * static_cast<double>(f.head_dim)},
               [&](Index first, Index last, int worker) {
                 double* const query = scratch + worker * (f.head_dim + p.keys);
                 for (Index at = first; at < last; ++at) find_line(at, query, query + f.head_dim);
               });
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
