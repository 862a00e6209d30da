/// \file
/// Part of sampling.h, which includes it: log-probabilities beside the draw, and of tokens that are
/// given.
#pragma once

#include "../sampling.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

// ---- of drawn tokens ----------------------------------------------------------------------------

struct LogProbabilityOptions {
  Index best = 0;  ///< number of best tokens reported for a row; at most vocab are
};

/// What sample_with_log_probabilities returns. "Raw" is the log-softmax of the logits as given,
/// before penalties, temperature and filters; "processed" the log of the probability drawn with,
/// -infinity for a token filtered out. Right to a float's rounding, however unlikely or certain the
/// token is.
struct SamplesWithLogProbabilities {
  Tensor<std::int32_t, 1> ids;                   ///< (batch)
  Tensor<float, 1> log_probabilities;            ///< (batch) raw, of the drawn token
  Tensor<float, 1> processed_log_probabilities;  ///< (batch) processed, of the drawn token
  Tensor<std::int32_t, 1>
      ranks;  ///< (batch) 1 + the number of tokens whose raw logit is larger than the drawn one's
  Tensor<std::int32_t, 2>
      best_ids;  ///< (batch, best) the tokens of largest raw logit, best first, equals by index
  Tensor<float, 2> best_log_probabilities;            ///< (batch, best) raw
  Tensor<float, 2> best_processed_log_probabilities;  ///< (batch, best) processed
  std::vector<SampleStatus> statuses;  ///< (batch); where not ok, ids and ranks are -1, numbers NaN
};

/// The same in memory of the caller's, which on a GPU is device memory. best_ids' columns say how
/// many of the best are reported, at most vocab.
struct SampleViews {
  TensorView<std::int32_t, 1> ids;
  TensorView<float, 1> log_probabilities, processed_log_probabilities;
  TensorView<std::int32_t, 1> ranks;
  TensorView<std::int32_t, 2> best_ids;
  TensorView<float, 2> best_log_probabilities, best_processed_log_probabilities;
  std::span<SampleStatus> statuses;
};

namespace detail {

inline SampleViews views_of(SamplesWithLogProbabilities& result, Index batch, Index best) {
  result.ids.resize(batch);
  result.log_probabilities.resize(batch);
  result.processed_log_probabilities.resize(batch);
  result.ranks.resize(batch);
  result.best_ids.resize(batch, best);
  result.best_log_probabilities.resize(batch, best);
  result.best_processed_log_probabilities.resize(batch, best);
  result.statuses.resize(static_cast<std::size_t>(batch));
  return {output_view<1>(result.ids),
          output_view<1>(result.log_probabilities),
          output_view<1>(result.processed_log_probabilities),
          output_view<1>(result.ranks),
          output_view<2>(result.best_ids),
          output_view<2>(result.best_log_probabilities),
          output_view<2>(result.best_processed_log_probabilities),
          result.statuses};
}

inline void check_views(std::string_view name, const SampleViews& result, Index batch,
                        Index vocab) {
  const Index best = result.best_ids.dimension(1);
  require_that(best <= vocab, name, "best_ids has ", best, " columns, logits has ", vocab);
  const auto rows = [&](std::string_view argument, Index size) {
    require_that(size == batch, name, argument, " has ", size, " elements, logits has ", batch,
                 " rows");
  };
  const auto table = [&](std::string_view argument, const auto& view) {
    require_that(view.dimension(0) == batch && view.dimension(1) == best, name, argument,
                 " has shape ", shape_text(view), ", expected (", batch, ", ", best, ")");
  };
  rows("ids", result.ids.size());
  rows("log_probabilities", result.log_probabilities.size());
  rows("processed_log_probabilities", result.processed_log_probabilities.size());
  rows("ranks", result.ranks.size());
  rows("statuses", static_cast<Index>(result.statuses.size()));
  table("best_ids", result.best_ids);
  table("best_log_probabilities", result.best_log_probabilities);
  table("best_processed_log_probabilities", result.best_processed_log_probabilities);
}

/// views(batch, vocab), after all other checks, is where the results go.
template <Device D, typename Logits, typename Views, typename Function = problem::NoLogitFunction>
void sample_with_log_probabilities_into(std::string_view name, const D& device,
                                        const Logits& logits, const SamplingParamsView& params,
                                        Generators& rng, Workspace& workspace, Views&& views,
                                        const Function& function = {}) {
  const auto view = logits_view(name, logits);
  Workspace::Frame frame(workspace);
  auto problem = sampling_problem(name, view, params, nullptr, nullptr, frame, function);
  set_generators(name, problem, rng);
  SampleViews out = views(view.dimension(0), view.dimension(1));
  problem.ids = out.ids.data();
  problem.statuses = out.statuses.data();
  const problem::LogProbabilityOutputs outputs{out.log_probabilities.data(),
                                               out.processed_log_probabilities.data(),
                                               out.ranks.data(),
                                               out.best_ids.dimension(1),
                                               out.best_ids.data(),
                                               out.best_log_probabilities.data(),
                                               out.best_processed_log_probabilities.data()};
  run_sampling(device, problem::SampleWithLogProbabilities<scalar_of<Logits>>{problem, outputs},
               function, workspace);
  rng.advance();
}

template <CpuDevice D, typename Logits, typename Function = problem::NoLogitFunction>
void sample_with_log_probabilities_into(const D& device, SamplesWithLogProbabilities& result,
                                        const Logits& logits, const SamplingParamsView& params,
                                        Generators& rng, const LogProbabilityOptions& options,
                                        Workspace& workspace, const Function& function = {}) {
  constexpr auto name = "sample_with_log_probabilities";
  require_that(options.best >= 0, name, "best is ", options.best, ", expected 0 or more");
  sample_with_log_probabilities_into(
      name, device, logits, params, rng, workspace,
      [&](Index batch, Index vocab) {
        return views_of(result, batch, (std::min)(options.best, vocab));
      },
      function);
}

}  // namespace detail

