/// \file
/// CUDA kernels of sampling: every filter in every order, the draw, the distribution and the
/// log-probabilities (cuda/sampling/). Statuses, order, ties and boundaries are those of the CPU,
/// and the draw adds what the CPU adds in its order, so that a seed draws the same tokens.
/// filters.cuh names the one difference.
///
/// Greedy (greedy.cuh) is one pass over the row; a chain of temperature, top-k, top-p and min-p
/// with a draw (draw.cuh) is one pass and what a list of some 50 tokens takes. Measured on an H200,
/// with a cold L2, in microseconds, rows of 128256 floats:
///
///                                1 row   64   256   PyTorch 2.11: 1   64
///   greedy                           9   21    49                40   45
///   top-k 50                        39   48   105               266  247
///   top-k 50, top-p 0.9             41   49   109
///   top-p 0.9                      689  706  1908               275 1098 (by a sort)
///   all tokens                     131  151   352
///
/// In all other chains, too, a block does a row, and each step is a pass over it, of which the
/// first reads it from memory and the others from L2: a draw adds one (an exponential in double per
/// token in play, some 25 flops), a top-k that leaves no list 8 and top-p 9 (of float; 4 and 5 of
/// bfloat16), min-p one, typical-p 19, penalties, bias and mask a copy and one. What exponentials
/// of a whole vocabulary take in each is most of it.
///
/// Parameters, with their lists, and generators are staged. Rows with a stage that changes logits
/// take scratch, at most kScratchRows rows of it.
#pragma once

#include <algorithm>
#include <limits>

#include "../core/workspace.h"
#include "launch.cuh"
#include "sampling/draw.cuh"
#include "sampling/greedy.cuh"
#include "sampling/log_probabilities.cuh"
#include "sampling/logits.cuh"
#include "sampling/speculative.cuh"
#include "sampling/speculative_tree.cuh"
#include "sampling/stages.cuh"
#include "stage.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

/// What a call asks of the filtered distributions.
enum class SamplingResult : std::uint8_t { token, probabilities, log_probabilities, of_tokens };

/// One kernel for all of them: they share the filters, which are most of it. A function of the
/// caller's is compiled into one of its own.
template <typename T, typename Function>
struct SamplingKernel {
  using C = compute_type<T>;
  static constexpr int kThreads = kRowThreads;
  problem::Sampling<T> p;  // params, their lists and generators on the device
  SamplingResult result;
  Function function;
  C* adjusted = nullptr;           // a row for each block; nullptr where none is adjusted
  std::int32_t* counts = nullptr;  // likewise
  Index scratch_stride = 0;
  float* probabilities = nullptr;           // SamplingProbabilities
  problem::LogProbabilityOutputs log = {};  // SampleWithLogProbabilities
  const std::int32_t* tokens = nullptr;     // LogProbabilitiesOf
  float* of_tokens = nullptr;

  template <typename Block>
  EIGENFORMER_DEVICE void operator()(Block& block) const {
    const auto arrays = sampling_arrays<C>(block);
    for (Index r = block.index(); r < p.batch; r += block.count()) {
      const problem::RowParams& params = p.params_of(r);
      SamplingRow<T> row{p.logits + r * p.vocab, nullptr, p.vocab, {}, 1.0};
      SampleStatus status = scan_row(block, arrays, row);
      const C best = row.band.hi;
      if (status == SampleStatus::ok && problem::adjusts_logits(params)) {
        C* const own = adjusted + block.index() * scratch_stride;
        adjust_logits(block, arrays, p, r, own, counts + block.index() * scratch_stride, function);
        row.adjusted = own;
        status = scan_row(block, arrays, row);
      }
      if (status == SampleStatus::ok) apply_filters(block, arrays, row, params, p.excludes(r));
      write(block, arrays, best, row, r, status);
    }
  }

