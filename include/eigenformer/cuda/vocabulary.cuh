/// \file
/// CUDA kernel of a vocabulary-parallel head: the best candidates of this rank's shard of the
/// logits, best first, ties lowest token first; one block per row. One candidate is one pass, more
/// are those of a selection (sampling/filters.cuh), then sorted by a network. What is read is
/// sizeof(T) * shard of a row, the first time from memory: for a few hundred rows of one candidate
/// 80% of the bandwidth is expected. The candidates are for the host, which the call waits for.
#pragma once

#include "../problem/tensor_parallel.h"
#include "sampling/log_probabilities.cuh"
#include "stage.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

template <typename T>
struct VocabularyKernel {
  using C = compute_type<T>;
  using Candidate = problem::VocabularyCandidate;
  static constexpr int kThreads = kRowThreads;
  problem::Vocabulary<T> p;  // candidates on the device

  template <typename Block>
  EIGENFORMER_DEVICE void operator()(Block& block) const {
    const auto arrays = sampling_arrays<C>(block);
    const Index size = p.shard.size();
    for (Index r = block.index(); r < p.rows; r += block.count()) {
      Candidate* const out = p.candidates + r * p.kept;
      for (Index i = block.thread(); i < p.kept; i += block.size())
        out[i] = {-std::numeric_limits<double>::infinity(), Candidate::kNone};
      block.barrier();
      SamplingRow<T> row{p.logits + r * size, nullptr, size, {}, 1.0};
      if (size > 0) write(block, arrays, row, out);
    }
  }

 private:
  EIGENFORMER_DEVICE Candidate candidate(const SamplingRow<T>& row, Index t) const {
    return {static_cast<double>(row.at(t)), static_cast<std::int64_t>(p.shard.begin + t)};
  }

  template <typename Block, typename Arrays>
  EIGENFORMER_DEVICE void write(Block& block, const Arrays& arrays, SamplingRow<T>& row,
                                Candidate* out) const {
    const SampleStatus status = scan_row(block, arrays, row);
    const Index found = p.kept < row.vocab ? p.kept : row.vocab;
    if (status == SampleStatus::nan || status == SampleStatus::positive_infinity) {
      if (block.thread() == 0)
        out[0].token = status == SampleStatus::nan ? Candidate::kNan : Candidate::kInfinity;
      return;
    }
    if (found == 1) {
      const Index best = nth_equal(block, arrays, row, row.band.hi, 1);
      if (block.thread() == 0) out[0] = candidate(row, best);
      return;
    }
    gather_best(block, arrays, row, found,
                [&](Index place, Index token) { out[place] = candidate(row, token); });
    sort_block(block, out, found, [](const Candidate& a, const Candidate& b) {
      return a.logit > b.logit || (a.logit == b.logit && a.token < b.token);
    });
  }
};

template <typename D, typename T>
void execute(const Backend<D>& on, const problem::Vocabulary<T>& p) {
  using Kernel = VocabularyKernel<T>;
  fetch(on, "vocabulary", p.candidates, p.rows * p.kept,
        [&](problem::VocabularyCandidate* candidates) {
          Kernel kernel{p};
          kernel.p.candidates = candidates;
          launch_rows(on, "vocabulary", p.rows, sampling_arrays_bytes<typename Kernel::C>(),
                      kernel);
        });
}

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