/// Draws what sample draws and reports log-probabilities, ranks and how each row ended: a bad row
/// gets id -1, NaN and its status in result.statuses, and the others are served. Throws
/// std::invalid_argument for bad arguments. Costs one more read of the logits and one exponential a
/// token. The first _into form writes into a result of an earlier call, which is resized where its
/// sizes differ; it allocates nothing where they do not. The other writes into views, on any
/// device. `function` is sample's: a stage of your own.
///
///   auto drawn = ef::sample_with_log_probabilities(logits, params, rng, {.best = 5});
///   if (drawn.statuses[r] == ef::SampleStatus::ok) text += drawn.ids(r);
template <CpuDevice D, typename Logits, detail::SamplingSets Params = SamplingParams>
void sample_with_log_probabilities_into(const D& device, SamplesWithLogProbabilities& result,
                                        const Logits& logits, const Params& params, Generators rng,
                                        const LogProbabilityOptions& options = {},
                                        Workspace& workspace = thread_workspace()) {
  detail::sample_with_log_probabilities_into(device, result, logits, params, rng, options,
                                             workspace);
}
template <CpuDevice D, typename Logits, typename Function,
          detail::SamplingSets Params = SamplingParams>
  requires detail::LogitFunction<Function, Logits>
void sample_with_log_probabilities_into(const D& device, SamplesWithLogProbabilities& result,
                                        const Logits& logits, const Params& params, Generators rng,
                                        const LogProbabilityOptions& options, Workspace& workspace,
                                        const Function& function) {
  detail::sample_with_log_probabilities_into(device, result, logits, params, rng, options,
                                             workspace, function);
}
template <Device D, typename Logits, detail::SamplingSets Params = SamplingParams>
void sample_with_log_probabilities_into(const D& device, const SampleViews& result,
                                        const Logits& logits, const Params& params, Generators rng,
                                        Workspace& workspace = thread_workspace()) {
  constexpr auto name = "sample_with_log_probabilities";
  detail::sample_with_log_probabilities_into(name, device, logits, params, rng, workspace,
                                             [&](Index batch, Index vocab) {
                                               detail::check_views(name, result, batch, vocab);
                                               return result;
                                             });
}
template <Device D, typename Logits, typename Function,
          detail::SamplingSets Params = SamplingParams>
  requires detail::LogitFunction<Function, Logits>
void sample_with_log_probabilities_into(const D& device, const SampleViews& result,
                                        const Logits& logits, const Params& params, Generators rng,
                                        Workspace& workspace, const Function& function) {
  constexpr auto name = "sample_with_log_probabilities";
  detail::sample_with_log_probabilities_into(
      name, device, logits, params, rng, workspace,
      [&](Index batch, Index vocab) {
        detail::check_views(name, result, batch, vocab);
        return result;
      },
      function);
}
template <CpuDevice D, typename Logits, detail::SamplingSets Params = SamplingParams>
SamplesWithLogProbabilities sample_with_log_probabilities(
    const D& device, const Logits& logits, const Params& params, Generators rng,
    const LogProbabilityOptions& options = {}) {
  SamplesWithLogProbabilities result;
  sample_with_log_probabilities_into(device, result, logits, params, rng, options);
  return result;
}
template <typename Logits, detail::SamplingSets Params = SamplingParams>
  requires(!Device<Logits>)
