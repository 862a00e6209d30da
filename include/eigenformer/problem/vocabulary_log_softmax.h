/// \file
/// What ranks are asked about their columns of rows that log-softmax is taken of. The sum of a row
/// is that of the whole row (problem/vocabulary_tree.h): of blocks, from first to last, but for one
/// token of the largest number, which log1p knows.
#pragma once

#include "vocabulary_tree.h"

namespace eigenformer {
inline namespace EIGENFORMER_VERSION_NAMESPACE {
namespace problem {

/// Of each row the parts of the sum of exp(x - best), where shared tokens have x in place of it,
/// then the first whole block that holds the best, -1 where none does, and its sum without it.
template <typename T>
struct WeighExponentials {
  const T* x;  // (rows, shard.size())
  Index rows, vocab;
  ShardRange shard;
  const double* best;       // (rows)
  const bool* has_softmax;  // (rows)
  double* answers;          // (rows, size of the parts + 2)
};

/// The log of the sum of a row, less its best, from what all ranks say; C: the compute type.
template <typename C>
struct JoinExponentials {
  Index vocab;
  int ranks;
  const double* const* parts;  // (ranks)
  double best;
  double& log_sum;
};

/// y = (x - best) - log_sum; NaN in the rows that have no softmax.
template <typename Y, typename T>
struct SubtractLogSums {
  Y* y;        // (rows, columns), may be the memory of x where Y is T
  const T* x;  // (rows, columns)
  Index rows, columns;
  const double *best, *log_sum;  // (rows)
  const bool* has_softmax;       // (rows)
};

}  // namespace problem
}  // namespace EIGENFORMER_VERSION_NAMESPACE
}  // namespace eigenformer