 private:
  template <typename Block, typename Arrays>
  EIGENFORMER_DEVICE void write(Block& block, const Arrays& arrays, C best,
                                const SamplingRow<T>& row, Index r, SampleStatus status) const {
    const auto weights = weights_of(row);
    if (result == SamplingResult::of_tokens) status = write_of_token(block, arrays, row, r, status);
    if (result == SamplingResult::probabilities) {
      float* const out = probabilities + r * p.vocab;
      const double total =
          status == SampleStatus::ok ? sum_in_order(block, arrays.sums, p.vocab, weights) : 0.0;
      const Index apart = block.size();
      for (Index t = block.thread(); t < p.vocab; t += apart * FourWeights::kCount) {
        FourWeights four{};
        if (total > 0) four = weights(t, apart);
        for (int k = 0; k < FourWeights::kCount; ++k)
          if (t + k * apart < p.vocab)
            out[t + k * apart] = total > 0 ? static_cast<float>(four.values[k] / total) : 0.0f;
      }
    }
    std::int32_t id = -1;
    const bool draws =
        result == SamplingResult::token || result == SamplingResult::log_probabilities;
    if (draws && status == SampleStatus::ok)
      id = draw_in_order(block, arrays.sums, p.vocab, p.uniform(r), weights);
    if (result == SamplingResult::log_probabilities) {
      const problem::Band<C> all{best, std::numeric_limits<C>::lowest(), p.vocab};
      if (status == SampleStatus::ok)
        write_log_probabilities(block, arrays, {row.logits, nullptr, p.vocab, all, 1.0}, row, r, id,
                                log);
      else
        write_no_log_probabilities(block, r, log);
    }
    if (block.thread() == 0) p.finish(r, id, status);
    block.barrier();  // the next row's scratch
  }

  template <typename Block, typename Arrays>
  EIGENFORMER_DEVICE SampleStatus write_of_token(Block& block, const Arrays& arrays,
                                                 const SamplingRow<T>& row, Index r,
                                                 SampleStatus status) const {
    const Index token = tokens[r];
    float found = std::numeric_limits<float>::quiet_NaN();
    if (token == -1) {
      found = 0;
      status = SampleStatus::ok;
    } else if (status == SampleStatus::ok && token >= 0 && token < p.vocab) {
      found = log_probability(row, token, log_sum_weights(block, arrays, row));
    }
    if (block.thread() == 0) of_tokens[r] = found;
    return status;
  }
};

/// Lists of several parameter sets, one after the other, in the frame: list(params) of each.
template <typename V, typename Lists>
std::span<const V> joined_lists(std::span<const problem::RowParams> sets, Workspace::Frame& frame,
                                Lists list) {
  std::size_t count = 0;
  for (const problem::RowParams& params : sets) count += list(params).size();
  V* const all = frame.take<V>(static_cast<Index>(count));
  V* next = all;
  for (const problem::RowParams& params : sets)
    next = std::copy(list(params).begin(), list(params).end(), next);
  return {all, count};
}

/// The sets on the device, their lists too: those are a copy of their own where there are any.
template <typename D>
std::tuple<const problem::RowParams*, const Philox*> stage_params(
    const Backend<D>& on, const char* name, std::span<const problem::RowParams> sets,
    std::span<const Philox> generators, bool lists) {
  using problem::RowParams;
  if (!lists) return stage(on, name, sets, generators);
  Workspace::Frame frame(thread_workspace());
  auto [prompts, outputs, biases, masks] = stage(
      on, name,
      joined_lists<std::int32_t>(sets, frame, [](const RowParams& p) { return p.prompt_tokens; }),
      joined_lists<std::int32_t>(sets, frame, [](const RowParams& p) { return p.output_tokens; }),
      joined_lists<LogitBias>(sets, frame, [](const RowParams& p) { return p.logit_bias; }),
      joined_lists<std::uint32_t>(sets, frame, [](const RowParams& p) { return p.token_mask; }));
  RowParams* const on_device = frame.take<RowParams>(static_cast<Index>(sets.size()));
  const auto move_to = [](auto& list, auto& next) {
    list = {next, list.size()};
    next = detail::offset_by(next, list.size());
  };
  for (std::size_t i = 0; i < sets.size(); ++i) {
    on_device[i] = sets[i];
    move_to(on_device[i].prompt_tokens, prompts);
    move_to(on_device[i].output_tokens, outputs);
    move_to(on_device[i].logit_bias, biases);
    move_to(on_device[i].token_mask, masks);
  }
  return stage(on, name, std::span<const RowParams>(on_device, sets.size()), generators);
}

inline const char* name_of(SamplingResult result) {
  switch (result) {
    case SamplingResult::probabilities:
      return "sampling_probabilities";
    case SamplingResult::log_probabilities:
      return "sample_with_log_probabilities";
    case SamplingResult::of_tokens:
      return "log_probabilities_of";
    case SamplingResult::token:
      break;
  }
  return "sample";
}

