/// \file
/// The rounds in which ranks ask their shards of divided rows and go on by the answers.
#pragma once

#include "divided_filters.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

template <typename C>
Index numbers_of_answer(const problem::ShardRow<C>& asked) {
  using problem::ShardQuestion;
  switch (asked.question) {
    case ShardQuestion::none:
    case ShardQuestion::sums:
    case ShardQuestion::nucleus:
      return 0;
    case ShardQuestion::bins:
      return 2 * problem::ShardBins::count;
    case ShardQuestion::bounds:
      return problem::ShardKeys::halves;
    case ShardQuestion::keys:
      return 2 * problem::ShardKeys::bins;
    case ShardQuestion::listed:
      return problem::ShardKeys::listed;
    case ShardQuestion::best:
      return asked.most;
    case ShardQuestion::deviations:
    case ShardQuestion::extent:
      return 3;
    case ShardQuestion::place:
      return 1;
    default:
      return 2;
  }
}

template <typename Rows>
void take_answer(Rows& divided, Index r, problem::ShardQuestion question,
                 const ShardAnswers& answers) {
  using problem::ShardQuestion;
  if (question == ShardQuestion::count) take_count(divided, r, answers);
  if (question == ShardQuestion::weights) take_weights(divided, r, answers);
  if (question == ShardQuestion::masses) take_masses(divided, r, answers);
  if (question == ShardQuestion::bins) take_bins(divided, r, answers);
  if (question == ShardQuestion::deviations) take_deviations(divided, r, answers);
  if (question == ShardQuestion::bounds) take_bounds(divided, r, answers);
  if (question == ShardQuestion::keys) take_keys(divided, r, answers);
  if (question == ShardQuestion::listed) take_listed(divided, r, answers);
  if (question == ShardQuestion::extent) take_extent(divided, r, answers);
  if (question == ShardQuestion::best) take_best(divided, r, answers);
  if (question == ShardQuestion::place) take_place(divided, r, answers);
}

/// The rows that ask for such sums.
template <typename D, typename Rows>
void answer_sums(const D& device, Rows& divided, problem::ShardSum of) {
  using C = typename Rows::C;
  Workspace::Frame frame(divided.workspace);
  Index* const which = frame.take<Index>(divided.shard.rows);
  Index count = 0;
  for (Index r = 0; r < divided.shard.rows; ++r)
    if (divided.asked[r].question == problem::ShardQuestion::sums && divided.asked[r].sum == of)
      which[count++] = r;
  if (count == 0) return;
  const SummedRows<Rows> summed(device, divided, static_cast<const C*>(divided.shard.logits),
                                divided.asked, {which, static_cast<std::size_t>(count)}, of, frame);
  for (Index i = 0; i < count; ++i) {
    divided.asked[which[i]].question = problem::ShardQuestion::none;
    take_sums(divided, which[i], summed.sums(i));
  }
}

/// Asks until no row has a question.
template <typename D, typename Rows>
void settle_rows(const D& device, Rows& divided) {
  using C = typename Rows::C;
  using problem::ShardQuestion;
  const Index rows = divided.shard.rows;
  for (;;) {
    settle_nuclei(device, divided);
    for (const auto of :
         {problem::ShardSum::moments, problem::ShardSum::deviations, problem::ShardSum::squares})
      answer_sums(device, divided, of);
    Workspace::Frame frame(divided.workspace);
    Index* const begin = frame.take<Index>(rows + 1);
    begin[0] = 0;
    bool open = false;
    for (Index r = 0; r < rows; ++r) {
      begin[r + 1] = begin[r] + numbers_of_answer(divided.asked[r]);
      open = open || divided.asked[r].question != ShardQuestion::none;
    }
    if (!open) return;
    if (begin[rows] == 0) continue;  // sums and nuclei alone
    double* const own = frame.take<double>(begin[rows]);
    detail::run(device, problem::AskShard<C>{divided.shard, divided.asked, begin, own},
                divided.workspace);
    const ShardAnswers answers = divided.exchange(own, begin, begin[rows], frame);
    for (Index r = 0; r < rows; ++r) {
      const ShardQuestion question = divided.asked[r].question;
      if (numbers_of_answer(divided.asked[r]) == 0) continue;
      divided.asked[r].question = ShardQuestion::none;
      take_answer(divided, r, question, answers);
    }
  }
}

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
