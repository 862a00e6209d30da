/// \file
/// Part of tensor_parallel.h, which includes it: tokens drawn from a language-model head whose rows
/// are divided among ranks, with any parameters.
#pragma once

#include <algorithm>
#include <limits>

#include "../core/row_function.h"
#include "../sampling.h"
#include "device_rows.h"
#include "divided_ends.h"
#include "vocabulary.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

/// How many of the best tokens of a row decide all that its stages look at; 0 where other tokens
/// do, too.
inline Index deciding_tokens(const problem::RowParams& params) {
  for (const SamplingStage stage : params.order) {
    if (stage == SamplingStage::temperature && params.dynatemp_range == 0) {
      if (params.temperature == 0) return 1;
    } else {
      const bool keeps_k =
          stage == SamplingStage::top_k && params.top_k_ties == TopKTies::lowest_index;
      return keeps_k ? params.top_k : 0;
    }
  }
  return 0;
}

/// Writes a candidate, or what is wrong with its shard, into a row of -infinity.
template <typename C>
void put_candidate(const problem::VocabularyCandidate& candidate, C* row) {
  using Candidate = problem::VocabularyCandidate;
  if (candidate.token >= 0) row[candidate.token] = static_cast<C>(candidate.logit);
  if (candidate.token == Candidate::kNan) row[0] = std::numeric_limits<C>::quiet_NaN();
  if (candidate.token == Candidate::kInfinity && !(row[0] != row[0]))
    row[0] = std::numeric_limits<C>::infinity();
}

/// This rank's logits, in memory of the host: body(sampling device, logits); on a GPU unless
/// there(logits) says that all was done where they are.
template <Device D, typename T, typename X, typename Weight, typename C, typename There,
          typename Body>
void with_shard_on_host(std::string_view name, const D& device, const X& x, const Weight& weight,
                        const ParallelShape& shape, const C& communicator, Workspace& workspace,
                        [[maybe_unused]] There&& there, Body&& body) {
  const Index size = shape.tokens * shape.columns.size();
  auto logits_frame = tensor_frame(device, workspace);
  T* const logits = logits_frame.template take<T>(size);
  shard_product(device, logits, x, weight, shape, communicator, workspace);
  if constexpr (CpuDevice<D>) {
    body(device, logits);
  } else if (!there(logits)) {
    Workspace::Frame frame(workspace);
    T* const host = frame.take<T>(size);
    if (size > 0) to_host(device, name.data(), host, logits, size);
    body(Eigen::DefaultDevice{}, host);
  }
}

/// Samples rows of which the best `most` tokens decide all: their candidates are found where the
/// logits are. `sampling`, whose ids are the host's, is of the whole vocabulary.
template <Device D, typename T, typename C>
void sample_best_candidates(const D& device, const problem::Sampling<T>& sampling, const T* logits,
                            Index most, C& communicator, Workspace& workspace) {
  using Candidate = problem::VocabularyCandidate;
  using Token = decltype(Candidate::token);
  using S = compute_type<T>;
  const Index rows = sampling.batch, vocab = sampling.vocab;
  Workspace::Frame frame(workspace);
  const auto gathered =
      gather_best_candidates(device, logits, rows, vocab, most, communicator, frame);
  constexpr S none = -std::numeric_limits<S>::infinity();
  S* const row = frame.take<S>(vocab);
  std::fill(row, row + vocab, none);
  for (Index r = 0; r < rows; ++r) {
    gathered.for_each(r, [&](const Candidate& candidate) { put_candidate(candidate, row); });
    problem::Sampling<S> one{row,
                             1,
                             vocab,
                             &sampling.params_of(r),
                             0,
                             sampling.generators,
                             sampling.generators_stride,
                             sampling.ids + r,
                             sampling.statuses == nullptr ? nullptr : sampling.statuses + r};
    one.first_row = r;
    detail::run(Eigen::DefaultDevice{}, one, workspace);
    gathered.for_each(
        r, [&](const Candidate& candidate) { row[(std::max)(candidate.token, Token{0})] = none; });
  }
}

/// A request for rows of `vocab` logits, which are divided.
template <typename T, typename Function>
problem::Sampling<T> divided_sampling(std::string_view name, Index rows, Index vocab,
                                      const SamplingParamsView& params,
                                      std::span<SampleStatus> statuses, Workspace::Frame& frame,
                                      const Function& function) {
  auto sampling =
      sampling_problem(name, TensorView<const T, 2>(nullptr, rows, vocab), params, nullptr,
                       statuses.empty() ? nullptr : statuses.data(), frame, function);
  if constexpr (problem::is_logit_function<Function>)
    sampling.function = {row_function<compute_type<T>, Function>(), &function};
  return sampling;
}

