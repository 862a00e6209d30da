/// \file
/// Part of tensor_parallel.h, which includes it: log-probabilities of a language-model head whose
/// rows are divided among ranks.
#pragma once

#include "../sampling/log_probabilities.h"
#include "device_scores.h"
#include "divided_scores.h"
#include "vocabulary_sample.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

/// Draws and scores, into memory of the host; `out.best` best tokens.
template <CpuDevice D, typename T, typename C>
void score_divided_draws(const D& device, const problem::Sampling<T>& sampling, T* logits,
                         const problem::LogProbabilityOutputs& out, C& communicator,
                         Workspace& workspace) {
  using S = compute_type<T>;
  constexpr float nan = std::numeric_limits<float>::quiet_NaN();
  const Index rows = sampling.batch, n = out.best;
  Workspace::Frame frame(workspace);
  auto divided = divide_rows(device, sampling, logits, communicator, workspace, frame);
  const auto gathered = settle_rows_and_gather(device, divided, frame);
  draw_from_shards(device, divided);
  const auto scores = score_shards(device, divided, n, frame);
  for (Index i = 0; i < rows * n; ++i)
    out.best_ids[i] = static_cast<std::int32_t>(scores.best[i].token);
  std::int32_t* const tokens = sampling.ids;
  for (Index r = 0; r < rows; ++r) tokens[r] = divided.rows[static_cast<std::size_t>(r)].token;
  for_each_row_of_candidates(divided, gathered, [&](Index r, auto row) {
    row.ids = tokens + r;
    detail::run(device,
                problem::ScoreTokens<S>{row, out.best_ids + r * n, n, out.processed + r,
                                        out.best_processed + r * n},
                workspace);
  });
  const double* const drawn =
      numbers_of_tokens(divided, tokens, 2, frame, [&](Index r, Index place, double* numbers) {
        numbers[0] = static_cast<double>(divided.given[r * divided.shard.shard.size() + place]);
        numbers[1] = logit_in_play(divided.shard, divided.asked[r], r, place);
      });
  double *const given = frame.take<double>(rows), *const above = frame.take<double>(rows);
  for (Index r = 0; r < rows; ++r) given[r] = drawn[2 * r];
  detail::run(
      device,
      problem::RankInShard<T>{divided.given, rows, divided.shard.shard.size(), given, above},
      workspace);
  const ShardAnswers ranks = divided.exchange(above, 1, frame);
  for (Index r = 0; r < rows; ++r) {
    const DividedRow& row = divided.rows[static_cast<std::size_t>(r)];
    if (sampling.statuses != nullptr) sampling.statuses[r] = row.status;
    out.rank[r] = static_cast<std::int32_t>(1 + ranks.sum(r, 0));
    if (row.end != RowEnd::bad) continue;
    out.raw[r] = out.processed[r] = nan;
    out.rank[r] = -1;
    std::fill(out.best_ids + r * n, out.best_ids + (r + 1) * n, -1);
    std::fill(out.best_raw + r * n, out.best_raw + (r + 1) * n, nan);
    std::fill(out.best_processed + r * n, out.best_processed + (r + 1) * n, nan);
  }
  write_scores(device, divided, scores,
               [&](Index r, const LogTotal& of_given, const LogTotal& in_play) {
                 const DividedRow& row = divided.rows[static_cast<std::size_t>(r)];
                 const auto& asked = divided.asked[r];
                 const S best = static_cast<S>(row.given_best);
                 bool certain = true;
                 out.raw[r] = of_given.of(static_cast<S>(drawn[2 * r]), best, 1.0, certain);
                 for (Index i = r * n; i < (r + 1) * n; ++i)
                   out.best_raw[i] = of_given.of(scores.best[i].given, best, 1.0, certain);
                 if (row.end != RowEnd::drawn) return certain;
                 const auto score = [&](S logit) {
                   return in_play.of(logit, asked.band.hi, asked.inverse_temperature, certain);
                 };
                 out.processed[r] = score(static_cast<S>(drawn[2 * r + 1]));
                 for (Index i = r * n; i < (r + 1) * n; ++i)
                   out.best_processed[i] = score(scores.best[i].logit);
                 return certain;
               });
}