SamplesWithLogProbabilities sample_with_log_probabilities(
    const Logits& logits, const Params& params, Generators rng,
    const LogProbabilityOptions& options = {}) {
  return sample_with_log_probabilities(Eigen::DefaultDevice{}, logits, params, rng, options);
}

template <CpuDevice D, typename Logits, typename Function,
          detail::SamplingSets Params = SamplingParams>
  requires detail::LogitFunction<Function, Logits>
SamplesWithLogProbabilities sample_with_log_probabilities(const D& device, const Logits& logits,
                                                          const Params& params, Generators rng,
                                                          const LogProbabilityOptions& options,
                                                          const Function& function) {
  SamplesWithLogProbabilities result;
  sample_with_log_probabilities_into(device, result, logits, params, rng, options,
                                     thread_workspace(), function);
  return result;
}
template <typename Logits, typename Function, detail::SamplingSets Params = SamplingParams>
  requires(!Device<Logits> && detail::LogitFunction<Function, Logits>)
SamplesWithLogProbabilities sample_with_log_probabilities(const Logits& logits,
                                                          const Params& params, Generators rng,
                                                          const LogProbabilityOptions& options,
                                                          const Function& function) {
  return sample_with_log_probabilities(Eigen::DefaultDevice{}, logits, params, rng, options,
                                       function);
}

// ---- of given tokens ----------------------------------------------------------------------------

namespace detail {

template <Device D, typename Tokens>
std::span<const std::int32_t> given_tokens(std::string_view name, const Tokens& tokens, Index batch,
                                           [[maybe_unused]] Index vocab) {
  std::span<const std::int32_t> given;
  if constexpr (std::is_convertible_v<const Tokens&, std::span<const std::int32_t>>) {
    given = tokens;
  } else {
    static_assert(std::is_same_v<scalar_of<Tokens>, std::int32_t>,
                  "eigenformer: token ids are std::int32_t");
    const auto view = input_view<1>(tokens);
    given = {view.data(), static_cast<std::size_t>(view.size())};
  }
  require_that(static_cast<Index>(given.size()) == batch, name, "tokens has ", given.size(),
               " elements, logits has ", batch, " rows");
  if constexpr (host_readable<D>)
    for (std::size_t r = 0; r < given.size(); ++r)
      require_that(given[r] >= -1 && given[r] < vocab, name, "tokens[", r, "] is ", given[r],
                   ", expected a token in [0, ", vocab, "), or -1 for none");
  return given;
}

template <Device D, typename Out, typename Logits, typename Tokens,
          typename Function = problem::NoLogitFunction>
void log_probabilities_of_into(const D& device, Out& log_probabilities, const Logits& logits,
                               const Tokens& tokens, const SamplingParamsView& params,
                               std::span<SampleStatus> statuses, Workspace& workspace,
                               const Function& function = {}) {
  constexpr auto name = "log_probabilities_of";
  const auto view = logits_view(name, logits);
  auto output = output_view<1>(log_probabilities);
  static_assert(std::is_same_v<scalar_of<Out>, float>, "eigenformer: log-probabilities are float");
  const Index batch = view.dimension(0);
  require_that(output.dimension(0) == batch, name, "log_probabilities has ", output.dimension(0),
               " elements, logits has ", batch, " rows");
  Workspace::Frame frame(workspace);
  require_no_coin(name, params);
  const auto problem = sampling_problem(name, view, params, nullptr,
                                        checked_statuses(name, statuses, batch), frame, function);
  const auto given = given_tokens<D>(name, tokens, batch, view.dimension(1));
  run_sampling(device,
               problem::LogProbabilitiesOf<scalar_of<Logits>>{problem, given.data(), output.data()},
               function, workspace);
}

template <CpuDevice D, typename Logits, typename Tokens,
          typename Function = problem::NoLogitFunction>
Tensor<float, 1> log_probabilities_of(const D& device, const Logits& logits, const Tokens& tokens,
                                      const SamplingParamsView& params,
                                      const Function& function = {}) {
  const auto view = logits_view("log_probabilities_of", logits);
  std::vector<SampleStatus> statuses(static_cast<std::size_t>(view.dimension(0)));
  Tensor<float, 1> result(view.dimension(0));
  log_probabilities_of_into(device, result, view, tokens, params, statuses, thread_workspace(),
                            function);
  require_good_rows("log_probabilities_of", statuses);
  return result;
}

}  // namespace detail

