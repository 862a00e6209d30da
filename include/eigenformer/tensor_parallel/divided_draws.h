/// \file
/// Draws from all tokens in play of divided rows (divided_rows.h): the ranks say what their tokens
/// weigh, by floats where those serve, and the one within whose weights the draw lies finds the
/// token.
#pragma once

#include "divided_rows.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

/// All tokens in play may be drawn.
template <typename Rows>
void ask_draw(Rows& divided, Index r) {
  constexpr Index least_vocab = 4096;  // as in a whole row
  if (divided.sampling.generators == nullptr) return end_row(divided, r, RowEnd::drawn);
  const bool in_float = std::is_same_v<typename Rows::C, float> && divided.weighs_in_float &&
                        divided.sampling.vocab >= least_vocab;
  divided.asked[r].question =
      in_float ? problem::ShardQuestion::masses : problem::ShardQuestion::weights;
}

/// The rank within whose weights the draw of a row lies, and where.
template <typename Rows>
void take_draw(Rows& divided, Index r, const ShardAnswers& answers) {
  auto& row = divided.rows[static_cast<std::size_t>(r)];
  auto& asked = divided.asked[r];
  const double target = divided.sampling.uniform(r) * row.total;
  double before = 0;
  int rank = 0;
  for (; rank < divided.ranks() - 1; ++rank) {
    const double weight = answers.of(rank, r, 0);
    if (before + weight > target) break;
    before += weight;
  }
  asked.target = target - before;
  asked.before = before;
  asked.margin = divided.margin(row.total);
  row.drawn_by = rank;
  end_row(divided, r, RowEnd::drawn);
}

/// The draw by sums of floats. Of before - u * (before + after) the error is 1 - u of that of what
/// comes before the token, and u of that of what comes after.
template <typename Rows>
void take_masses(Rows& divided, Index r, const ShardAnswers& answers) {
  auto& row = divided.rows[static_cast<std::size_t>(r)];
  if (answers.sum(r, 1) == 0) {
    divided.asked[r].question = problem::ShardQuestion::weights;
    return;
  }
  row.total = answers.sum(r, 0);
  take_draw(divided, r, answers);
  const double u = divided.sampling.uniform(r);
  for (int rank = 0; rank < divided.ranks(); ++rank) {
    const double share = rank < row.drawn_by ? 1 - u : rank > row.drawn_by ? u : 1.0;
    divided.asked[r].margin += share * answers.of(rank, r, 1);
  }
}

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