/// output[r] = log-probability of tokens[r], all memory of the host.
template <CpuDevice D, typename T, typename C>
void score_divided_tokens(const D& device, const problem::Sampling<T>& sampling, T* logits,
                          const std::int32_t* tokens, float* output, C& communicator,
                          Workspace& workspace) {
  using S = compute_type<T>;
  const Index rows = sampling.batch;
  Workspace::Frame frame(workspace);
  auto divided = divide_rows(device, sampling, logits, communicator, workspace, frame);
  const auto gathered = settle_rows_and_gather(device, divided, frame);
  const auto scores = score_shards(device, divided, -1, frame);
  for_each_row_of_candidates(divided, gathered, [&](Index r, auto row) {
    const std::int32_t token = (std::max)(tokens[r], 0);
    detail::run(device, problem::ScoreTokens<S>{row, &token, 1, nullptr, output + r}, workspace);
  });
  const double* const found =
      numbers_of_tokens(divided, tokens, 1, frame, [&](Index r, Index place, double* number) {
        *number = logit_in_play(divided.shard, divided.asked[r], r, place);
      });
  for (Index r = 0; r < rows; ++r) {
    DividedRow& row = divided.rows[static_cast<std::size_t>(r)];
    if (tokens[r] < 0) {
      row.end = RowEnd::bad;
      row.status = SampleStatus::ok;
      output[r] = 0;
    } else if (row.end == RowEnd::bad) {
      output[r] = std::numeric_limits<float>::quiet_NaN();
    }
    sampling.finish(r, -1, row.status);
  }
  write_scores(device, divided, scores, [&](Index r, const LogTotal&, const LogTotal& in_play) {
    const auto& asked = divided.asked[r];
    bool certain = true;
    if (divided.rows[static_cast<std::size_t>(r)].end == RowEnd::drawn)
      output[r] =
          in_play.of(static_cast<S>(found[r]), asked.band.hi, asked.inverse_temperature, certain);
    return certain;
  });
}

/// views(rows, vocab), after all other checks, is where the results go.
template <Device D, typename Hidden, typename Weight, typename C, typename Views,
          typename Function = problem::NoLogitFunction>
void vocabulary_parallel_sample_with_log_probabilities_into(const D& device, const Hidden& hidden,
                                                            const Weight& weight, C& communicator,
                                                            const SamplingParamsView& params,
                                                            Generators& rng, Workspace& workspace,
                                                            Views&& views,
                                                            const Function& function = {}) {
  constexpr auto name = "vocabulary_parallel_sample_with_log_probabilities";
  using T = typename layer_result<scalar_of<Hidden>, Weight>::type;
  const auto x = input_view<2>(hidden);
  const ParallelShape shape = vocabulary_shape(name, x, weight, communicator, x.dimension(0), 0);
  const Index rows = shape.tokens;
  Workspace::Frame frame(workspace);
  auto sampling = divided_sampling<T>(name, rows, shape.out, params, {}, frame, function);
  set_generators(name, sampling, rng);
  SampleViews result = views(rows, shape.out);
  const Index best = result.best_ids.dimension(1);
  sampling.ids = frame.take<std::int32_t>(rows);
  sampling.statuses = frame.take<SampleStatus>(rows);
  const problem::LogProbabilityOutputs out{frame.take<float>(rows),
                                           frame.take<float>(rows),
                                           frame.take<std::int32_t>(rows),
                                           best,
                                           frame.take<std::int32_t>(rows * best),
                                           frame.take<float>(rows * best),
                                           frame.take<float>(rows * best)};
  if (rows > 0)
    with_shard_on_host<D, T>(
        name, device, x, weight, shape, communicator, workspace,
        [&](const auto* logits) {
          return score_draws_on_device(device, sampling, logits, out, communicator, workspace);
        },
        [&](const auto& host, T* logits) {
          score_divided_draws(host, sampling, logits, out, communicator, workspace);
        });
  const auto give = [&](auto* to, const auto* from, Index count) {
    memory_of(device).copy_in(to, from, static_cast<std::size_t>(count) * sizeof(*from));
  };
  give(result.ids.data(), sampling.ids, rows);
  give(result.statuses.data(), sampling.statuses, rows);
  give(result.log_probabilities.data(), out.raw, rows);
  give(result.processed_log_probabilities.data(), out.processed, rows);
  give(result.ranks.data(), out.rank, rows);
  give(result.best_ids.data(), out.best_ids, rows * best);
  give(result.best_log_probabilities.data(), out.best_raw, rows * best);
  give(result.best_processed_log_probabilities.data(), out.best_processed, rows * best);
  rng.advance();
}

template <Device D, typename Out, typename Hidden, typename Weight, typename C, typename Tokens,
          typename Function = problem::NoLogitFunction>
