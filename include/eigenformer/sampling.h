/// \file
/// From logits (batch, vocab) to tokens: the best, or drawn from what a chain of stages makes of
/// them.
///
///   ids = ef::greedy_sample(logits);
///   ids = ef::top_k_sample(logits, k, temperature, rng);
///   ids = ef::top_p_sample(logits, p, temperature, rng);
///   ids = ef::sample(logits, ef::SamplingParams{.temperature = .8f, .top_k = 50, .top_p = .95f},
///                    rng);
///   ids = ef::sample(logits, per_row_params, rng);    // span or vector of SamplingParams, per row
///   ids = ef::sample(logits, params, rng, [](auto row, auto token, auto logit) { return logit; });
///   probabilities = ef::sampling_probabilities(logits, params);    // what sample draws from
///   drawn = ef::sample_with_log_probabilities(logits, params, rng, {.best = 5});
///   scores = ef::log_probabilities_of(logits, tokens);             // of given tokens
///   result = ef::verify_speculative(draft_tokens, draft_probabilities, target_probabilities, rng);
///
/// The last three are in sampling/log_probabilities.h and sampling/speculative.h.
///
/// The stages run in the order of SamplingParams::order: kHuggingFaceOrder (here), kVllmOrder,
/// kLlamaCppOrder, or yours, `{SamplingStage::penalties, SamplingStage::top_k}`. A stage whose
/// parameter is set must be in it. First those that change logits x; h is the history, prompt and
/// then output:
///
///   guidance         s * (l - u) + u, with l and u the log-softmax of this row and guidance_row;
///                    -infinity in either stays (Sanchez et al., 2023)
///   sequence_bias    x += bias for the last token of a sequence whose others end h (Hugging Face)
///   penalties        x > 0 ? x / r : x * r for tokens of h (Keskar et al., 2019), then x -=
///                    frequency * count + presence for those of output (OpenAI). penalty_window:
///                    of the last tokens of h; penalize_log_probabilities: x is its log-softmax
///   dry              x -= multiplier * base^(n - allowed_length) for a token that stood behind the
///                    n >= allowed_length tokens that end h and hold no breaker; breakers of one
///                    token are spared (Weidmann, 2024, as in llama.cpp)
///   no_repeat_ngram  -infinity for a token that ends n tokens which h holds (Paulus et al., 2017)
///   bad_words        -infinity for the last token of a word whose others end h
///   logit_bias       x += bias
///   min_tokens       -infinity for stop_tokens while output is shorter
///   token_mask       -infinity where the bit is 0: what grammars set
///   forced_tokens    0 for the token forced at this position of output, -infinity for the others
///   function         x = function(row, token, x)
///
/// Then filters, of probabilities p, each on the renormalised survivors of the one before:
///
///   temperature      x / T; T = 0 keeps the best token, the lowest index among equals: greedy.
///                    dynatemp_range: T = a + (b - a) * (entropy / log(count))^exponent with
///                    a = max(0, temperature - range), b = temperature + range (llama.cpp)
///   top_k            the k largest; of equals at the end those of lowest index, or all
///                    (top_k_ties); 0 and k >= vocab keep all (Fan et al., 2018)
///   top_p            the smallest set of most likely tokens whose p sum to at least top_p; equals
///                    by lowest index (Holtzman et al., 2020)
///   min_p            p >= min_p * the best's (Nguyen et al., 2024)
///   typical_p        the smallest set of tokens nearest in information to the entropy that sums to
///                    at least typical_p; all equals (Meister et al., 2023)
///   top_n_sigma      x >= the best - n * standard deviation of x (Tang et al., 2024)
///   xtc              with xtc_probability: drops the tokens of p >= xtc_threshold but the last of
///                    them (Weidmann, 2024)
///   epsilon_cutoff   p >= epsilon; where there is none, the best and its equals, as in
///   eta_cutoff       p >= min(eta, sqrt(eta) * exp(-entropy)) (both Hewitt et al., 2022)
///   top_h            the best, and most likely tokens while their -p log p sum to at most top_h *
///                    entropy (Potraghloo et al., 2025, as in Hugging Face, where it sees the 100
///                    best: put top_k before it)
///   mirostat         version 2: p >= 2^-mu; 1: top-k, with k from mu and the slope of the best 100
///                    (Basu et al., 2021). MirostatState moves mu
///
/// Every set holds at least one token. Equality and order are those of the logits as given (after
/// penalties and bias), not of rounded probabilities. What is kept and drawn is what sums and
/// weights in double say (float ones decide where their error bounds allow it). Tokens at -infinity
/// are never drawn.
///
/// Stages of the history are done on the host in O(history), beside a sort of what dry finds and
/// the length of its breakers.
///
/// The draw of row r inverts the cumulative distribution, in token order, at one uniform number: a
/// function of (seed, position, r), or of (seed, position) where every row has a generator of its
/// own. Each call advances each generator by one, whatever the batch and the outcome of its rows; a
/// call that throws advances nothing. XTC, drafting and verifying draw from streams of their own,
/// so that all may have generators of one seed (core/philox.h states the law). Results do not
/// depend on the other rows, guidance_row apart, or on threads, and a GPU draws the tokens of a
/// CPU, but where the probability of a set comes to within rounding (1e-13) of top_p or typical_p:
/// there it may keep a token more or less. A call that is captured into a CUDA graph draws the same
/// numbers at every replay: its parameters, lists and generators are those of the capture, the
/// logits those of the replay.
///
/// Logits are float, double, bfloat16 or half and are never changed. A row is bad that holds NaN or
/// +infinity, or that is all -infinity (as given, or after penalties, bias and mask). Forms that
/// return tokens or numbers alone throw std::invalid_argument naming it; forms that can say how
/// each row ended (the _into forms, and results with `statuses`) give it id -1 and a status and
/// serve the others. std::invalid_argument too for vocab 0, a wrong number of parameter sets or
/// generators, parameters out of range or NaN, token ids out of range, and shapes whose size in
/// bytes overflows. batch 0 is legal. An output must not overlap the logits.
///
/// Cost of a row: one read of the logits; min-p adds nothing to it, top-k little, and top-p and
/// typical-p little where one token has all they keep. Else top-p and a draw from all tokens add
/// about one exponential per token each, and so do XTC, the cutoffs and mirostat 2; top-n-sigma
/// takes as long; typical-p adds two to three times that and top-h two to seven times, and ten
/// times more where the end of the set is too near for float, of typical-p one flat row in sixteen;
/// dynamic temperature, which sums in double, adds ten times that. No filter sorts the vocabulary:
/// the worst case is O(vocab). Rows are spread over the threads of a pool; no more than half as
/// many rows as threads, of 60000 tokens or more, are each shared by the threads of a
/// ParallelRegion. The _into forms allocate nothing after the first call at a size: scratch is
/// about vocab * (1 to 3) numbers per thread.
#pragma once

