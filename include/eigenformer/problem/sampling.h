/// \file
/// What sampling asks for.
#pragma once

#include <cstdint>
#include <span>
#include <type_traits>

#include "../core/philox.h"
#include "sampling_params.h"

namespace eigenformer {
inline namespace EIGENFORMER_VERSION_NAMESPACE {

namespace problem {

/// A call without a stage of the caller's.
struct NoLogitFunction {};

template <typename Function>
inline constexpr bool is_logit_function = !std::is_same_v<Function, NoLogitFunction>;

/// The stage of the caller's on the host, a loop that its function is compiled into: apply(object,
/// row, first token, logits).
template <typename C>
struct HostLogitFunction {
  void (*apply)(const void*, Index, Index, std::span<C>) = nullptr;
  const void* object = nullptr;

  EIGENFORMER_INLINE void operator()(Index row, Index first, std::span<C> logits) const {
    apply(object, row, first, logits);
  }
};

/// A checked request: pointers and sizes only. Logits, ids and statuses are memory of the backend,
/// params and generators the host's.
template <typename T>
struct Sampling {
  const T* logits;  // (batch, vocab)
  Index batch, vocab;
  const RowParams* params;
  Index params_stride;  // 0: the same for all rows, 1: one per row
  const Philox* generators;
  Index generators_stride;  // 0: one for all rows, 1: one per row
  std::int32_t* ids;        // (batch), -1 where the status is not ok
  SampleStatus* statuses;   // (batch), or nullptr
  HostLogitFunction<compute_type<T>> function = {};
  Index first_row = 0;  // the number that random numbers know the first row by

  EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE const RowParams& params_of(Index row) const {
    return params[row * params_stride];
  }
  EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE double uniform(
      Index row, Philox::Purpose purpose = Philox::Purpose::sampling) const {
    return generators_stride == 0
               ? generators[0].uniform(static_cast<std::uint32_t>(first_row + row), 0, purpose)
               : generators[first_row + row].uniform(0, 0, purpose);
  }
  /// Whether XTC excludes tokens of this row, by a number of its own; without generators, where the
  /// probability is 0 or 1, none is needed.
  EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE bool excludes(Index row) const {
    const double probability = params_of(row).xtc_probability;
    return probability > 0 &&
           (generators == nullptr || uniform(row, Philox::Purpose::exclusion) <= probability);
  }
  EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE void finish(Index row, std::int32_t id,
                                                         SampleStatus status) const {
    if (ids != nullptr) ids[row] = id;
    if (statuses != nullptr) statuses[row] = status;
  }
};

/// The lowest index of the largest logit of every row; params have temperature 0.
template <typename T>
struct GreedySampling : Sampling<T> {};

/// The distribution of every row, (batch, vocab); rows whose status is not ok are zero.
template <typename T>
struct SamplingProbabilities {
  Sampling<T> sampling;
  float* probabilities;
};

/// Where the log-probabilities go. Rows whose status is not ok get -1 and NaN.
struct LogProbabilityOutputs {
  float* raw;              // (batch)
  float* processed;        // (batch)
  std::int32_t* rank;      // (batch)
  Index best;              // columns of the three below, at most vocab
  std::int32_t* best_ids;  // (batch, best)
  float* best_raw;         // (batch, best)
  float* best_processed;   // (batch, best)
};

template <typename T>
struct SampleWithLogProbabilities {
  Sampling<T> sampling;
  LogProbabilityOutputs outputs;
};

/// output[r] = log-probability of tokens[r] in the distribution of row r: NaN where the row is bad,
/// 0 where the token is -1, whatever the row holds.
template <typename T>
struct LogProbabilitiesOf {
  Sampling<T> sampling;
  const std::int32_t* tokens;
  float* output;
};

/// One of the four with a stage of the caller's: logit = function(row, token, logit).
template <typename Problem, typename Function>
struct WithLogitFunction {
  const Problem& problem;
  const Function& function;
};

/// Rejection sampling along drafted chains.
template <typename Draft, typename Target>
struct Speculative {
  const std::int32_t* draft_tokens;  // (batch, drafts)
  const Draft* draft;                // (batch, drafts, vocab)
  const Target* target;              // (batch, drafts + 1, vocab)
  Index batch, drafts, vocab;
  const Index* draft_lengths;  // (batch), or nullptr: all of them
  const Philox* generators;
  Index generators_stride;
  std::int32_t* accepted;  // (batch)
  std::int32_t* tokens;    // (batch, drafts + 1), -1 past the last
  SampleStatus* statuses;  // (batch); where not ok nothing is accepted and every token is -1

  EIGENFORMER_HOST_DEVICE EIGENFORMER_INLINE double uniform(Index row, Index index,
                                                            Philox::Purpose purpose) const {
    const auto counter = static_cast<std::uint32_t>(index);
    return generators_stride == 0
               ? generators[0].uniform(static_cast<std::uint32_t>(row), counter, purpose)
               : generators[row].uniform(0, counter, purpose);
  }
};

}  // namespace problem
}  // namespace EIGENFORMER_VERSION_NAMESPACE
}  // namespace eigenformer