void vocabulary_parallel_log_probabilities_of_into(
    const D& device, Out& log_probabilities, const Hidden& hidden, const Weight& weight,
    C& communicator, const Tokens& tokens, const SamplingParamsView& params,
    std::span<SampleStatus> statuses, Workspace& workspace, const Function& function = {}) {
  constexpr auto name = "vocabulary_parallel_log_probabilities_of";
  using T = typename layer_result<scalar_of<Hidden>, Weight>::type;
  static_assert(std::is_same_v<scalar_of<Out>, float>, "eigenformer: log-probabilities are float");
  const auto x = input_view<2>(hidden);
  auto output = output_view<1>(log_probabilities);
  const Index rows = x.dimension(0);
  const auto shape = vocabulary_shape(name, x, weight, communicator, rows, statuses.size());
  require_that(output.dimension(0) == rows, name, "log_probabilities has ", output.dimension(0),
               " elements, hidden has ", rows, " rows");
  Workspace::Frame frame(workspace);
  require_no_coin(name, params);
  const auto sampling =
      divided_sampling<T>(name, rows, shape.out, params, statuses, frame, function);
  const auto given = given_tokens<Eigen::DefaultDevice>(name, tokens, rows, shape.out);
  if (rows == 0) return;
  float* const scores = frame.take<float>(rows);
  with_shard_on_host<D, T>(
      name, device, x, weight, shape, communicator, workspace,
      [&](const auto* logits) {
        return score_tokens_on_device(device, sampling, logits, given.data(), scores, communicator,
                                      workspace);
      },
      [&](const auto& host, T* logits) {
        score_divided_tokens(host, sampling, logits, given.data(), scores, communicator, workspace);
      });
  memory_of(device).copy_in(output.data(), scores, static_cast<std::size_t>(rows) * sizeof(float));
}

}  // namespace detail

/// What sample_with_log_probabilities (sampling/log_probabilities.h) gives for the rows of
/// linear(hidden, weight), bit for bit, the same on every rank: the tokens of
/// vocabulary_parallel_sample, their log-probabilities as given and in the distribution drawn from,
/// their ranks, and the best tokens of a row with both. Parameters, generators and `weight` as for
/// vocabulary_parallel_sample. Beside its bytes, 56 travel for a row and rank, 12 for each of a
/// rank's best tokens (24 for logits of double), and two block sums where those of ranks leave the
/// last bit of a score open, by estimate 2 in 10^5. A bad row has id -1, NaN and its status. The
/// first _into form writes into a result of an earlier call, the other into views, on a GPU of its
/// memory, `statuses` too; both allocate as vocabulary_parallel_sample_into. Rows that stay on a
/// GPU are scored there, by 128 for each of three questions, a row and a rank, and 16 for each best
/// token, unless the sums of ranks leave a bit open.
///
///   auto drawn = ef::vocabulary_parallel_sample_with_log_probabilities(
///       hidden, head, communicator, params, rng, {.best = 5});
template <CpuDevice D, typename Hidden, typename Weight, Communicator C,
          detail::SamplingSets Params = SamplingParams>
void vocabulary_parallel_sample_with_log_probabilities_into(
    const D& device, SamplesWithLogProbabilities& result, const Hidden& hidden,
    const Weight& weight, C& communicator, const Params& params, Generators rng,
    const LogProbabilityOptions& options = {}, Workspace& workspace = thread_workspace()) {
  detail::require_that(options.best >= 0, "vocabulary_parallel_sample_with_log_probabilities",
                       "best is ", options.best, ", expected 0 or more");
  detail::vocabulary_parallel_sample_with_log_probabilities_into(
      device, hidden, weight, communicator, params, rng, workspace, [&](Index rows, Index vocab) {
        return detail::views_of(result, rows, (std::min)(options.best, vocab));
      });
}
template <Device D, typename Hidden, typename Weight, Communicator C,
          detail::SamplingSets Params = SamplingParams>
void vocabulary_parallel_sample_with_log_probabilities_into(
    const D& device, const SampleViews& result, const Hidden& hidden, const Weight& weight,
    C& communicator, const Params& params, Generators rng,
    Workspace& workspace = thread_workspace()) {
  detail::vocabulary_parallel_sample_with_log_probabilities_into(
      device, hidden, weight, communicator, params, rng, workspace, [&](Index rows, Index vocab) {
        detail::check_views("vocabulary_parallel_sample_with_log_probabilities", result, rows,
                            vocab);
        return result;
      });
}
template <Device D, typename Hidden, typename Weight, Communicator C, typename Function,
          detail::SamplingSets Params = SamplingParams>
  requires detail::LogitFunction<Function, Hidden>
void vocabulary_parallel_sample_with_log_probabilities_into(
    const D& device, const SampleViews& result, const Hidden& hidden, const Weight& weight,
    C& communicator, const Params& params, Generators rng, Workspace& workspace,
    const Function& function) {
  detail::vocabulary_parallel_sample_with_log_probabilities_into(
      device, hidden, weight, communicator, params, rng, workspace,
      [&](Index rows, Index vocab) {
        detail::check_views("vocabulary_parallel_sample_with_log_probabilities", result, rows,
                            vocab);
        return result;
      },
      function);
}
template <CpuDevice D, typename Hidden, typename Weight, Communicator C,
          detail::SamplingSets Params = SamplingParams>