#include <algorithm>
#include <limits>
#include <span>
#include <string_view>
#include <vector>

#include "core/check.h"
#include "core/device.h"
#include "core/dispatch.h"
#include "core/rows.h"
#include "core/workspace.h"
#include "cpu/sampling/log_probabilities.h"
#include "cpu/sampling/sampling.h"
#include "cpu/sampling/speculative.h"
#include "cpu/sampling/speculative_tree.h"
#include "sampling/row_params.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

inline void check_sampling_shape(std::string_view name, std::string_view argument, Index vocab) {
  require_that(vocab >= 1 && vocab <= (std::numeric_limits<std::int32_t>::max)(), name, argument,
               " has a vocabulary of ", vocab, ", expected 1 to 2147483647 tokens");
}

/// The view of logits (batch, vocab). Throws std::invalid_argument where its sizes, or those of a
/// result of int32 or float with a number for each of its elements, overflow.
template <typename Logits>
auto logits_view(std::string_view name, const Logits& logits) {
  const auto view = input_view<2>(logits);
  constexpr Index element = (std::max)(sizeof(scalar_of<decltype(view)>), sizeof(float));
  checked_size(name, "logits", view, element);
  check_sampling_shape(name, "logits", view.dimension(1));
  return view;
}

inline void check_generators(std::string_view name, std::string_view argument,
                             const Generators& rng, Index batch) {
  require_that(!rng.per_row() || rng.size() == batch, name, "rng has ", rng.size(), " generators, ",
               argument, " has ", batch, " rows");
  require_that(rng.per_row() || static_cast<std::uint64_t>(batch) <= Philox::kRows, name,
               "rng is one generator, ", argument, " has ", batch, " rows, expected at most ",
               Philox::kRows);
}

