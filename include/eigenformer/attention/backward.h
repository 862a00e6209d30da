/// \file
/// Gradients of attention.h, for training, with every option of the forward pass. P are the
/// probabilities, dP = grad_out V^T, D_i the sum over keys of P_ij dP_ij (the dot product of
/// grad_out_i and out_i), dS = P * (dP - D), times 1 - tanh^2 under a softcap:
///
///   grad_v = P^T grad_out     grad_q = scale * dS K     grad_k = scale * dS^T Q
///   grad_sink = -sum over rows of P_sink D
///
/// Where the loss depends on log_sum_exp itself, dS gets P times its gradient besides, given as
/// log_sum_exp_gradient: with merge_attention_states, or a z-loss.
///
/// P and D are computed again from q, k, v and grad_out (after Dao et al., "FlashAttention", 2022):
/// the score matrix never exists. On CPUs scratch is O(sequence): for a sequence and a KV head some
/// 1.5 KiB for each key that 192 rows of queries see, and five times its keys in float; a call
/// works on several of these at a time where threads are many, within 64 MiB or one. 32,768 tokens
/// with heads of 128 take 140 MiB in all.
///
/// bfloat16 is multiplied as it is where the instruction set does so (AVX512_BF16, AMX), with P and
/// dS rounded to it and sums in float; half, and bfloat16 elsewhere, are widened to float.
///
///   ef::Tensor<float, 3> lse(batch, heads, seq);
///   auto out = ef::batched_attention_with_padding(q, k, v, seq_lengths, {.causal = true, .log_sum_exp = lse});
///   auto [grad_q, grad_k, grad_v] = ef::attention_backward(device, grad_out, q, k, v, out, lse, seq_lengths, {.causal = true});
///
/// The options are those of the forward call; log_sum_exp in them is ignored, and sinks_gradient,
/// where given, gets the gradient of the sinks. Gradients of grouped heads are summed. They are
/// written, not added, have the shapes of q, k and v, and are zero for padding rows and keys past
/// the length, which are not read. q, k, v and the three gradients may be parts of a tensor that
/// holds them all (ef::heads_of).
///
/// out and log_sum_exp are those of the forward call. Only their shapes are looked at: they are
/// rounded, and a D of a rounded out loses gradients where softmax is sharp, a P of a rounded
/// log_sum_exp its mass where logits are large. Rows with scores too large for their rounding (32
/// in float, 1024 in 16 bits) take them in double, so that P and dS are as exact as the tolerance;
/// a sum over terms that cancel, as grad_q of keys that differ little, is exact relative to its
/// terms.
///
/// Exact zeros. A row that sees no key, or whose visible scores are all -infinity, gets no gradient
/// and gives none, to sinks neither, whatever it holds. A pair of query and key that is not visible
/// (causal, windows, masks, a bias of -infinity) takes no part in any gradient: what only one of
/// the two sees may be NaN. A sink of -infinity takes no part either: its gradient is 0. A NaN or
/// infinity in a visible pair makes the gradients of its row NaN, and those of the keys and values
/// that row sees.
///
/// Each gradient is summed in one fixed order: bits do not depend on threads or on other sequences
/// in the batch; on CPUs even one KV head of one sequence feeds all threads. Outputs must not
/// overlap inputs. Cost: 10 * head_dim flops for each visible pair. Throws std::invalid_argument as
/// the forward call does.
///
/// On CUDA sinks_gradient is host memory: a call that fills it waits for the device, and cannot be
/// captured into a graph; others do neither.
#pragma once

#include <algorithm>

#include "../core/dispatch.h"
#include "../cpu/attention/backward.h"
#include "problem.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {

template <typename T, int Rank>
struct AttentionGradients {
  Tensor<T, Rank> grad_q, grad_k, grad_v;
};