SamplesWithLogProbabilities vocabulary_parallel_sample_with_log_probabilities(
    const D& device, const Hidden& hidden, const Weight& weight, C& communicator,
    const Params& params, Generators rng, const LogProbabilityOptions& options = {}) {
  SamplesWithLogProbabilities result;
  vocabulary_parallel_sample_with_log_probabilities_into(device, result, hidden, weight,
                                                         communicator, params, rng, options);
  return result;
}
template <typename Hidden, typename Weight, Communicator C,
          detail::SamplingSets Params = SamplingParams>
  requires(!Device<Hidden>)
SamplesWithLogProbabilities vocabulary_parallel_sample_with_log_probabilities(
    const Hidden& hidden, const Weight& weight, C& communicator, const Params& params,
    Generators rng, const LogProbabilityOptions& options = {}) {
  return vocabulary_parallel_sample_with_log_probabilities(Eigen::DefaultDevice{}, hidden, weight,
                                                           communicator, params, rng, options);
}

/// The form below, into log_probabilities (tokens) of float, NaN where a row is bad, and
/// `statuses`, (tokens), where given. On a GPU log_probabilities are its memory, tokens and
/// statuses the host's. Allocates as vocabulary_parallel_sample_into.
template <Device D, typename Out, typename Hidden, typename Weight, Communicator C, typename Tokens,
          detail::SamplingSets Params = SamplingParams>
void vocabulary_parallel_log_probabilities_of_into(const D& device, Out&& log_probabilities,
                                                   const Hidden& hidden, const Weight& weight,
                                                   C& communicator, const Tokens& tokens,
                                                   const Params& params = {},
                                                   std::span<SampleStatus> statuses = {},
                                                   Workspace& workspace = thread_workspace()) {
  detail::vocabulary_parallel_log_probabilities_of_into(
      device, log_probabilities, hidden, weight, communicator, tokens, params, statuses, workspace);
}
template <Device D, typename Out, typename Hidden, typename Weight, Communicator C, typename Tokens,
          typename Function, detail::SamplingSets Params = SamplingParams>
  requires detail::LogitFunction<Function, Hidden>
void vocabulary_parallel_log_probabilities_of_into(const D& device, Out&& log_probabilities,
                                                   const Hidden& hidden, const Weight& weight,
                                                   C& communicator, const Tokens& tokens,
                                                   const Params& params,
                                                   std::span<SampleStatus> statuses,
                                                   Workspace& workspace, const Function& function) {
  detail::vocabulary_parallel_log_probabilities_of_into(device, log_probabilities, hidden, weight,
                                                        communicator, tokens, params, statuses,
                                                        workspace, function);
}

/// log_probabilities_of (sampling/log_probabilities.h) of the rows of linear(hidden, weight), bit
/// for bit, the same on every rank: of one given token for each row, as given or, with parameters,
/// in the distribution drawn from; 0 for token -1. Bytes as for vocabulary_parallel_sample, and 40
/// for a row and rank. A bad row throws std::invalid_argument naming it.
///
///   auto scores = ef::vocabulary_parallel_log_probabilities_of(hidden, head, communicator, next);
template <CpuDevice D, typename Hidden, typename Weight, Communicator C, typename Tokens,
          detail::SamplingSets Params = SamplingParams>
Tensor<float, 1> vocabulary_parallel_log_probabilities_of(const D& device, const Hidden& hidden,
                                                          const Weight& weight, C& communicator,
                                                          const Tokens& tokens,
                                                          const Params& params = {}) {
  const Index rows = input_view<2>(hidden).dimension(0);
  std::vector<SampleStatus> statuses(static_cast<std::size_t>(rows));
  Tensor<float, 1> result(rows);
  vocabulary_parallel_log_probabilities_of_into(device, result, hidden, weight, communicator,
                                                tokens, params, statuses);
  detail::require_good_rows("vocabulary_parallel_log_probabilities_of", statuses);
  return result;
}
template <typename Hidden, typename Weight, Communicator C, typename Tokens,
          detail::SamplingSets Params = SamplingParams>
  requires(!Device<Hidden>)
Tensor<float, 1> vocabulary_parallel_log_probabilities_of(const Hidden& hidden,
                                                          const Weight& weight, C& communicator,
                                                          const Tokens& tokens,
                                                          const Params& params = {}) {
  return vocabulary_parallel_log_probabilities_of(Eigen::DefaultDevice{}, hidden, weight,
                                                  communicator, tokens, params);
}

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