/// Samples rows that are divided, in the host's memory.
template <CpuDevice D, typename T, typename C>
void sample_divided_rows(const D& device, const problem::Sampling<T>& sampling, T* logits,
                         C& communicator, Workspace& workspace) {
  Workspace::Frame frame(workspace);
  auto divided = divide_rows(device, sampling, logits, communicator, workspace, frame);
  const auto gathered = settle_rows_and_gather(device, divided, frame);
  draw_from_shards(device, divided);
  const auto draw = [&](Index r, auto row) {
    row.ids = sampling.ids + r;
    row.statuses = sampling.statuses == nullptr ? nullptr : sampling.statuses + r;
    detail::run(device, row, workspace);
  };
  for (Index r = 0; r < sampling.batch; ++r) {
    const DividedRow& row = divided.rows[static_cast<std::size_t>(r)];
    if (row.end == RowEnd::drawn || row.end == RowEnd::bad)
      sampling.finish(r, row.token, row.status);
  }
  for_each_row_of_candidates(divided, gathered, draw);
}

template <Device D, typename Ids, typename Hidden, typename Weight, typename C,
          typename Function = problem::NoLogitFunction>
void vocabulary_parallel_sample_into(std::string_view name, const D& device, Ids& ids,
                                     const Hidden& hidden, const Weight& weight, C& communicator,
                                     const SamplingParamsView& params, const Generators& rng,
                                     std::span<SampleStatus> statuses, Workspace& workspace,
                                     const Function& function = {}) {
  using T = typename layer_result<scalar_of<Hidden>, Weight>::type;
  static_assert(std::is_same_v<scalar_of<Ids>, std::int32_t>,
                "eigenformer: token ids are std::int32_t");
  const auto x = input_view<2>(hidden);
  auto out = output_view<1>(ids);
  const ParallelShape shape =
      vocabulary_shape(name, x, weight, communicator, out.dimension(0), statuses.size());
  const Index rows = shape.tokens;
  Workspace::Frame frame(workspace);
  auto sampling = divided_sampling<T>(name, rows, shape.out, params, statuses, frame, function);
  set_generators(name, sampling, rng);
  if (rows == 0) return;
  sampling.ids = frame.take<std::int32_t>(rows);
  with_shard_on_host<D, T>(
      name, device, x, weight, shape, communicator, workspace,
      [&](const auto* logits) {
        Index most = 1;
        for (Index r = 0; r < rows && most > 0; ++r) {
          const Index deciding = deciding_tokens(sampling.params_of(r));
          most = deciding == 0 ? 0 : (std::max)(most, deciding);
        }
        if (most == 0) return sample_on_device(device, sampling, logits, communicator, workspace);
        sample_best_candidates(device, sampling, logits, most, communicator, workspace);
        return true;
      },
      [&](const auto& host, T* logits) {
        sample_divided_rows(host, sampling, logits, communicator, workspace);
      });
  memory_of(device).copy_in(out.data(), sampling.ids,
                            static_cast<std::size_t>(rows) * sizeof(std::int32_t));
}

template <CpuDevice D, typename Hidden, typename Weight, typename C,
          typename Function = problem::NoLogitFunction>
Tensor<std::int32_t, 1> vocabulary_parallel_sample(const D& device, const Hidden& hidden,
                                                   const Weight& weight, C& communicator,
                                                   const SamplingParamsView& params,
                                                   Generators& rng, const Function& function = {}) {
  constexpr auto name = "vocabulary_parallel_sample";
  auto ids =
      good_vocabulary_tokens(name, hidden, [&](auto& tokens, std::span<SampleStatus> statuses) {
        vocabulary_parallel_sample_into(name, device, tokens, hidden, weight, communicator, params,
                                        rng, statuses, thread_workspace(), function);
      });
  rng.advance();
  return ids;
}

/// sample with {.temperature = temperature, .top_k = k}; leaves the generator where it is.
template <Device D, typename Ids, typename Hidden, typename Weight, typename C>
void vocabulary_parallel_top_k_sample_into(const D& device, Ids& ids, const Hidden& hidden,
                                           const Weight& weight, C& communicator, Index k,
                                           float temperature, const Generators& rng,
                                           std::span<SampleStatus> statuses, Workspace& workspace) {
  constexpr auto name = "vocabulary_parallel_top_k_sample";
  require_that(k >= 1, name, "k is ", k, ", expected 1 or more");
  const SamplingParams params{.temperature = temperature, .top_k = k};
  vocabulary_parallel_sample_into(name, device, ids, hidden, weight, communicator, params, rng,
                                  statuses, workspace);
}

}  // namespace detail