namespace detail {

/// Uninitialised gradients. Nothing is allocated before all three shapes are known to fit.
template <typename Q, typename K, typename V>
auto attention_gradients(std::string_view name, const Q& q, const K& k, const V& v) {
  checked_size(name, "query", q);
  checked_size(name, "key", k);
  checked_size(name, "value", v);
  using T = scalar_of<Q>;
  constexpr int rank = rank_of<Q>;
  return AttentionGradients<T, rank>{Tensor<T, rank>(sizes_of<rank>(q)),
                                     Tensor<T, rank>(sizes_of<rank>(k)),
                                     Tensor<T, rank>(sizes_of<rank>(v))};
}

template <int Rank, typename X>
auto dense_output(X& x) {
  if constexpr (Rank == 4)
    return heads_output<4>(x);
  else
    return output_view<Rank>(x);
}

/// Checks what the backward pass has besides its forward problem, and adds it. False where there is
/// nothing to do.
template <typename T, typename GQ, typename GK, typename GV, typename GO, typename Q, typename K,
          typename V, typename O, typename L>
bool attach_gradients(std::string_view name, problem::AttentionBackward<T>& problem, GQ grad_q,
                      GK grad_k, GV grad_v, const GO& grad_out, const Q& q, const K& k, const V& v,
                      const O& out, const L& lse, bool packed, const AttentionOptions& options) {
  static_assert(std::is_same_v<scalar_of<GO>, T> && std::is_same_v<scalar_of<O>, T>,
                "eigenformer: grad_out and out have the scalar type of q");
  static_assert(std::is_same_v<scalar_of<GQ>, T> && std::is_same_v<scalar_of<GK>, T> &&
                    std::is_same_v<scalar_of<GV>, T>,
                "eigenformer: gradients have the scalar type of q, k and v");
  static_assert(std::is_same_v<scalar_of<L>, compute_type<T>>,
                "eigenformer: log_sum_exp is a tensor of the compute type");
  require_attention_output(name, "out", out, q, problem.forward.value_dim);
  require_same_shape(name, "grad_out", grad_out, "out", out);
  require_same_shape(name, "grad_q", grad_q, "q", q);
  require_same_shape(name, "grad_k", grad_k, "k", k);
  require_same_shape(name, "grad_v", grad_v, "v", v);
  const auto expected = log_sum_exp_shape(q, packed);
  bool same = true;
  for (std::size_t d = 0; d < expected.size(); ++d) same = same && lse.dimension(d) == expected[d];
  require_that(same, name, "log_sum_exp has shape ", shape_text(lse),
               ", expected heads before rows of query ", shape_text(q));
  problem.grad_log_sum_exp =
      options.log_sum_exp_gradient.template checked<compute_type<T>>(name, expected);
  if (q.size() == 0 && k.size() == 0 && v.size() == 0) {  // however many rows, heads and keys
    std::fill(options.sinks_gradient.begin(), options.sinks_gradient.end(), 0.0f);
    return false;
  }
  problem.grad_output = grad_out.data();
  problem.grad_queries = grad_q.data();
  problem.grad_keys = grad_k.data();
  problem.grad_values = grad_v.data();
  problem.grad_query_strides = packed ? strides_of(grad_q) : attention_strides(grad_q);
  problem.grad_key_strides = packed ? strides_of(grad_k) : attention_strides(grad_k);
  problem.grad_value_strides = packed ? strides_of(grad_v) : attention_strides(grad_v);
  problem.grad_sinks = options.sinks_gradient.empty() ? nullptr : options.sinks_gradient.data();
  return true;
}

}  // namespace detail

/// Gradients of batched_attention_with_padding, into tensors of the shapes of q, k and v.
template <Device D, typename GQ, typename GK, typename GV, typename GO, typename Q, typename K,
          typename V, typename O, typename L>
void attention_backward_into(const D& device, GQ&& grad_q, GK&& grad_k, GV&& grad_v,
                             const GO& grad_out, const Q& q, const K& k, const V& v, const O& out,
                             const L& log_sum_exp, const LengthSpan& seq_lengths,
                             const AttentionOptions& options = {},
                             Workspace& workspace = thread_workspace()) {
  constexpr std::string_view name = "attention_backward";
  constexpr int rank = detail::dense_rank<Q>;
  const auto q_view = detail::dense_input<rank>(q);
  const auto k_view = detail::dense_input<rank>(k);
  const auto v_view = detail::dense_input<rank>(v);
  Workspace::Frame frame(workspace);
  problem::AttentionBackward<scalar_of<Q>> problem{};
  problem.forward =
      detail::dense_attention_problem(name, q_view, k_view, v_view, seq_lengths, options, frame);
  problem.key_rows = k_view.dimension(1);
  if (detail::attach_gradients(
          name, problem, detail::dense_output<rank>(grad_q), detail::dense_output<rank>(grad_k),
          detail::dense_output<rank>(grad_v), input_view<rank>(grad_out), q_view, k_view, v_view,
          input_view<rank>(out), input_view<rank - 1>(log_sum_exp), false, options))
    detail::run(device, problem, workspace);
}

