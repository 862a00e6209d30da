/// \file
/// Part of tensor_parallel.h, which includes it: sample of a language-model head whose rows are
/// divided among ranks, with any parameters that a few candidates decide.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "../sampling.h"
#include "vocabulary.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

/// How many of the best tokens of a row, after its biases and penalties, decide all that the row's
/// filters look at. Throws for what looks at all tokens.
template <Device D>
Index deciding_tokens(std::string_view name, const problem::RowParams& params) {
  const auto refuse = [&](SamplingStage stage, std::string_view why) {
    require_that(false, name, kStageNames[static_cast<std::size_t>(stage)], why);
  };
  for (const SamplingStage stage : params.order) {
    if (stage == SamplingStage::none) break;
    if (stage <= SamplingStage::function) {
      if (!CpuDevice<D>) refuse(stage, " changes logits, which here a CPU only does");
      if (stage == SamplingStage::guidance ||
          (stage == SamplingStage::penalties && params.log_probability_penalties))
        refuse(stage, " needs the log-softmax of all tokens, which no rank has");
    } else if (stage == SamplingStage::temperature && params.dynatemp_range == 0) {
      if (params.temperature == 0) return 1;
    } else if (stage == SamplingStage::top_k) {
      if (params.top_k_ties == TopKTies::keep_all)
        refuse(stage, " with all ties may keep any number of tokens");
      return params.top_k;
    } else {
      refuse(stage, " comes before top_k and looks at all tokens, which no rank has");
    }
  }
  require_that(false, name,
               "top_k is none, expected one below the vocabulary, or temperature 0: a ",
               "draw from all tokens looks at all, which no rank has");
  return 0;
}

/// The tokens whose logits a row's lists may raise, each once, into `tokens` in order; how many.
inline Index touched_tokens(const problem::RowParams& params, std::int32_t* tokens) {
  std::int32_t* end = tokens;
  if (problem::has_penalties(params)) {
    end = std::copy(params.prompt_tokens.begin(), params.prompt_tokens.end(), end);
    end = std::copy(params.output_tokens.begin(), params.output_tokens.end(), end);
  }
  for (const LogitBias& bias : params.logit_bias) *end++ = bias.token;
  if (params.forced_token >= 0) *end++ = params.forced_token;
  std::sort(tokens, end);
  return std::unique(tokens, end) - tokens;
}

/// What the rows of a call ask the ranks for.
struct DecidingTokens {
  Index best = 1, touched = 0;  // of each row
  std::int32_t* lists;          // (sets, touched), -1 past the last
};

template <Device D>
DecidingTokens deciding_tokens(std::string_view name, std::span<const problem::RowParams> sets,
                               Workspace::Frame& frame) {
  std::size_t most = 1;
  for (const problem::RowParams& p : sets)
    most =
        (std::max)(most, p.prompt_tokens.size() + p.output_tokens.size() + p.logit_bias.size() + 1);
  const auto count = static_cast<Index>(sets.size()), stride = static_cast<Index>(most);
  std::int32_t* const lists = frame.take<std::int32_t>(count * stride);
  std::fill(lists, lists + count * stride, -1);
  DecidingTokens result{1, 0, lists};
  for (Index i = 0; i < count; ++i) {
    const problem::RowParams& params = sets[static_cast<std::size_t>(i)];
    const Index touched = touched_tokens(params, lists + i * stride),
                best = deciding_tokens<D>(name, params);
    std::fill(lists + i * stride + touched, lists + (i + 1) * stride, -1);
    result.touched = (std::max)(result.touched, touched);
    // Lists may lower as many of the best as they name.
    result.best = (std::max)(result.best, best + touched);
  }
  for (Index i = 1; i < count; ++i)  // closer together
    std::copy_n(lists + i * stride, result.touched, lists + i * result.touched);
  return result;
}

/// Tokens that a row's mask excludes become -infinity in this rank's logits, but for NaN and
/// +infinity.
template <typename T>
void mask_shard(T* logits, const ShardRange& shard, const problem::RowParams& params) {
  if (params.token_mask.empty()) return;
  for (Index i = 0; i < shard.size(); ++i) {
    const Index token = shard.begin + i;
    const bool allowed =
        (params.token_mask[static_cast<std::size_t>(token / 32)] >> (token % 32) & 1u) != 0;
    if (!allowed &&
        static_cast<compute_type<T>>(logits[i]) < std::numeric_limits<compute_type<T>>::infinity())
      logits[i] = -std::numeric_limits<T>::infinity();
  }
}

