/// \file
/// Part of tensor_parallel.h, which includes it: sample of a language-model head whose rows are
/// divided among ranks, with any parameters.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "../sampling.h"
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

/// A row that holds its candidates, or what is wrong with it, and -infinity.
template <typename C>
void put_candidates(std::span<const problem::VocabularyCandidate> candidates, C* row) {
  for (const problem::VocabularyCandidate& candidate : candidates) {
    if (candidate.token >= 0) row[candidate.token] = static_cast<C>(candidate.logit);
    if (candidate.token == problem::VocabularyCandidate::kNan)
      row[0] = std::numeric_limits<C>::quiet_NaN();
    if (candidate.token == problem::VocabularyCandidate::kInfinity && !(row[0] != row[0]))
      row[0] = std::numeric_limits<C>::infinity();
  }
}

/// Where all is checked, and nothing sent yet.
template <typename Hidden, typename Weight, typename C>
ParallelShape vocabulary_shape(std::string_view name, const Hidden& x, const Weight& weight,
                               C& communicator, Index ids, std::size_t statuses) {
  const ParallelShape shape = parallel_shape(name, x.dimension(0), weight, communicator);
  require_that(shape.in == x.dimension(1), name, "weight has ", shape.in, " columns, hidden has ",
               x.dimension(1), " features");
  require_that(shape.out >= 1 && shape.out <= (std::numeric_limits<std::int32_t>::max)(), name,
               "weight has ", shape.out, " rows, expected a vocabulary of 1 to 2^31 - 1 tokens");
  require_that(ids == shape.tokens, name, "ids has ", ids, " elements, hidden has ", shape.tokens,
               " rows");
  require_that(statuses == 0 || static_cast<Index>(statuses) == shape.tokens, name, "statuses has ",
               statuses, " elements, hidden has ", shape.tokens, " rows");
  return shape;
}

/// Samples rows of which the best `most` tokens decide all: their candidates are found where the
/// logits are. `sampling`, whose ids are the host's, is of the whole vocabulary.
template <Device D, typename T, typename C>
void sample_best_candidates(const D& device, const problem::Sampling<T>& sampling, const T* logits,
                            Index most, C& communicator, Workspace& workspace) {
  using Candidate = problem::VocabularyCandidate;
  using S = compute_type<T>;
  const Index rows = sampling.batch, vocab = sampling.vocab;
  const int ranks = communicator.size();
  Workspace::Frame frame(workspace);
  const std::span<Index> counts(frame.take<Index>(ranks), static_cast<std::size_t>(ranks));
  const auto kept_by = [&](int rank) {  // at least 1, which can say what is wrong with a row
    return std::clamp<Index>(shard_range(vocab, rank, ranks).size(), 1, most);
  };
  Index all_count = 0;
  for (int r = 0; r < ranks; ++r)
    all_count += counts[static_cast<std::size_t>(r)] = rows * kept_by(r);
  const Index own_count = counts[static_cast<std::size_t>(communicator.rank())];
  const std::span own(frame.take<Candidate>(own_count), static_cast<std::size_t>(own_count));
  const std::span all(frame.take<Candidate>(all_count), static_cast<std::size_t>(all_count));
  const ShardRange shard = shard_range(vocab, communicator.rank(), ranks);
  detail::run(device, problem::Vocabulary<T>{logits, own.data(), nullptr, rows,
                                             kept_by(communicator.rank()), shard});
  communicator.all_gather(own, all, std::span<const Index>(counts));
  S* const whole = frame.take<S>(rows * vocab);
  std::fill(whole, whole + rows * vocab, -std::numeric_limits<S>::infinity());
  const Candidate* part = all.data();
  for (int rank = 0; rank < ranks; ++rank)
    for (Index r = 0; r < rows; ++r, part += kept_by(rank))
      put_candidates(std::span(part, static_cast<std::size_t>(kept_by(rank))), whole + r * vocab);
  const problem::Sampling<S> host{whole,
                                  rows,
                                  vocab,
                                  sampling.params,
                                  sampling.params_stride,
                                  sampling.generators,
                                  sampling.generators_stride,
                                  sampling.ids,
                                  sampling.statuses};
  detail::run(Eigen::DefaultDevice{}, host, workspace);
}

/// Samples rows that are divided, in the host's memory.
template <CpuDevice D, typename T, typename C>
void sample_divided_rows(const D& device, const problem::Sampling<T>& sampling, T* logits,
                         C& communicator, Workspace& workspace) {
  Workspace::Frame frame(workspace);
  auto divided = divide_rows(device, sampling, logits, communicator, workspace, frame);
  settle_rows(device, divided);
  draw_from_shards(device, divided);
  const auto gathered = gather_candidates(device, divided, frame);
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
  for_each_gathered_row(divided, draw);
}

