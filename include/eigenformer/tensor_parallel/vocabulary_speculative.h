/// \file
/// Part of tensor_parallel.h, which includes it: the distributions of a language-model head whose
/// rows are divided among ranks, and speculative verification by them.
#pragma once

#include "../sampling/speculative.h"
#include "../sampling/speculative_tree.h"
#include "divided_tree.h"
#include "vocabulary_log_probabilities.h"
#include "vocabulary_top_k.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

/// This rank's probabilities of rows that are drawn from all tokens in play: from the sums of their
/// weights, which have the bits of the whole row.
template <typename D, typename Rows>
void spread_shards(const D& device, Rows& divided, float* probabilities) {
  using C = typename Rows::C;
  const Index rows = divided.shard.rows;
  const auto is_drawn = [](const DividedRow& row) { return row.end == RowEnd::drawn; };
  if (!std::any_of(divided.rows.begin(), divided.rows.end(), is_drawn)) return;
  Workspace::Frame frame(divided.workspace);
  bool* const asked = frame.take<bool>(rows);
  double* const totals = frame.take<double>(rows);
  Index* const which = frame.take<Index>(rows);
  Index count = 0;
  for (Index r = 0; r < rows; ++r) {
    asked[r] = is_drawn(divided.rows[static_cast<std::size_t>(r)]);
    if (asked[r]) which[count++] = r;
  }
  const SummedRows<Rows> summed(device, divided, static_cast<const C*>(divided.shard.logits),
                                divided.asked, {which, static_cast<std::size_t>(count)},
                                problem::ShardSum::weights, frame);
  for (Index i = 0; i < count; ++i) totals[which[i]] = summed.sums(i).total;
  detail::run(device,
              problem::SpreadShard<C>{divided.shard, divided.asked, asked, totals, probabilities},
              divided.workspace);
}

/// The shards of the distributions, (rows, shard), memory of the host.
template <CpuDevice D, typename T, typename C>
void divided_probabilities(const D& device, const problem::Sampling<T>& sampling, T* logits,
                           float* probabilities, C& communicator, Workspace& workspace) {
  Workspace::Frame frame(workspace);
  auto divided = divide_rows(device, sampling, logits, communicator, workspace, frame);
  const auto gathered = settle_rows_and_gather(device, divided, frame);
  const ShardRange own = divided.shard.shard;
  std::fill(probabilities, probabilities + sampling.batch * own.size(), 0.0f);
  for (Index r = 0; r < sampling.batch; ++r)
    sampling.finish(r, -1, divided.rows[static_cast<std::size_t>(r)].status);
  spread_shards(device, divided, probabilities);
  for_each_row_of_candidates(divided, gathered, [&](Index r, auto row) {
    using Row = std::remove_const_t<std::remove_pointer_t<decltype(row.logits)>>;
    Workspace::Frame of_row(workspace);
    float* const whole = of_row.template take<float>(sampling.vocab);
    row.ids = nullptr;
    detail::run(device, problem::SamplingProbabilities<Row>{row, whole}, workspace);
    std::copy_n(whole + own.begin, own.size(), probabilities + r * own.size());
  });
}

template <Device D, typename Out, typename Hidden, typename Weight, typename C,
          typename Function = problem::NoLogitFunction>
void vocabulary_parallel_sampling_probabilities_into(
    const D& device, Out& probabilities, const Hidden& hidden, const Weight& weight,
    C& communicator, const SamplingParamsView& params, std::span<SampleStatus> statuses,
    Workspace& workspace, const Function& function = {}) {
  constexpr auto name = "vocabulary_parallel_sampling_probabilities";
  using T = typename layer_result<scalar_of<Hidden>, Weight>::type;
  static_assert(std::is_same_v<scalar_of<Out>, float>,
                "eigenformer: sampling probabilities are float");
  const auto x = input_view<2>(hidden);
  auto out = output_view<2>(probabilities);
  const ParallelShape shape =
      vocabulary_shape(name, x, weight, communicator, x.dimension(0), statuses.size());
  const Index rows = shape.tokens, size = rows * shape.columns.size();
  require_that(out.dimension(0) == rows && out.dimension(1) == shape.columns.size(), name,
               "probabilities has shape ", shape_text(out), ", expected (", rows, ", ",
               shape.columns.size(), "), the shard of rank ", communicator.rank());
  require_no_coin(name, params);
  Workspace::Frame frame(workspace);
  const auto sampling =
      divided_sampling<T>(name, rows, shape.out, params, statuses, frame, function);
  if (rows == 0) return;
  with_shard_on_host<D, T>(
      name, device, x, weight, shape, communicator, workspace, [](const auto*) { return false; },
      [&](const auto& host, T* logits) {
        float* const there = CpuDevice<D> ? out.data() : frame.take<float>(size);
        divided_probabilities(host, sampling, logits, there, communicator, workspace);
        if constexpr (!CpuDevice<D>)
          memory_of(device).copy_in(out.data(), there,
                                    static_cast<std::size_t>(size) * sizeof(float));
      });
}