template <typename View, typename Function = problem::NoLogitFunction>
auto sampling_problem(std::string_view name, const View& logits, const SamplingParamsView& params,
                      std::int32_t* ids, SampleStatus* statuses, Workspace::Frame& frame,
                      const Function& = {}) {
  using T = scalar_of<View>;
  constexpr bool has_function = problem::is_logit_function<Function>;
  static_assert(FloatingScalar<T>,
                "eigenformer: logits are float, double, Eigen::bfloat16 or Eigen::half");
  check_all_params(name, params, logits.dimension(0), logits.dimension(1));
  if constexpr (has_function) require_function_stage(name, params);
  problem::Sampling<T> problem{logits.data(),
                               logits.dimension(0),
                               logits.dimension(1),
                               row_params(params, has_function, logits.dimension(1), frame),
                               params.per_row ? 1 : 0,
                               nullptr,
                               0,
                               ids,
                               statuses};
  return problem;
}

/// Runs a problem of sampling_problem with the call's function, which may be none.
template <Device D, typename Problem, typename Function>
void run_sampling(const D& device, const Problem& problem, const Function& function,
                  Workspace& workspace) {
  if constexpr (problem::is_logit_function<Function>)
    detail::run(device, problem::WithLogitFunction<Problem, Function>{problem, function},
                workspace);
  else
    detail::run(device, problem, workspace);
}

template <typename T>
void set_generators(std::string_view name, problem::Sampling<T>& problem, const Generators& rng) {
  check_generators(name, "logits", rng, problem.batch);
  problem.generators = rng.data();
  problem.generators_stride = rng.per_row() ? 1 : 0;
}

inline void require_good_rows(std::string_view name, std::span<const SampleStatus> statuses) {
  for (std::size_t r = 0; r < statuses.size(); ++r) {
    require_that(statuses[r] != SampleStatus::nan, name, "logits row ", r, " holds NaN");
    require_that(statuses[r] != SampleStatus::positive_infinity, name, "logits row ", r,
                 " holds +infinity");
    require_that(statuses[r] != SampleStatus::no_token, name, "logits row ", r,
                 " is all -infinity, as given or after bias and mask: no token is left");
  }
}

/// The memory of statuses that were asked for.
inline SampleStatus* checked_statuses(std::string_view name, std::span<SampleStatus> statuses,
                                      Index batch) {
  require_that(statuses.empty() || static_cast<Index>(statuses.size()) == batch, name,
               "statuses has ", statuses.size(), " elements, logits has ", batch, " rows");
  return statuses.empty() ? nullptr : statuses.data();
}

template <typename Ids>
auto sampled_ids_view(std::string_view name, Ids& ids, Index batch) {
  auto view = output_view<1>(ids);
  static_assert(std::is_same_v<scalar_of<Ids>, std::int32_t>,
                "eigenformer: token ids are std::int32_t");
  require_that(view.dimension(0) == batch, name, "ids has ", view.dimension(0),
               " elements, logits has ", batch, " rows");
  return view;
}

template <typename D, typename Ids, typename Logits, typename Function = problem::NoLogitFunction>
void sample_into(std::string_view name, const D& device, Ids& ids, const Logits& logits,
                 const SamplingParamsView& params, Generators& rng,
                 std::span<SampleStatus> statuses, Workspace& workspace,
                 const Function& function = {}) {
  const auto view = logits_view(name, logits);
  auto out = sampled_ids_view(name, ids, view.dimension(0));
  Workspace::Frame frame(workspace);
  auto problem =
      sampling_problem(name, view, params, out.data(),
                       checked_statuses(name, statuses, view.dimension(0)), frame, function);
  set_generators(name, problem, rng);
  run_sampling(device, problem, function, workspace);
  rng.advance();
}

