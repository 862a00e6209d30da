/// \file
/// Results of attention over parts of the keys into the result over all of them: a prefix that
/// requests share and what each has of its own, keys split over devices or in time. Each part i
/// brings its output and log_sum_exp over keys that no other part has:
///
///   log_sum_exp = log(sum over i of exp(log_sum_exp_i))
///   output      = sum over i of exp(log_sum_exp_i - log_sum_exp) * output_i
///
/// (merge_states of FlashInfer, Ye et al., 2025.) Shapes are those that attention gives: output
/// (batch, seq, heads, width) with log_sum_exp (batch, heads, seq), or packed (tokens, heads,
/// width) with (heads, tokens); one of (batch, seq, width) is (batch, seq, 1, width). Output in
/// float, double, bfloat16 or half, log_sum_exp in its compute type.
///
///   ef::merge_attention_states_into(device, out, lse, shared_out, shared_lse, own_out, own_lse);
///   const std::array states{ef::AttentionStateView(out0, lse0),
///                           ef::AttentionStateView(out1, lse1),
///                           ef::AttentionStateView(out2, lse2)};
///   ef::merge_attention_states_into(device, out, lse, states);
///
/// Empty states. A row whose log_sum_exp is -infinity has seen no key: its output is not read into
/// arithmetic and may hold NaN. A row without any other state is exactly zero, its log_sum_exp
/// -infinity; so is every row of no states at all. A log_sum_exp of NaN or +infinity makes its row
/// NaN in both results, and no other.
///
/// Attention sinks are in the log_sum_exp of the calls that were given them: give them to one of
/// the parts. Where that part has no key for a row its log_sum_exp is -infinity, the sink is not
/// in it, and the merged row is that without sinks: choose a part that has keys for all.
///
/// Precision. A weight is as exact as log_sum_exp: in float within 6e-8 * |log_sum_exp|, which is
/// 1e-5 where it is around 170. Sums are in the compute type, states in their order, so that bits
/// depend on nothing but the row. An average of finite values is finite however large they are.
///
/// Output and log_sum_exp may be those of a state; other overlaps are not allowed. The _into forms
/// allocate nothing after the first call at a size, and wait for nothing on a GPU (the list of
/// states is host memory, what they point to memory of the device). Cost: one read of every output
/// and one write. Throws std::invalid_argument for shapes that differ.
#pragma once

#include <array>

#include "../core/dispatch.h"
#include "../core/rows.h"
#include "../core/values.h"
#include "../core/workspace.h"
#include "../cpu/attention/merge.h"
#include "options.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

/// A partial result, in memory that must outlive it: ef::AttentionStateView(output, log_sum_exp).
template <typename T, int Rank>
class AttentionStateView {
  static_assert(FloatingScalar<T>,
                "eigenformer: attention gives float, double, Eigen::bfloat16 or Eigen::half");
  static_assert(Rank == 3 || Rank == 4,
                "eigenformer: an output of attention is (batch, seq, heads, width) or (tokens, "
                "heads, width)");

 public:
  template <typename Output, typename LogSumExp>
  AttentionStateView(Output&& output, LogSumExp&& log_sum_exp)
      : state_{input_view<Rank>(output).data(), input_view<Rank - 1>(log_sum_exp).data()},
        sizes_(detail::sizes_of<Rank>(input_view<Rank>(output))),
        log_sum_exp_sizes_(detail::sizes_of<Rank - 1>(input_view<Rank - 1>(log_sum_exp))) {
    static_assert(detail::may_be_viewed<Output> && detail::may_be_viewed<LogSumExp>,
                  "eigenformer: a state of attention is viewed, and its output or log_sum_exp is a "
                  "tensor that ends with the expression. Give it a name first.");
    static_assert(std::is_same_v<scalar_of<LogSumExp>, compute_type<T>>,
                  "eigenformer: log_sum_exp is a tensor of the compute type");
  }

  const problem::AttentionState<T>& state() const { return state_; }
  TensorView<const T, Rank> output() const { return {state_.output, sizes_}; }
  TensorView<const compute_type<T>, Rank - 1> log_sum_exp() const {
    return {state_.log_sum_exp, log_sum_exp_sizes_};
  }

 private:
  problem::AttentionState<T> state_;
  Eigen::DSizes<Index, Rank> sizes_;
  Eigen::DSizes<Index, Rank - 1> log_sum_exp_sizes_;
};
template <typename Output, typename LogSumExp>
AttentionStateView(Output&&, LogSumExp&&) -> AttentionStateView<scalar_of<Output>, rank_of<Output>>;

template <typename T, int Rank>
struct MergedAttention {
  Tensor<T, Rank> output;
  Tensor<compute_type<T>, Rank - 1> log_sum_exp;
};