template <Device D, typename Tokens, typename Draft, typename Target, typename C>
void vocabulary_parallel_verify_speculative_into(
    const D& device, SpeculativeResult& result, const Tokens& draft_tokens,
    const Draft& draft_probabilities, const Target& target_probabilities, Index vocab,
    C& communicator, Generators& rng, const SpeculativeOptions& options, Workspace& workspace) {
  constexpr auto name = "vocabulary_parallel_verify_speculative";
  const auto tokens = input_view<2>(draft_tokens);
  const auto draft = input_view<3>(draft_probabilities);
  const auto target = input_view<3>(target_probabilities);
  const Index batch = tokens.dimension(0), drafts = tokens.dimension(1);
  const Index columns = target.dimension(2);
  check_shard(name, "target_probabilities", columns, vocab, communicator);
  check_speculative<Eigen::DefaultDevice>(name, tokens, draft, target, columns, vocab, rng,
                                          options);
  const LengthSpan& lengths = options.draft_lengths;
  Workspace::Frame frame(workspace);
  std::int32_t* const parents = frame.take<std::int32_t>(drafts);
  std::int32_t* const nodes = frame.take<std::int32_t>(batch * drafts);
  for (Index i = 0; i < drafts; ++i) parents[i] = static_cast<std::int32_t>(i - 1);
  result.accepted_counts.resize(batch);
  result.tokens.resize(batch, drafts + 1);
  result.statuses.resize(static_cast<std::size_t>(batch));
  // a chain is a tree that has no place for drafts after the last; null would say that drafts are
  // certain
  const scalar_of<Draft> nothing{};
  const problem::SpeculativeTree<scalar_of<Draft>, scalar_of<Target>> tree{
      tokens.data(),
      parents,
      0,
      draft.size() == 0 ? &nothing : on_host(device, name, draft.data(), draft.size(), frame),
      on_host(device, name, target.data(), target.size(), frame),
      batch,
      drafts,
      vocab,
      false,
      rng.data(),
      rng.per_row() ? 1 : 0,
      result.accepted_counts.data(),
      result.tokens.data(),
      nodes,
      result.statuses.data()};
  verify_divided_trees(host_device(device), tree, drafts,
                       lengths.empty() ? nullptr : indices(lengths, frame), communicator,
                       workspace);
  rng.advance();
}

template <Device D, typename Tokens, typename Parents, typename Draft, typename Target, typename C>
void vocabulary_parallel_verify_speculative_tree_into(
    const D& device, SpeculativeTreeResult& result, const Tokens& draft_tokens,
    const Parents& parents_of_nodes, const Draft& draft_probabilities,
    const Target& target_probabilities, Index vocab, C& communicator, Generators& rng,
    const SpeculativeTreeOptions& options, Workspace& workspace) {
  constexpr auto name = "vocabulary_parallel_verify_speculative_tree";
  const auto tokens = input_view<2>(draft_tokens);
  const auto parents = input_view<rank_of<Parents>>(parents_of_nodes);
  const auto target = input_view<3>(target_probabilities);
  const Index batch = tokens.dimension(0), nodes = tokens.dimension(1);
  const Index columns = target.dimension(2);
  check_shard(name, "target_probabilities", columns, vocab, communicator);
  const auto* draft = checked_tree<Eigen::DefaultDevice>(name, tokens, parents, draft_probabilities,
                                                         target, columns, vocab, rng);
  const tree_draft_scalar<Draft, Target> nothing{};
  Workspace::Frame frame(workspace);
  if constexpr (!std::is_same_v<Draft, CertainDrafts>)
    draft = columns == 0 ? &nothing  // not null: certain
                         : on_host(device, name, draft, target.size(), frame);
  result.accepted_counts.resize(batch);
  result.tokens.resize(batch, nodes + 1);
  result.nodes.resize(batch, nodes);
  result.statuses.resize(static_cast<std::size_t>(batch));
  const problem::SpeculativeTree<tree_draft_scalar<Draft, Target>, scalar_of<Target>> tree{
      tokens.data(),
      parents.data(),
      rank_of<Parents> == 1 ? 0 : nodes,
      draft,
      on_host(device, name, target.data(), target.size(), frame),
      batch,
      nodes,
      vocab,
      options.with_replacement,
      rng.data(),
      rng.per_row() ? 1 : 0,
      result.accepted_counts.data(),
      result.tokens.data(),
      result.nodes.data(),
      result.statuses.data()};
  verify_divided_trees(host_device(device), tree, nodes + 1, nullptr, communicator, workspace);
  rng.advance();
}

}  // namespace detail