template <CpuDevice D, typename Logits, typename Function = problem::NoLogitFunction>
Tensor<std::int32_t, 1> sample(std::string_view name, const D& device, const Logits& logits,
                               const SamplingParamsView& params, Generators& rng,
                               const Function& function = {}) {
  const auto view = logits_view(name, logits);
  std::vector<SampleStatus> statuses(static_cast<std::size_t>(view.dimension(0)));
  Tensor<std::int32_t, 1> ids(view.dimension(0));
  Workspace::Frame frame(thread_workspace());
  auto problem = sampling_problem(name, view, params, ids.data(), statuses.data(), frame, function);
  set_generators(name, problem, rng);
  run_sampling(device, problem, function, thread_workspace());
  require_good_rows(name, statuses);
  rng.advance();
  return ids;
}

inline SamplingParams top_k_params(std::string_view name, Index k, double temperature) {
  require_that(k >= 1, name, "top_k is ", k, ", expected 1 or more");
  return {.temperature = temperature, .top_k = k};
}
inline SamplingParams top_p_params(double p, double temperature) {
  return {.temperature = temperature, .top_p = p};
}

}  // namespace detail

// ---- greedy -------------------------------------------------------------------------------------

/// ids[r] = lowest index of the largest logit of row r; -1 and a status (where `statuses`, (batch),
/// is given) for a bad row. On a GPU all three are device memory.
template <Device D, typename Ids, typename Logits>
void greedy_sample_into(const D& device, Ids&& ids, const Logits& logits,
                        std::span<SampleStatus> statuses = {},
                        Workspace& workspace = thread_workspace()) {
  const auto view = detail::logits_view("greedy_sample", logits);
  auto out = detail::sampled_ids_view("greedy_sample", ids, view.dimension(0));
  const SamplingParams greedy{.temperature = 0};
  Workspace::Frame frame(workspace);
  const auto problem = detail::sampling_problem(
      "greedy_sample", view, greedy, out.data(),
      detail::checked_statuses("greedy_sample", statuses, view.dimension(0)), frame);
  detail::run(device, problem::GreedySampling<scalar_of<Logits>>{problem}, workspace);
}

/// Returns the ids (batch). Throws std::invalid_argument.
template <CpuDevice D, typename Logits>
Tensor<std::int32_t, 1> greedy_sample(const D& device, const Logits& logits) {
  const auto view = detail::logits_view("greedy_sample", logits);
  std::vector<SampleStatus> statuses(static_cast<std::size_t>(view.dimension(0)));
  Tensor<std::int32_t, 1> ids(view.dimension(0));
  greedy_sample_into(device, ids, view, statuses);
  detail::require_good_rows("greedy_sample", statuses);
  return ids;
}

template <typename Logits>
  requires(!Device<Logits>)
Tensor<std::int32_t, 1> greedy_sample(const Logits& logits) {
  return greedy_sample(Eigen::DefaultDevice{}, logits);
}

// ---- sampling -----------------------------------------------------------------------------------

// In all forms `params` is one SamplingParams for all rows, or a span, vector or array of them,
// one per row. `function` is a stage of your own at SamplingStage::function, compiled into the
// call: logit = function(row, token, logit), all Index but the logit, which is float (double for
// logits of double); -infinity bans a token. It is called in any order and from many threads.
//
//   struct Damped {  // on a GPU: copied there, and __host__ __device__
//     __host__ __device__ float operator()(ef::Index, ef::Index token, float logit) const {
//       return token == 7 ? logit - 2 : logit;
//     }
//   };
//   ef::sample_into(gpu, ids, logits, params, rng, statuses, ef::thread_workspace(), Damped{});
//
// A GPU draws the CPU's tokens where the function gives the CPU's numbers: of a product and a sum
// in one expression compilers make one rounding or two.

/// Draws one token per row into ids (batch), -1 where a row is bad; `statuses`, where given, is
/// (batch). Allocates nothing after the first call at a size. On a GPU ids, logits and statuses are
/// device memory; the parameters, with their lists, and the generators the host's.
template <Device D, typename Ids, typename Logits, detail::SamplingSets Params = SamplingParams>
void sample_into(const D& device, Ids&& ids, const Logits& logits, const Params& params,
                 Generators rng, std::span<SampleStatus> statuses = {},
                 Workspace& workspace = thread_workspace()) {
  detail::sample_into("sample", device, ids, logits, params, rng, statuses, workspace);
}
template <Device D, typename Ids, typename Logits, typename Function,
          detail::SamplingSets Params = SamplingParams>
  requires detail::LogitFunction<Function, Logits>