namespace detail {

template <typename T>
inline constexpr int attention_state_rank = 0;
template <typename T, int Rank>
inline constexpr int attention_state_rank<AttentionStateView<T, Rank>> = Rank;

/// Any range of AttentionStateViews that lie one after the other.
template <typename R>
concept AttentionStates = ContiguousRange<R> && attention_state_rank<element_of<R>> != 0;

/// (batch, heads, rows) of an output (batch, rows, heads, width); (heads, tokens) of (tokens,
/// heads, width).
template <int Rank>
std::array<Index, static_cast<std::size_t>(Rank - 1)> merged_log_sum_exp_shape(
    const Eigen::DSizes<Index, Rank>& sizes) {
  if constexpr (Rank == 4)
    return {sizes[0], sizes[2], sizes[1]};
  else
    return {sizes[1], sizes[0]};
}

/// The states live in `frame`.
template <typename T, int Rank, typename States>
problem::AttentionMerge<T> attention_merge_problem(TensorView<T, Rank> output,
                                                   const LogSumExpOutput& log_sum_exp,
                                                   const States& states, Workspace::Frame& frame) {
  constexpr std::string_view name = "merge_attention_states";
  static_assert(attention_state_rank<element_of<States>> == Rank &&
                    std::is_same_v<element_of<States>, AttentionStateView<T, Rank>>,
                "eigenformer: output has scalar and rank of the states");
  checked_size(name, "output", output);
  const auto sizes = sizes_of<Rank>(output);
  const auto lse_sizes = merged_log_sum_exp_shape<Rank>(sizes);
  const auto count = static_cast<Index>(std::ranges::size(states));
  auto* const list = frame.take<problem::AttentionState<T>>(count);
  for (Index i = 0; i < count; ++i) {
    const AttentionStateView<T, Rank>& state = std::ranges::data(states)[i];
    bool same = true, lse_same = true;
    for (int d = 0; d < Rank; ++d) same = same && state.output().dimension(d) == sizes[d];
    for (int d = 0; d < Rank - 1; ++d)
      lse_same =
          lse_same && state.log_sum_exp().dimension(d) == lse_sizes[static_cast<std::size_t>(d)];
    if (!same)
      require_that(false, name, "output ", i, " has shape ", shape_text(state.output()),
                   ", the merged one ", shape_text(output));
    if (!lse_same)
      require_that(false, name, "log_sum_exp ", i, " has shape ", shape_text(state.log_sum_exp()),
                   ", expected heads before rows of output ", shape_text(output));
    list[i] = state.state();
  }
  problem::AttentionMerge<T> p{};
  p.output = output.data();
  p.log_sum_exp = log_sum_exp.checked<compute_type<T>>(name, lse_sizes);
  p.states = list;
  p.count = count;
  p.batch = Rank == 4 ? sizes[0] : 1;
  p.rows = sizes[Rank - 3];
  p.heads = sizes[Rank - 2];
  p.width = sizes[Rank - 1];
  return p;
}

}  // namespace detail

/// Any number of states, into `output` and `log_sum_exp` (LogSumExpOutput{} where that is not
/// wanted).
template <Device D, typename Output, detail::AttentionStates States>
void merge_attention_states_into(const D& device, Output&& output,
                                 const LogSumExpOutput& log_sum_exp, const States& states,
                                 Workspace& workspace = thread_workspace()) {
  constexpr int rank = detail::attention_state_rank<detail::element_of<States>>;
  Workspace::Frame frame(workspace);
  const auto problem =
      detail::attention_merge_problem(output_view<rank>(output), log_sum_exp, states, frame);
  if (problem.lines() > 0 && (problem.width > 0 || problem.log_sum_exp != nullptr))
    detail::run(device, problem, workspace);
}

/// Two of them.
template <Device D, typename Output, typename Output1, typename LogSumExp1, typename Output2,
          typename LogSumExp2>
void merge_attention_states_into(const D& device, Output&& output,
                                 const LogSumExpOutput& log_sum_exp, const Output1& output1,
                                 const LogSumExp1& log_sum_exp1, const Output2& output2,
                                 const LogSumExp2& log_sum_exp2,
                                 Workspace& workspace = thread_workspace()) {
  const std::array states{AttentionStateView(output1, log_sum_exp1),
                          AttentionStateView(output2, log_sum_exp2)};
  merge_attention_states_into(device, output, log_sum_exp, states, workspace);
}

template <CpuDevice D, detail::AttentionStates States>
auto merge_attention_states(const D& device, const States& states) {
  constexpr std::string_view name = "merge_attention_states";
  using State = detail::element_of<States>;
  constexpr int rank = detail::attention_state_rank<State>;
  detail::require_that(std::ranges::size(states) > 0, name, "no states, expected one or more");
  const State& first = *std::ranges::data(states);
  using T = scalar_of<decltype(first.output())>;
  detail::checked_size(name, "output 0", first.output());
  detail::checked_size(name, "log_sum_exp 0", first.log_sum_exp());
  MergedAttention<T, rank> merged{detail::tensor_like(name, "output 0", first.output()),
                                  detail::tensor_like(name, "log_sum_exp 0", first.log_sum_exp())};
  merge_attention_states_into(device, merged.output, merged.log_sum_exp, states);
  return merged;
}
template <detail::AttentionStates States>
auto merge_attention_states(const States& states) {
  return merge_attention_states(Eigen::DefaultDevice{}, states);
}

template <CpuDevice D, typename Output1, typename LogSumExp1, typename Output2, typename LogSumExp2>
auto merge_attention_states(const D& device, const Output1& output1, const LogSumExp1& log_sum_exp1,
                            const Output2& output2, const LogSumExp2& log_sum_exp2) {
  const std::array states{AttentionStateView(output1, log_sum_exp1),
                          AttentionStateView(output2, log_sum_exp2)};
  return merge_attention_states(device, states);
}

///   auto [out, lse] = ef::merge_attention_states(out1, lse1, out2, lse2);
template <typename Output1, typename LogSumExp1, typename Output2, typename LogSumExp2>
  requires(!Device<Output1>)
auto merge_attention_states(const Output1& output1, const LogSumExp1& log_sum_exp1,
                            const Output2& output2, const LogSumExp2& log_sum_exp2) {
  return merge_attention_states(Eigen::DefaultDevice{}, output1, log_sum_exp1, output2,
                                log_sum_exp2);
}

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