template <CpuDevice D, typename GO, typename Q, typename K, typename V, typename O, typename L>
auto attention_backward(const D& device, const GO& grad_out, const Q& q, const K& k, const V& v,
                        const O& out, const L& log_sum_exp, const LengthSpan& seq_lengths,
                        const AttentionOptions& options = {}) {
  constexpr int rank = detail::dense_rank<Q>;
  auto g = detail::attention_gradients("attention_backward", detail::dense_input<rank>(q),
                                       detail::dense_input<rank>(k), detail::dense_input<rank>(v));
  attention_backward_into(device, g.grad_q, g.grad_k, g.grad_v, grad_out, q, k, v, out, log_sum_exp,
                          seq_lengths, options);
  return g;
}
template <typename GO, typename Q, typename K, typename V, typename O, typename L>
  requires(!Device<GO>)
auto attention_backward(const GO& grad_out, const Q& q, const K& k, const V& v, const O& out,
                        const L& log_sum_exp, const LengthSpan& seq_lengths,
                        const AttentionOptions& options = {}) {
  return attention_backward(Eigen::DefaultDevice{}, grad_out, q, k, v, out, log_sum_exp,
                            seq_lengths, options);
}

/// Gradients of variable_length_attention, into tensors of the shapes of q, k and v; log_sum_exp is
/// (heads, total_tokens).
template <Device D, typename GQ, typename GK, typename GV, typename GO, typename Q, typename K,
          typename V, typename O, typename L>
void variable_length_attention_backward_into(const D& device, GQ&& grad_q, GK&& grad_k, GV&& grad_v,
                                             const GO& grad_out, const Q& q, const K& k, const V& v,
                                             const O& out, const L& log_sum_exp,
                                             const LengthSpan& q_offsets,
                                             const LengthSpan& kv_offsets,
                                             const AttentionOptions& options = {},
                                             Workspace& workspace = thread_workspace()) {
  constexpr std::string_view name = "variable_length_attention_backward";
  const auto q_view = detail::heads_input<3>(q);
  const auto k_view = detail::heads_input<3>(k);
  const auto v_view = detail::heads_input<3>(v);
  Workspace::Frame frame(workspace);
  problem::AttentionBackward<scalar_of<Q>> problem{};
  problem.forward = detail::packed_attention_problem(name, q_view, k_view, v_view, q_offsets,
                                                     kv_offsets, options, frame);
  problem.key_rows = 0;
  if (detail::attach_gradients(name, problem, detail::heads_output<3>(grad_q),
                               detail::heads_output<3>(grad_k), detail::heads_output<3>(grad_v),
                               input_view<3>(grad_out), q_view, k_view, v_view, input_view<3>(out),
                               input_view<2>(log_sum_exp), true, options))
    detail::run(device, problem, workspace);
}

template <CpuDevice D, typename GO, typename Q, typename K, typename V, typename O, typename L>
auto variable_length_attention_backward(const D& device, const GO& grad_out, const Q& q, const K& k,
                                        const V& v, const O& out, const L& log_sum_exp,
                                        const LengthSpan& q_offsets, const LengthSpan& kv_offsets,
                                        const AttentionOptions& options = {}) {
  auto g =
      detail::attention_gradients("variable_length_attention_backward", detail::heads_input<3>(q),
                                  detail::heads_input<3>(k), detail::heads_input<3>(v));
  variable_length_attention_backward_into(device, g.grad_q, g.grad_k, g.grad_v, grad_out, q, k, v,
                                          out, log_sum_exp, q_offsets, kv_offsets, options);
  return g;
}
template <typename GO, typename Q, typename K, typename V, typename O, typename L>
  requires(!Device<GO>)
auto variable_length_attention_backward(const GO& grad_out, const Q& q, const K& k, const V& v,
                                        const O& out, const L& log_sum_exp,
                                        const LengthSpan& q_offsets, const LengthSpan& kv_offsets,
                                        const AttentionOptions& options = {}) {
  return variable_length_attention_backward(Eigen::DefaultDevice{}, grad_out, q, k, v, out,
                                            log_sum_exp, q_offsets, kv_offsets, options);
}

}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