template <Device D, typename Ids, typename Hidden, typename Weight, typename C>
void vocabulary_parallel_sample_into(const D& device, Ids& ids, const Hidden& hidden,
                                     const Weight& weight, C& communicator,
                                     const SamplingParamsView& params, const Generators& rng,
                                     std::span<SampleStatus> statuses, Workspace& workspace) {
  constexpr auto name = "vocabulary_parallel_sample";
  using T = typename layer_result<scalar_of<Hidden>, Weight>::type;
  static_assert(std::is_same_v<scalar_of<Ids>, std::int32_t>,
                "eigenformer: token ids are std::int32_t");
  const auto x = input_view<2>(hidden);
  auto out = output_view<1>(ids);
  const ParallelShape shape =
      vocabulary_shape(name, x, weight, communicator, out.dimension(0), statuses.size());
  const Index rows = shape.tokens, size = rows * shape.columns.size();
  Workspace::Frame frame(workspace);
  const TensorView<const T, 2> sizes(nullptr, rows, shape.out);
  auto sampling = sampling_problem(name, sizes, params, nullptr,
                                   statuses.empty() ? nullptr : statuses.data(), frame);
  set_generators(name, sampling, rng);
  if (rows == 0) return;
  sampling.ids = frame.take<std::int32_t>(rows);
  auto logits_frame = tensor_frame(device, workspace);
  T* const logits = logits_frame.template take<T>(size);
  shard_product(device, logits, x, weight, shape, communicator, workspace);
  if constexpr (CpuDevice<D>) {
    sample_divided_rows(device, sampling, logits, communicator, workspace);
  } else {
    Index most = 1;
    for (Index r = 0; r < rows && most > 0; ++r) {
      const Index deciding = deciding_tokens(sampling.params_of(r));
      most = deciding == 0 ? 0 : (std::max)(most, deciding);
    }
    if (most > 0) {
      sample_best_candidates(device, sampling, logits, most, communicator, workspace);
    } else {
      T* const host = frame.take<T>(size);
      if (size > 0) to_host(device, name, host, logits, size);
      sample_divided_rows(Eigen::DefaultDevice{}, sampling, host, communicator, workspace);
    }
  }
  memory_of(device).copy_in(out.data(), sampling.ids,
                            static_cast<std::size_t>(rows) * sizeof(std::int32_t));
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
///   top_k, temperature 0         8 for each of the k best of every rank (on a GPU 16)
///   no filter                    20 P: sums and a token
///   min_p, epsilon_cutoff,       24 to 56 P of sums, and 8 for each token that the stage keeps,
///   eta_cutoff, top_n_sigma,     where those are at most an eighth of the vocabulary (all of them
///   mirostat 2                   below 4096); more stay where they are, and the next stage decides
///   top_p                        1024 P of sums, and 8 for each token in the bins, of half a nat,
///                                down to the one where the set ends
///
/// The first stage that leaves few tokens ends it: what follows works on candidates. Rows that are
/// gathered whole, sizeof(T) for each token: with guidance or penalties on log-probabilities; with
/// typical_p, top_h, mirostat 1, a dynamic temperature, XTC that excludes, all ties of a top_k and
/// min_tokens_to_keep above 1, where one of these is the first to leave few tokens; where top_p
/// keeps more than an eighth; and where a sum comes so near to a limit that its rounding could
/// change a token (one in 10^10).
///
/// On a GPU a temperature and top_k find candidates there; for other chains the rank's shard is
/// copied to the host, and not its neighbours'.
///
/// The _into form writes ids (tokens), -1 where a row is bad, and `statuses`, (tokens), where given
/// (host memory), advances the generators by one and allocates nothing after the first call at a
/// size; the other throws for a bad row, on every rank, and then advances nothing. Scratch is this
/// rank's logits, and a row of the vocabulary.
///
///   const ef::SamplingParams params{.temperature = .8, .top_k = 50, .top_p = .95};
///   ids = ef::vocabulary_parallel_sample(hidden, head, communicator, params, rng);
template <Device D, typename Ids, typename Hidden, typename Weight, Communicator C,
          detail::SamplingSets Params = SamplingParams>
void vocabulary_parallel_sample_into(const D& device, Ids&& ids, const Hidden& hidden,
                                     const Weight& weight, C& communicator, const Params& params,
                                     Generators rng, std::span<SampleStatus> statuses = {},
                                     Workspace& workspace = thread_workspace()) {
  detail::vocabulary_parallel_sample_into(device, ids, hidden, weight, communicator, params, rng,
                                          statuses, workspace);
  rng.advance();
}
template <CpuDevice D, typename Hidden, typename Weight, Communicator C,
          detail::SamplingSets Params = SamplingParams>
Tensor<std::int32_t, 1> vocabulary_parallel_sample(const D& device, const Hidden& hidden,
                                                   const Weight& weight, C& communicator,
                                                   const Params& params, Generators rng) {
  auto ids = detail::good_vocabulary_tokens(
      "vocabulary_parallel_sample", hidden, [&](auto& tokens, std::span<SampleStatus> statuses) {
        detail::vocabulary_parallel_sample_into(device, tokens, hidden, weight, communicator,
                                                params, rng, statuses, thread_workspace());
      });
  rng.advance();
  return ids;
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

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