void sample_into(const D& device, Ids&& ids, const Logits& logits, const Params& params,
                 Generators rng, std::span<SampleStatus> statuses, Workspace& workspace,
                 const Function& function) {
  detail::sample_into("sample", device, ids, logits, params, rng, statuses, workspace, function);
}

/// Draws from the k >= 1 largest of every row at a temperature.
template <Device D, typename Ids, typename Logits>
void top_k_sample_into(const D& device, Ids&& ids, const Logits& logits, Index k,
                       double temperature, Generators rng, std::span<SampleStatus> statuses = {},
                       Workspace& workspace = thread_workspace()) {
  constexpr auto name = "top_k_sample";
  detail::sample_into(name, device, ids, logits, detail::top_k_params(name, k, temperature), rng,
                      statuses, workspace);
}

/// Returns one token per row, (batch). Throws std::invalid_argument for a bad row too.
template <CpuDevice D, typename Logits, detail::SamplingSets Params = SamplingParams>
Tensor<std::int32_t, 1> sample(const D& device, const Logits& logits, const Params& params,
                               Generators rng) {
  return detail::sample("sample", device, logits, params, rng);
}
template <CpuDevice D, typename Logits, typename Function,
          detail::SamplingSets Params = SamplingParams>
  requires detail::LogitFunction<Function, Logits>
Tensor<std::int32_t, 1> sample(const D& device, const Logits& logits, const Params& params,
                               Generators rng, const Function& function) {
  return detail::sample("sample", device, logits, params, rng, function);
}
template <typename Logits, detail::SamplingSets Params = SamplingParams>
  requires(!Device<Logits>)
Tensor<std::int32_t, 1> sample(const Logits& logits, const Params& params, Generators rng) {
  return sample(Eigen::DefaultDevice{}, logits, params, rng);
}
template <typename Logits, typename Function, detail::SamplingSets Params = SamplingParams>
  requires(!Device<Logits> && detail::LogitFunction<Function, Logits>)
Tensor<std::int32_t, 1> sample(const Logits& logits, const Params& params, Generators rng,
                               const Function& function) {
  return sample(Eigen::DefaultDevice{}, logits, params, rng, function);
}

/// sample with {.temperature = temperature, .top_k = k}; k < 1 throws.
template <CpuDevice D, typename Logits>
Tensor<std::int32_t, 1> top_k_sample(const D& device, const Logits& logits, Index k,
                                     double temperature, Generators rng) {
  constexpr auto name = "top_k_sample";
  return detail::sample(name, device, logits, detail::top_k_params(name, k, temperature), rng);
}
template <typename Logits>
  requires(!Device<Logits>)
Tensor<std::int32_t, 1> top_k_sample(const Logits& logits, Index k, double temperature,
                                     Generators rng) {
  return top_k_sample(Eigen::DefaultDevice{}, logits, k, temperature, rng);
}

/// sample with {.temperature = temperature, .top_p = p}.
template <CpuDevice D, typename Logits>
Tensor<std::int32_t, 1> top_p_sample(const D& device, const Logits& logits, double p,
                                     double temperature, Generators rng) {
  return detail::sample("top_p_sample", device, logits, detail::top_p_params(p, temperature), rng);
}
template <typename Logits>
  requires(!Device<Logits>)
Tensor<std::int32_t, 1> top_p_sample(const Logits& logits, double p, double temperature,
                                     Generators rng) {
  return top_p_sample(Eigen::DefaultDevice{}, logits, p, temperature, rng);
}

// ---- the distribution ---------------------------------------------------------------------------