/// A token of each row of hidden states (tokens, in): what sample draws from linear(hidden, weight)
/// with these parameters and generators, bit for bit, the same on every rank. Parameters (one set,
/// or one for each row) and generators are the same on every rank, too. `weight` is the full
/// (vocab, in) head or a PackedColumnShard.
///
/// All chains of stages are served, and the logits stay where they are. What travels, bytes of a
/// row that every rank holds in the end (logits of double: twice the candidates; P ranks):
///
///   every row                    32 P: the largest logits; on a GPU, with top-k, nothing
///   guidance, penalties on       16 P and, for each log of a sum, 24 P and a block sum
///   log-probabilities
///   top_k, temperature 0         8 for each of the k best of every rank (on a GPU 16), where all
///                                ranks' are at most an eighth of the vocabulary
///   no filter                    20 P: sums and a token; where the errors of float sums leave it
///                                open, some draws in 100 of flat rows, a block sum and 4 P
///   min_p, epsilon_cutoff,       16 to 72 P of sums
///   eta_cutoff, top_n_sigma,
///   mirostat 2, XTC
///   top_p                        560 P of sums, and 4 for each token whose logit is near that of
///                                the last token kept: a twentieth of all where they are flat,
///                                fewer elsewhere. Of logits of double, of a vocabulary below 8192,
///                                and where the errors of float sums leave the last token open,
///                                1024 P
///   typical_p, top_h, a dynamic  24 P and two block sums
///   temperature
///   mirostat 1                   800 P: the best 100 of every rank
///   searches                     16 to 40 P, and 1024 P for each of, mostly, 2 to 5 rounds
///
/// A block sum is 8 for each block of 128 tokens, and for each token of blocks that ranks share.
/// The end of a set is searched for of typical_p and top_h; of top_p by 1024 P, where it keeps more
/// than an eighth of the vocabulary; of top_k and of min_tokens_to_keep where these are more, or
/// equals of the last stay (of at most 128 tokens 8 P for each, and no search). The first stage
/// that leaves at most an eighth of the vocabulary (below 4096 tokens any number) ends a row: 8
/// travel for each token that is left, with top_p by 1024 P for those down to the end of the bin,
/// of half a nat, in which its set ends. More stay where they are, and the next stage decides.
///
/// Rows do not travel but in one case, 8 for each token in play: where the sum of some tokens comes
/// so near to what top_p, typical_p or top_h wants that rounding decides (by estimate 2 times in
/// 10^11 for each token). What the whole row decides there is in the order in which it adds, of all
/// its tokens.
///
/// On a GPU a temperature and a top_k that comes first find candidates there. Temperature, top_k,
/// top_p, min_p in any order and the draw are answered there with sums, 128 P bytes of a row in
/// each of up to 10 rounds of a filter (of logits of double 18) and 2 of a draw. Where a row of the
/// batch has another stage, or a sum so near to a limit, this rank's shard is copied to the host,
/// and not its neighbours'.
///
/// The _into form writes ids (tokens), -1 where a row is bad, and `statuses`, (tokens), where given
/// (host memory), and advances the generators by one; it allocates nothing at a size once it has
/// met rows that leave as many candidates. The other throws for a bad row, on every rank, and then
/// advances nothing. Scratch is this rank's logits, for top_p a quarter of them again, the
/// candidates and a row of the vocabulary.
///
/// `function` is a stage of the caller's, as for sample: every rank calls it for the tokens of its
/// shard, by their numbers in the whole vocabulary, on the host.
///
///   const ef::SamplingParams params{.temperature = .8, .top_k = 50, .top_p = .95};
///   ids = ef::vocabulary_parallel_sample(hidden, head, communicator, params, rng);
template <Device D, typename Ids, typename Hidden, typename Weight, Communicator C,
          detail::SamplingSets Params = SamplingParams>
void vocabulary_parallel_sample_into(const D& device, Ids&& ids, const Hidden& hidden,
                                     const Weight& weight, C& communicator, const Params& params,
                                     Generators rng, std::span<SampleStatus> statuses = {},
                                     Workspace& workspace = thread_workspace()) {
  detail::vocabulary_parallel_sample_into("vocabulary_parallel_sample", device, ids, hidden, weight,
                                          communicator, params, rng, statuses, workspace);
  rng.advance();
}
template <Device D, typename Ids, typename Hidden, typename Weight, Communicator C,
          typename Function, detail::SamplingSets Params = SamplingParams>
  requires detail::LogitFunction<Function, Hidden>