/// Rows of scratch, and so rows at a time, where logits are adjusted: as many as an H100 has
/// multiprocessors.
inline constexpr Index kScratchRows = 132;

template <typename D, typename T, typename Function>
void run_sampling(const Backend<D>& on, SamplingKernel<T, Function> kernel) {
  using Kernel = SamplingKernel<T, Function>;
  const char* const name = name_of(kernel.result);
  problem::Sampling<T>& p = kernel.p;
  if (p.batch == 0) return;
  const std::size_t rows = static_cast<std::size_t>(p.batch);
  const std::span sets(p.params, p.params_stride == 0 ? 1 : rows);
  const bool adjusts = std::any_of(sets.begin(), sets.end(), [](const problem::RowParams& params) {
    return problem::adjusts_logits(params);
  });
  const std::span generators(p.generators, p.generators == nullptr    ? 0
                                           : p.generators_stride == 0 ? 1
                                                                      : rows);
  std::tie(p.params, p.generators) = stage_params(on, name, sets, generators, adjusts);
  if constexpr (!problem::is_logit_function<Function>)
    if (kernel.result == SamplingResult::token && !adjusts &&
        std::all_of(sets.begin(), sets.end(), is_common_chain))
      return launch_rows(on, name, p.batch, DrawKernel<T>::shared(), DrawKernel<T>{p});
  if (!adjusts)
    return launch_rows(on, name, p.batch, sampling_arrays_bytes<typename Kernel::C>(), kernel);
  const Index blocks = p.batch < kScratchRows ? p.batch : kScratchRows;
  kernel.scratch_stride = (p.vocab + 3) / 4 * 4;  // 16 bytes of whatever type
  const Index numbers = blocks * kernel.scratch_stride;
  with_scratch<typename Kernel::C, std::int32_t>(
      on, name, {numbers, numbers}, [&](typename Kernel::C* adjusted, std::int32_t* counts) {
        kernel.adjusted = adjusted;
        kernel.counts = counts;
        launch(on, name, blocks, Kernel::kThreads, sampling_arrays_bytes<typename Kernel::C>(),
               kernel);
      });
}

template <typename T, typename Function>
SamplingKernel<T, Function> kernel_of(const problem::Sampling<T>& p, const Function& function) {
  return {p, SamplingResult::token, function};
}

template <typename T, typename Function>
SamplingKernel<T, Function> kernel_of(const problem::SamplingProbabilities<T>& p,
                                      const Function& function) {
  SamplingKernel<T, Function> kernel{p.sampling, SamplingResult::probabilities, function};
  kernel.probabilities = p.probabilities;
  return kernel;
}

template <typename T, typename Function>
SamplingKernel<T, Function> kernel_of(const problem::SampleWithLogProbabilities<T>& p,
                                      const Function& function) {
  SamplingKernel<T, Function> kernel{p.sampling, SamplingResult::log_probabilities, function};
  kernel.log = p.outputs;
  return kernel;
}

template <typename T, typename Function>
SamplingKernel<T, Function> kernel_of(const problem::LogProbabilitiesOf<T>& p,
                                      const Function& function) {
  SamplingKernel<T, Function> kernel{p.sampling, SamplingResult::of_tokens, function};
  kernel.tokens = p.tokens;
  kernel.of_tokens = p.output;
  return kernel;
}

template <typename D, typename T>
void execute(const Backend<D>& on, const problem::Sampling<T>& p) {
  run_sampling(on, kernel_of(p, problem::NoLogitFunction{}));
}

template <typename D, typename T>
void execute(const Backend<D>& on, const problem::SamplingProbabilities<T>& p) {
  run_sampling(on, kernel_of(p, problem::NoLogitFunction{}));
}

template <typename D, typename T>
void execute(const Backend<D>& on, const problem::SampleWithLogProbabilities<T>& p) {
  run_sampling(on, kernel_of(p, problem::NoLogitFunction{}));
}

template <typename D, typename T>
void execute(const Backend<D>& on, const problem::LogProbabilitiesOf<T>& p) {
  run_sampling(on, kernel_of(p, problem::NoLogitFunction{}));
}

template <typename D, typename Problem, typename Function>
void execute(const Backend<D>& on, const problem::WithLogitFunction<Problem, Function>& p) {
  run_sampling(on, kernel_of(p.problem, p.function));
}

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