namespace detail {

template <typename D, typename Out, typename Logits, typename Function = problem::NoLogitFunction>
void sampling_probabilities_into(const D& device, Out& probabilities, const Logits& logits,
                                 const SamplingParamsView& params, std::span<SampleStatus> statuses,
                                 Workspace& workspace, const Function& function = {}) {
  constexpr auto name = "sampling_probabilities";
  const auto view = logits_view(name, logits);
  auto out = output_view<2>(probabilities);
  static_assert(std::is_same_v<scalar_of<Out>, float>,
                "eigenformer: sampling probabilities are float");
  require_same_shape(name, "probabilities", out, "logits", view);
  require_no_coin(name, params);
  Workspace::Frame frame(workspace);
  const auto problem =
      sampling_problem(name, view, params, nullptr,
                       checked_statuses(name, statuses, view.dimension(0)), frame, function);
  run_sampling(device, problem::SamplingProbabilities<scalar_of<Logits>>{problem, out.data()},
               function, workspace);
}

template <CpuDevice D, typename Logits, typename Function = problem::NoLogitFunction>
Tensor<float, 2> sampling_probabilities(const D& device, const Logits& logits,
                                        const SamplingParamsView& params,
                                        const Function& function = {}) {
  const auto view = logits_view("sampling_probabilities", logits);
  std::vector<SampleStatus> statuses(static_cast<std::size_t>(view.dimension(0)));
  Tensor<float, 2> probabilities(view.dimension(0), view.dimension(1));
  sampling_probabilities_into(device, probabilities, view, params, statuses, thread_workspace(),
                              function);
  require_good_rows("sampling_probabilities", statuses);
  return probabilities;
}

}  // namespace detail

/// Writes the distribution of every row into probabilities (batch, vocab) of float; a bad row is
/// all zero. Allocates nothing after the first call at a size. On a GPU logits, probabilities and
/// statuses are device memory.
template <Device D, typename Out, typename Logits, detail::SamplingSets Params = SamplingParams>
void sampling_probabilities_into(const D& device, Out&& probabilities, const Logits& logits,
                                 const Params& params, std::span<SampleStatus> statuses = {},
                                 Workspace& workspace = thread_workspace()) {
  detail::sampling_probabilities_into(device, probabilities, logits, params, statuses, workspace);
}
template <Device D, typename Out, typename Logits, typename Function,
          detail::SamplingSets Params = SamplingParams>
  requires detail::LogitFunction<Function, Logits>
void sampling_probabilities_into(const D& device, Out&& probabilities, const Logits& logits,
                                 const Params& params, std::span<SampleStatus> statuses,
                                 Workspace& workspace, const Function& function) {
  detail::sampling_probabilities_into(device, probabilities, logits, params, statuses, workspace,
                                      function);
}

/// Returns what sample draws from, (batch, vocab): 0 for tokens filtered out, one 1 at temperature
/// 0. Throws std::invalid_argument, and for an xtc_probability between 0 and 1: no number is drawn.
template <CpuDevice D, typename Logits, detail::SamplingSets Params = SamplingParams>
Tensor<float, 2> sampling_probabilities(const D& device, const Logits& logits,
                                        const Params& params) {
  return detail::sampling_probabilities(device, logits, params);
}
template <typename Logits, detail::SamplingSets Params = SamplingParams>
  requires(!Device<Logits>)
Tensor<float, 2> sampling_probabilities(const Logits& logits, const Params& params) {
  return detail::sampling_probabilities(Eigen::DefaultDevice{}, logits, params);
}
template <CpuDevice D, typename Logits, typename Function,
          detail::SamplingSets Params = SamplingParams>
  requires detail::LogitFunction<Function, Logits>
Tensor<float, 2> sampling_probabilities(const D& device, const Logits& logits, const Params& params,
                                        const Function& function) {
  return detail::sampling_probabilities(device, logits, params, function);
}
template <typename Logits, typename Function, detail::SamplingSets Params = SamplingParams>
  requires(!Device<Logits> && detail::LogitFunction<Function, Logits>)
Tensor<float, 2> sampling_probabilities(const Logits& logits, const Params& params,
                                        const Function& function) {
  return detail::sampling_probabilities(Eigen::DefaultDevice{}, logits, params, function);
}

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer

#include "sampling/log_probabilities.h"
#include "sampling/speculative.h"
#include "sampling/speculative_tree.h"
