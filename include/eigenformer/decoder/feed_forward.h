/// \file
/// The parts of a decoder's feed-forward that its form chooses: activations, and the products of
/// experts. inference.h is the step that calls them.
#pragma once

#include "../activation.h"
#include "../expert_feed_forward.h"
#include "packed_layer.h"
#include "step_rows.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace detail {

inline constexpr GeluOptions kTanhGelu{.approximation = GeluApproximation::tanh};

/// y (rows, hidden) from rows [gate | up].
template <Device D, typename T>
void activate_gated(const D& device, const DecoderForm& form, TensorView<T, 2>& y,
                    const TensorView<T, 2>& gate_up) {
  switch (form.activation) {
    case DecoderActivation::silu:
      return swiglu_into(device, y, gate_up);
    case DecoderActivation::gelu:
      return geglu_into(device, y, gate_up);
    case DecoderActivation::gelu_tanh:
      return geglu_into(device, y, gate_up, kTanhGelu);
    case DecoderActivation::clamped_swiglu:
      return clamped_swiglu_into(device, y, gate_up, form.clamped_swiglu);
    case DecoderActivation::relu:
      break;  // refused by DecoderForm::validate
  }
}
template <Device D, typename T>
void activate(const D& device, const DecoderForm& form, TensorView<T, 2>& x) {
  switch (form.activation) {
    case DecoderActivation::silu:
      return silu_into(device, x, x);
    case DecoderActivation::gelu:
      return gelu_into(device, x, x);
    case DecoderActivation::gelu_tanh:
      return gelu_into(device, x, x, kTanhGelu);
    case DecoderActivation::relu:
      return relu_into(device, x, x);
    case DecoderActivation::clamped_swiglu:
      break;  // refused by DecoderForm::validate
  }
}

/// call(the epilogue with the form's activation).
template <typename Call>
void with_activation(const DecoderForm& form, const Epilogue<>& epilogue, Call&& call) {
  switch (form.activation) {
    case DecoderActivation::silu:
      return call(epilogue.silu());
    case DecoderActivation::gelu:
      return call(epilogue.gelu());
    case DecoderActivation::gelu_tanh:
      return call(epilogue.gelu_tanh());
    case DecoderActivation::relu:
    case DecoderActivation::clamped_swiglu:
      break;  // the one is refused by DecoderForm::validate, the other not fused
  }
}

/// results (pairs, features), by expert, of the tokens x in the order that the scratch holds.
template <Device D, typename T, typename S>
void expert_products(const D& device, const DecoderForm& form, const PackedDecoderLayer<T>& w,
                     const PackedExpertStack<S>& stack, InferenceScratch<T>& scratch,
                     TensorView<T, 2>& results, const TensorView<T, 2>& x) {
  const Index pairs = results.dimension(0), hidden = form.experts.hidden;
  const auto offsets = scratch.expert_offsets.view();
  const auto order = scratch.expert_order.view();
  const auto rows = [&](GrowingTensor<T, 2>& memory, Index columns) {
    return memory.reshape(memory_of(device), Eigen::DSizes<Index, 2>(pairs, columns));
  };
  const auto end = [](const PackedArray<float>& bias) {
    return Epilogue<>(bias.data(), bias.size() == 0 ? Epilogue<>::kNone : bias.size(), nullptr,
                      Epilogue<>::kNone, Epilogue<>::kNone);
  };
  auto inner = rows(scratch.expert_hidden, hidden);
  if (form.fuses_experts()) {
    with_activation(form, end(w.expert_up_bias), [&](const auto& epilogue) {
      expert_linear_into(device, inner, x, stack.gate_up, offsets, order, epilogue);
    });
  } else {
    auto both = rows(scratch.expert_gate_up, 2 * hidden);
    expert_linear_into(device, both, x, stack.up, offsets, order, end(w.expert_up_bias));
    activate_gated(device, form, inner, both);
  }
  expert_linear_into(device, results, inner, stack.down, offsets, end(w.expert_down_bias));
}

}  // namespace detail
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