/// This rank's tokens of the distributions that sample draws from, (tokens, shard) of float: the
/// columns shard_range(vocab, rank, world_size) of sampling_probabilities of linear(hidden,
/// weight), bit for bit. Parameters, `weight` and bytes as for vocabulary_parallel_sample; beside
/// those a row of which many tokens are left sends a block sum. The form that returns throws for a
/// bad row, on every rank; the _into form writes zeros and its status, and allocates as that of
/// vocabulary_parallel_sample. On a GPU probabilities are its memory.
///
///   auto target = ef::vocabulary_parallel_sampling_probabilities(hidden, head, communicator,
///                                                                params);
template <Device D, typename Out, typename Hidden, typename Weight, Communicator C,
          detail::SamplingSets Params = SamplingParams>
void vocabulary_parallel_sampling_probabilities_into(const D& device, Out&& probabilities,
                                                     const Hidden& hidden, const Weight& weight,
                                                     C& communicator, const Params& params,
                                                     std::span<SampleStatus> statuses = {},
                                                     Workspace& workspace = thread_workspace()) {
  detail::vocabulary_parallel_sampling_probabilities_into(
      device, probabilities, hidden, weight, communicator, params, statuses, workspace);
}
template <Device D, typename Out, typename Hidden, typename Weight, Communicator C,
          typename Function, detail::SamplingSets Params = SamplingParams>
  requires detail::LogitFunction<Function, Hidden>
void vocabulary_parallel_sampling_probabilities_into(const D& device, Out&& probabilities,
                                                     const Hidden& hidden, const Weight& weight,
                                                     C& communicator, const Params& params,
                                                     std::span<SampleStatus> statuses,
                                                     Workspace& workspace,
                                                     const Function& function) {
  detail::vocabulary_parallel_sampling_probabilities_into(
      device, probabilities, hidden, weight, communicator, params, statuses, workspace, function);
}
template <CpuDevice D, typename Hidden, typename Weight, Communicator C,
          detail::SamplingSets Params = SamplingParams>
Tensor<float, 2> vocabulary_parallel_sampling_probabilities(const D& device, const Hidden& hidden,
                                                            const Weight& weight, C& communicator,
                                                            const Params& params) {
  constexpr auto name = "vocabulary_parallel_sampling_probabilities";
  const auto x = input_view<2>(hidden);
  const auto shape = detail::vocabulary_shape(name, x, weight, communicator, x.dimension(0), 0);
  std::vector<SampleStatus> statuses(static_cast<std::size_t>(shape.tokens));
  Tensor<float, 2> probabilities(shape.tokens, shape.columns.size());
  vocabulary_parallel_sampling_probabilities_into(device, probabilities, hidden, weight,
                                                  communicator, params, statuses);
  detail::require_good_rows(name, statuses);
  return probabilities;
}
template <typename Hidden, typename Weight, Communicator C,
          detail::SamplingSets Params = SamplingParams>
  requires(!Device<Hidden>)
Tensor<float, 2> vocabulary_parallel_sampling_probabilities(const Hidden& hidden,
                                                            const Weight& weight, C& communicator,
                                                            const Params& params) {
  return vocabulary_parallel_sampling_probabilities(Eigen::DefaultDevice{}, hidden, weight,
                                                    communicator, params);
}

