/// \file
/// One row on several threads. The passes over a row are made of fixed slices of its blocks, whose
/// results are joined from first to last: they depend on the vocabulary alone and are the same bits
/// on any number of threads.
#pragma once

#include <utility>

#include "../backend.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

struct RowSlices {
  static constexpr Index most = 32;   // so many threads may share a row; 4096 tokens of 128256 each
  static constexpr Index slack = 16;  // numbers that one of them may write past its end: a vector
  Index blocks, each;                 // of the row, of a slice

  explicit RowSlices(Index blocks_of_row)
      : blocks(blocks_of_row), each((std::max)(Index{1}, (blocks_of_row + most - 1) / most)) {}
  // A part of a row pays from 1.7 us on, thrice the length of other parts: each waits for an answer
  // of another core, 1 us where both are awake, and the caller's cache holds what came before. So
  // 128256 floats are weighed by two threads and scanned for their maximum, 2 us, by one.
  static constexpr double cost = 0.35;

  Index count() const { return (blocks + each - 1) / each; }
  Index begin(Index slice) const { return (std::min)(slice * each, blocks); }
};

inline const Eigen::ThreadPoolDevice* pool_of(const Eigen::DefaultDevice&) { return nullptr; }
inline const Eigen::ThreadPoolDevice* pool_of(const Eigen::ThreadPoolDevice& device) {
  return &device;
}

/// The pool whose threads share each row, nullptr where they take whole rows: a shared row uses
/// about 60% of two threads, so that from half as many rows as threads on whole rows are as good.
/// In a ParallelRegion a pass in float over 60000 tokens is worth a second thread, elsewhere one
/// over 900000.
template <typename D>
const Eigen::ThreadPoolDevice* pool_of_rows(const D& device, Index rows, Index tokens) {
  const bool pays = 2 * rows <= worker_count(device) &&
                    part_count(device, tokens, Cost{1, RowSlices::cost * kWeightCycles}) > 1;
  return pays ? pool_of(device) : nullptr;
}

/// Calls body(first, last, worker) on ranges that cover all rows; one where `pool` shares each.
template <typename On, typename Body>
void for_rows(const On& on, const Eigen::ThreadPoolDevice* pool, Index rows, Cost cost,
              Body&& body) {
  if (pool != nullptr)
    body(Index{0}, rows, 0);
  else
    parallel_for(on, rows, cost, std::forward<Body>(body));
}

/// What a slice costs in a pass of `cycles` a token over `blocks` blocks of 128.
inline Cost cost_of_slice(const RowSlices& slices, Index blocks, double cycles) {
  return {blocks * 128, RowSlices::cost * cycles / static_cast<double>(slices.count())};
}

/// Calls body(first, last) on ranges that cover all slices, as many as such a pass pays for.
template <typename Body>
void for_slices(const Eigen::ThreadPoolDevice* pool, const RowSlices& slices, Index blocks,
                double cycles, Body&& body) {
  if (pool == nullptr)
    body(Index{0}, slices.count());
  else
    parallel_for(*pool, slices.count(), cost_of_slice(slices, blocks, cycles),
                 [&](Index first, Index last, int) { body(first, last); });
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