void vocabulary_parallel_sample_into(const D& device, Ids&& ids, const Hidden& hidden,
                                     const Weight& weight, C& communicator, const Params& params,
                                     Generators rng, std::span<SampleStatus> statuses,
                                     Workspace& workspace, const Function& function) {
  detail::vocabulary_parallel_sample_into("vocabulary_parallel_sample", device, ids, hidden, weight,
                                          communicator, params, rng, statuses, workspace, function);
  rng.advance();
}
template <CpuDevice D, typename Hidden, typename Weight, Communicator C,
          detail::SamplingSets Params = SamplingParams>
Tensor<std::int32_t, 1> vocabulary_parallel_sample(const D& device, const Hidden& hidden,
                                                   const Weight& weight, C& communicator,
                                                   const Params& params, Generators rng) {
  return detail::vocabulary_parallel_sample(device, hidden, weight, communicator, params, rng);
}
template <CpuDevice D, typename Hidden, typename Weight, Communicator C, typename Function,
          detail::SamplingSets Params = SamplingParams>
  requires detail::LogitFunction<Function, Hidden>
Tensor<std::int32_t, 1> vocabulary_parallel_sample(const D& device, const Hidden& hidden,
                                                   const Weight& weight, C& communicator,
                                                   const Params& params, Generators rng,
                                                   const Function& function) {
  return detail::vocabulary_parallel_sample(device, hidden, weight, communicator, params, rng,
                                            function);
}
template <typename Hidden, typename Weight, Communicator C,
          detail::SamplingSets Params = SamplingParams>
  requires(!Device<Hidden>)
Tensor<std::int32_t, 1> vocabulary_parallel_sample(const Hidden& hidden, const Weight& weight,
                                                   C& communicator, const Params& params,
                                                   Generators rng) {
  return vocabulary_parallel_sample(Eigen::DefaultDevice{}, hidden, weight, communicator, params,
                                    rng);
}
template <typename Hidden, typename Weight, Communicator C, typename Function,
          detail::SamplingSets Params = SamplingParams>
  requires(!Device<Hidden> && detail::LogitFunction<Function, Hidden>)
Tensor<std::int32_t, 1> vocabulary_parallel_sample(const Hidden& hidden, const Weight& weight,
                                                   C& communicator, const Params& params,
                                                   Generators rng, const Function& function) {
  return vocabulary_parallel_sample(Eigen::DefaultDevice{}, hidden, weight, communicator, params,
                                    rng, function);
}

/// A token of each row, drawn from softmax(logits / temperature) over the k largest logits (ties
/// lowest index first): the tokens that top_k_sample draws from linear(hidden, weight), the same on
/// every rank: every rank passes an rng in the same state, which moves on by one position. The draw
/// of a row depends on (seed, position, row) only. Temperature 0 is greedy. k >= vocab keeps all.
/// What travels is that of vocabulary_parallel_sample with top_k. Throws std::invalid_argument for
/// k < 1, a temperature that is negative or not finite, and rows as vocabulary_parallel_greedy
/// does; rng then stays where it is.
template <CpuDevice D, typename Hidden, typename Weight, Communicator C>
Tensor<std::int32_t, 1> vocabulary_parallel_top_k_sample(const D& device, const Hidden& hidden,
                                                         const Weight& weight, C& communicator,
                                                         Index k, float temperature, Philox& rng) {
  auto tokens = detail::good_vocabulary_tokens(
      "vocabulary_parallel_top_k_sample", hidden, [&](auto& ids, std::span<SampleStatus> statuses) {
        detail::vocabulary_parallel_top_k_sample_into(device, ids, hidden, weight, communicator, k,
                                                      temperature, rng, statuses,
                                                      thread_workspace());
      });
  rng.advance();
  return tokens;
}
template <typename Hidden, typename Weight, Communicator C>
  requires(!Device<Hidden>)
Tensor<std::int32_t, 1> vocabulary_parallel_top_k_sample(const Hidden& hidden, const Weight& weight,
                                                         C& communicator, Index k,
                                                         float temperature, Philox& rng) {
  return vocabulary_parallel_top_k_sample(Eigen::DefaultDevice{}, hidden, weight, communicator, k,
                                          temperature, rng);
}

/// Writes ids and statuses as vocabulary_parallel_greedy_into does; rng moves on by one whatever
/// the rows are.
template <Device D, typename Ids, typename Hidden, typename Weight, Communicator C>
void vocabulary_parallel_top_k_sample_into(const D& device, Ids&& ids, const Hidden& hidden,
                                           const Weight& weight, C& communicator, Index k,
                                           float temperature, Philox& rng,
                                           std::span<SampleStatus> statuses = {},
                                           Workspace& workspace = thread_workspace()) {
  detail::vocabulary_parallel_top_k_sample_into(device, ids, hidden, weight, communicator, k,
                                                temperature, rng, statuses, workspace);
  rng.advance();
}

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