/// This rank's candidates of all rows: (rows, kept) the best, then (rows, touched) those of the
/// lists that it has.
template <Device D, typename Hidden, typename Weight, typename C>
void own_candidates(const D& device, problem::VocabularyCandidate* own, Index kept,
                    const DecidingTokens& asked, const Hidden& x, const Weight& weight,
                    const ParallelShape& shape, const problem::RowParams* params, Index stride,
                    C& communicator, Workspace& workspace) {
  using T = typename layer_result<scalar_of<Hidden>, Weight>::type;
  using Candidate = problem::VocabularyCandidate;
  const Index rows = shape.tokens, size = shape.columns.size();
  Workspace::Frame order_frame(workspace);
  auto logits_frame = tensor_frame(device, workspace);
  T* const logits = logits_frame.template take<T>(rows * size);
  auto* const order = order_frame.take<std::int32_t>(kept > 1 ? worker_count(device) * size : 0);
  shard_product(device, logits, x, weight, shape, communicator, workspace);
  if constexpr (CpuDevice<D>) {
    Candidate* listed = own + rows * kept;
    for (Index r = 0; r < rows; ++r) {
      mask_shard(logits + r * size, shape.columns, params[r * stride]);
      for (Index i = 0; i < asked.touched; ++i, ++listed) {
        const Index token = asked.lists[r * stride * asked.touched + i],
                    at = token - shape.columns.begin;
        const bool here = token >= 0 && at >= 0 && at < size;
        *listed = here ? Candidate{static_cast<double>(logits[r * size + at]), token}
                       : Candidate{-std::numeric_limits<double>::infinity(), Candidate::kNone};
      }
    }
  }
  detail::run(device, problem::Vocabulary<T>{logits, own, order, rows, kept, shape.columns});
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

template <Device D, typename Ids, typename Hidden, typename Weight, typename C>
void vocabulary_parallel_sample_into(const D& device, Ids& ids, const Hidden& hidden,
                                     const Weight& weight, C& communicator,
                                     const SamplingParamsView& params, const Generators& rng,
                                     std::span<SampleStatus> statuses, Workspace& workspace) {
  constexpr auto name = "vocabulary_parallel_sample";
  using Candidate = problem::VocabularyCandidate;
  using S = compute_type<typename layer_result<scalar_of<Hidden>, Weight>::type>;
  static_assert(std::is_same_v<scalar_of<Ids>, std::int32_t>,
                "eigenformer: token ids are std::int32_t");
  const auto x = input_view<2>(hidden);
  auto out = output_view<1>(ids);
  const ParallelShape shape =
      vocabulary_shape(name, x, weight, communicator, out.dimension(0), statuses.size());
  const Index rows = shape.tokens, vocab = shape.out;
  Workspace::Frame frame(workspace);
  const TensorView<const S, 2> sizes(nullptr, rows, vocab);
  auto sampling = sampling_problem(name, sizes, params, nullptr, nullptr, frame);
  set_generators(name, sampling, rng);
  if (rows == 0) return;
  const auto asked = deciding_tokens<D>(
      name,
      std::span(sampling.params, sampling.params_stride == 0 ? 1 : static_cast<std::size_t>(rows)),
      frame);
  const int ranks = communicator.size();
  const std::span<Index> counts(frame.take<Index>(ranks), static_cast<std::size_t>(ranks));
  const auto kept_by = [&](int rank) {  // at least 1, which can say what is wrong with a row
    return std::clamp<Index>(shard_range(vocab, rank, ranks).size(), 1, asked.best);
  };
  Index all_count = 0;
  for (int r = 0; r < ranks; ++r)
    all_count += counts[static_cast<std::size_t>(r)] = rows * (kept_by(r) + asked.touched);
  const Index own_count = counts[static_cast<std::size_t>(communicator.rank())];
  const std::span own(frame.take<Candidate>(own_count), static_cast<std::size_t>(own_count));
  const std::span all(frame.take<Candidate>(all_count), static_cast<std::size_t>(all_count));
  own_candidates(device, own.data(), kept_by(communicator.rank()), asked, x, weight, shape,
                 sampling.params, sampling.params_stride, communicator, workspace);
  communicator.all_gather(own, all, std::span<const Index>(counts));
  S* const logits = frame.take<S>(rows * vocab);
  std::fill(logits, logits + rows * vocab, -std::numeric_limits<S>::infinity());
  const Candidate* part = all.data();
  for (int rank = 0; rank < ranks; ++rank)
    for (const Index count : {kept_by(rank), asked.touched})
      for (Index r = 0; r < rows; ++r, part += count)
        put_candidates(std::span(part, static_cast<std::size_t>(count)), logits + r * vocab);
  sampling.logits = logits;
  sampling.statuses = statuses.empty() ? nullptr : statuses.data();
  sampling.ids = frame.take<std::int32_t>(rows);
  if constexpr (CpuDevice<D>)
    detail::run(device, sampling, workspace);
  else
    detail::run(Eigen::DefaultDevice{}, sampling, workspace);
  memory_of(device).copy_in(out.data(), sampling.ids,
                            static_cast<std::size_t>(rows) * sizeof(std::int32_t));
}

}  // namespace detail

/// A token of each row of hidden states (tokens, in): what sample draws from linear(hidden, weight)
/// with these parameters and generators, bit for bit, the same on every rank. Parameters (one set,
/// or one for each row) and generators are the same on every rank, too. `weight` is the full
/// (vocab, in) head or a PackedColumnShard.
///
/// What travels is 16 bytes for each of a row's deciding tokens: of every rank the k best, where
/// top_k leaves k tokens (temperature 0: one), and those that lists name (penalties, biases, what
/// DRY and n-grams ask for). Each rank then runs the chain on a row of these and -infinity. So no
/// filter before top_k may look at all tokens: one that does, a top_k that keeps all or all ties,
/// guidance and penalties on log-probabilities throw std::invalid_argument naming the stage. On a
/// GPU stages that change logits do, too.
///
/// The _into form writes ids (tokens), -1 where a row is bad, and `statuses`, (tokens), where given
/// (host memory), advances the generators by one and allocates nothing after the first call at a
/// size; the other throws for a bad row, on every rank, and then advances nothing. Scratch is a row
/// of the vocabulary for each of hidden.
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