/// What verify_speculative (sampling/speculative.h) gives for whole rows, bit for bit, the same on
/// every rank: the probabilities, of a vocabulary of `vocab` tokens, are this rank's shards of
/// them, (batch, n, shard) of the drafts and (batch, n + 1, shard) of the target. Draft tokens,
/// lengths and generators are the same on every rank. A drafter that every rank runs whole gives
/// the columns shard_range(vocab, rank, world_size) of its distributions.
///
/// What travels, bytes that every rank holds in the end: 16 for each draft, and for each row 8 for
/// each block of 128 tokens and for each token of blocks that ranks share, 20 for each rank. Sums
/// have the bits of the whole row, so that no row is gathered. Throws std::invalid_argument for
/// arguments as verify_speculative does, and for shards that are not those of `vocab`. The _into
/// form allocates nothing after the first call at a size. On a GPU the probabilities are its
/// memory, and this rank's shards are copied to the host; all else is the host's.
///
///   auto result = ef::vocabulary_parallel_verify_speculative(drafts, q, p, vocab, communicator,
///                                                            rng);
template <Device D, typename Tokens, typename Draft, typename Target, Communicator C>
void vocabulary_parallel_verify_speculative_into(const D& device, SpeculativeResult& result,
                                                 const Tokens& draft_tokens,
                                                 const Draft& draft_probabilities,
                                                 const Target& target_probabilities, Index vocab,
                                                 C& communicator, Generators rng,
                                                 const SpeculativeOptions& options = {},
                                                 Workspace& workspace = thread_workspace()) {
  detail::vocabulary_parallel_verify_speculative_into(device, result, draft_tokens,
                                                      draft_probabilities, target_probabilities,
                                                      vocab, communicator, rng, options, workspace);
}
template <CpuDevice D, typename Tokens, typename Draft, typename Target, Communicator C>
SpeculativeResult vocabulary_parallel_verify_speculative(
    const D& device, const Tokens& draft_tokens, const Draft& draft_probabilities,
    const Target& target_probabilities, Index vocab, C& communicator, Generators rng,
    const SpeculativeOptions& options = {}) {
  SpeculativeResult result;
  vocabulary_parallel_verify_speculative_into(device, result, draft_tokens, draft_probabilities,
                                              target_probabilities, vocab, communicator, rng,
                                              options);
  return result;
}
template <typename Tokens, typename Draft, typename Target, Communicator C>
  requires(!Device<Tokens>)
SpeculativeResult vocabulary_parallel_verify_speculative(const Tokens& draft_tokens,
                                                         const Draft& draft_probabilities,
                                                         const Target& target_probabilities,
                                                         Index vocab, C& communicator,
                                                         Generators rng,
                                                         const SpeculativeOptions& options = {}) {
  return vocabulary_parallel_verify_speculative(Eigen::DefaultDevice{}, draft_tokens,
                                                draft_probabilities, target_probabilities, vocab,
                                                communicator, rng, options);
}

/// What verify_speculative_tree (sampling/speculative_tree.h) gives for whole rows, bit for bit,
/// the same on every rank: as vocabulary_parallel_verify_speculative, with shards (batch, n + 1,
/// shard) of draft and target probabilities; without the former the drafts are certain. Beside its
/// bytes, each refused draft that has a sibling after it sends its row's block sums twice, once
/// where siblings are drawn with replacement; certain drafts send none.
///
///   auto result = ef::vocabulary_parallel_verify_speculative_tree(drafts, parents, q, p, vocab,
///                                                                 communicator, rng);
///   auto result = ef::vocabulary_parallel_verify_speculative_tree(drafts, parents, p, vocab,
///                                                                 communicator, rng);
template <Device D, typename Tokens, typename Parents, typename Draft, typename Target,
          Communicator C>
void vocabulary_parallel_verify_speculative_tree_into(
    const D& device, SpeculativeTreeResult& result, const Tokens& draft_tokens,
    const Parents& parents, const Draft& draft_probabilities, const Target& target_probabilities,
    Index vocab, C& communicator, Generators rng, const SpeculativeTreeOptions& options = {},
    Workspace& workspace = thread_workspace()) {
  detail::vocabulary_parallel_verify_speculative_tree_into(
      device, result, draft_tokens, parents, draft_probabilities, target_probabilities, vocab,
      communicator, rng, options, workspace);
}
template <Device D, typename Tokens, typename Parents, typename Target, Communicator C>
void vocabulary_parallel_verify_speculative_tree_into(
    const D& device, SpeculativeTreeResult& result, const Tokens& draft_tokens,
    const Parents& parents, const Target& target_probabilities, Index vocab, C& communicator,
    Generators rng, Workspace& workspace = thread_workspace()) {
  detail::vocabulary_parallel_verify_speculative_tree_into(
      device, result, draft_tokens, parents, detail::CertainDrafts{}, target_probabilities, vocab,
      communicator, rng, {}, workspace);
}
template <CpuDevice D, typename Tokens, typename Parents, typename... Rest>
SpeculativeTreeResult vocabulary_parallel_verify_speculative_tree(const D& device,
                                                                  const Tokens& draft_tokens,
                                                                  const Parents& parents,
                                                                  Rest&&... rest) {
  SpeculativeTreeResult result;
  vocabulary_parallel_verify_speculative_tree_into(device, result, draft_tokens, parents,
                                                   std::forward<Rest>(rest)...);
  return result;
}
template <typename Tokens, typename Parents, typename... Rest>
  requires(!Device<Tokens>)
SpeculativeTreeResult vocabulary_parallel_verify_speculative_tree(const Tokens& draft_tokens,
                                                                  const Parents& parents,
                                                                  Rest&&... rest) {
  return vocabulary_parallel_verify_speculative_tree(Eigen::DefaultDevice{}, draft_tokens, parents,
                                                     std::forward<Rest>(rest)...);
}

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