/// The form below, into log_probabilities (batch) of float, NaN where a row is bad; `statuses`,
/// where given, is (batch). Allocates nothing after the first call at a size. On a GPU tokens and
/// statuses are device memory, and a token out of range gives NaN.
template <Device D, typename Out, typename Logits, typename Tokens,
          detail::SamplingSets Params = SamplingParams>
void log_probabilities_of_into(const D& device, Out&& log_probabilities, const Logits& logits,
                               const Tokens& tokens, const Params& params = {},
                               std::span<SampleStatus> statuses = {},
                               Workspace& workspace = thread_workspace()) {
  detail::log_probabilities_of_into(device, log_probabilities, logits, tokens, params, statuses,
                                    workspace);
}
template <Device D, typename Out, typename Logits, typename Tokens, typename Function,
          detail::SamplingSets Params = SamplingParams>
  requires detail::LogitFunction<Function, Logits>
void log_probabilities_of_into(const D& device, Out&& log_probabilities, const Logits& logits,
                               const Tokens& tokens, const Params& params,
                               std::span<SampleStatus> statuses, Workspace& workspace,
                               const Function& function) {
  detail::log_probabilities_of_into(device, log_probabilities, logits, tokens, params, statuses,
                                    workspace, function);
}

/// The log-probability of one given token for each row: of the next tokens of a prompt or an answer
/// that is scored, of drafts that were verified.
///
///   log p(token) = (x_token - max x) - log(sum over v of exp(x_v - max x))   x: logits of the row
///
/// With parameters (one set, or one for each row) the log of the probability that sample draws the
/// token with (sampling_probabilities), -infinity where it is filtered out; without, the
/// log-softmax of the logits as given. Computed in double: right to a float's rounding, however
/// unlikely or certain the token is.
///
///   logits   (batch, vocab)
///   tokens   (batch) std::int32_t, a tensor, std::vector or std::span; -1, which stands where
///            sample_into and verify_speculative have no token, gives 0 whatever the row holds
///   result   (batch) float
///
///   auto scores = ef::log_probabilities_of(logits, next_tokens);           // raw
///   auto scores = ef::log_probabilities_of(logits, tokens, params);        // processed
///   auto scores = ef::log_probabilities_of(logits, tokens, params, function);    // sample's
///
/// A bad row (see sampling.h) throws std::invalid_argument naming it; the _into form writes NaN and
/// a status and serves the others. std::invalid_argument too for sizes that differ and tokens out
/// of range, and for an xtc_probability between 0 and 1. Costs two reads of the logits and one
/// exponential per token.
template <CpuDevice D, typename Logits, typename Tokens,
          detail::SamplingSets Params = SamplingParams>
Tensor<float, 1> log_probabilities_of(const D& device, const Logits& logits, const Tokens& tokens,
                                      const Params& params = {}) {
  return detail::log_probabilities_of(device, logits, tokens, params);
}
template <CpuDevice D, typename Logits, typename Tokens, typename Function,
          detail::SamplingSets Params = SamplingParams>
  requires detail::LogitFunction<Function, Logits>
Tensor<float, 1> log_probabilities_of(const D& device, const Logits& logits, const Tokens& tokens,
                                      const Params& params, const Function& function) {
  return detail::log_probabilities_of(device, logits, tokens, params, function);
}
template <typename Logits, typename Tokens, detail::SamplingSets Params = SamplingParams>
  requires(!Device<Logits>)
Tensor<float, 1> log_probabilities_of(const Logits& logits, const Tokens& tokens,
                                      const Params& params = {}) {
  return log_probabilities_of(Eigen::DefaultDevice{}, logits, tokens, params);
}
template <typename Logits, typename Tokens, typename Function,
          detail::SamplingSets Params = SamplingParams>
  requires(!Device<Logits> && detail::LogitFunction<Function, Logits>)
Tensor<float, 1> log_probabilities_of(const Logits& logits, const Tokens& tokens,
                                      const Params& params, const Function& function) {
  return detail::log_probabilities_of(Eigen::DefaultDevice{}, logits, tokens, params, function);
}

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
