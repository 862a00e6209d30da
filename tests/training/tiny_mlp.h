/// \file
/// A two-layer model with tanh, by plain loops and no operator of the library, that meets
/// ef::TrainableModel: activations in Compute, sums in float, master weights and gradients in
/// float. Same layout of weights as ef::reference::Mlp.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include <eigenformer/reference/training.h>

#include "compare.h"

namespace eigenformer_test {

class TinyMlp {
 public:
  TinyMlp(ef::Index features, ef::Index hidden, ef::Index classes, unsigned seed)
      : layout_{features, hidden, classes, {}},
        weights_(
            random_tensor<float, 1>({hidden * (features + 1) + classes * (hidden + 1)}, seed, 0.5)),
        gradient_(weights_.size()) {
    // a step must not look at what gradients held before
    gradient_.setConstant(std::numeric_limits<float>::quiet_NaN());
  }

  template <typename Compute, typename Inputs>
  ef::Tensor<Compute, 2> forward(const Inputs& inputs) {
    const ef::Index rows = inputs.dimension(0);
    inputs_ = to_float(inputs);
    activations_ = ef::Tensor<float, 2>(rows, layout_.hidden);
    ef::Tensor<Compute, 2> logits(rows, layout_.classes);
    for (ef::Index r = 0; r < rows; ++r) {
      for (ef::Index h = 0; h < layout_.hidden; ++h) {
        float sum = weight<Compute>(layout_.first_bias(h));
        for (ef::Index f = 0; f < layout_.features; ++f)
          sum += weight<Compute>(layout_.first(h, f)) * rounded<Compute>(inputs_(r, f));
        activations_(r, h) = rounded<Compute>(std::tanh(sum));
      }
      for (ef::Index c = 0; c < layout_.classes; ++c) {
        float sum = weight<Compute>(layout_.second_bias(c));
        for (ef::Index h = 0; h < layout_.hidden; ++h)
          sum += weight<Compute>(layout_.second(c, h)) * activations_(r, h);
        logits(r, c) = static_cast<Compute>(sum);
      }
    }
    return logits;
  }

  template <typename Compute>
  void backward(const ef::Tensor<Compute, 2>& logits_gradient) {
    for (ef::Index r = 0; r < logits_gradient.dimension(0); ++r) {
      for (ef::Index h = 0; h < layout_.hidden; ++h) {
        float sum = 0;
        for (ef::Index c = 0; c < layout_.classes; ++c) {
          const float d = static_cast<float>(logits_gradient(r, c));
          sum += weight<Compute>(layout_.second(c, h)) * d;
          gradient_.data()[layout_.second(c, h)] += d * activations_(r, h);
        }
        const float back =
            rounded<Compute>(rounded<Compute>(sum) * (1 - activations_(r, h) * activations_(r, h)));
        gradient_.data()[layout_.first_bias(h)] += back;
        for (ef::Index f = 0; f < layout_.features; ++f)
          gradient_.data()[layout_.first(h, f)] += back * rounded<Compute>(inputs_(r, f));
      }
      for (ef::Index c = 0; c < layout_.classes; ++c)
        gradient_.data()[layout_.second_bias(c)] += static_cast<float>(logits_gradient(r, c));
    }
  }

  /// The two layers, each with its bias.
  std::vector<ef::Parameter> parameters() {
    const ef::Index split = static_cast<ef::Index>(layout_.second(0, 0));
    return {part(0, split), part(split, weights_.size() - split)};
  }

  ef::Tensor<float, 1>& weights() { return weights_; }
  ef::Tensor<float, 1>& gradient() { return gradient_; }
  const ef::reference::Mlp& layout() const { return layout_; }

  /// The same weights in double.
  ef::reference::Mlp reference() const {
    ef::reference::Mlp result = layout_;
    result.weights = {std::vector<double>(weights_.data(), weights_.data() + weights_.size())};
    return result;
  }

 private:
  template <typename Compute>
  static float rounded(float x) {
    return static_cast<float>(static_cast<Compute>(x));
  }
  template <typename Compute>
  float weight(std::size_t at) const {
    return rounded<Compute>(weights_.data()[at]);
  }
  template <typename Inputs>
  static ef::Tensor<float, 2> to_float(const Inputs& inputs) {
    ef::Tensor<float, 2> result(inputs.dimension(0), inputs.dimension(1));
    for (ef::Index i = 0; i < result.size(); ++i)
      result.data()[i] = static_cast<float>(inputs.data()[i]);
    return result;
  }
  ef::Parameter part(ef::Index begin, ef::Index size) {
    return ef::Parameter{ef::TensorView<float, 1>(weights_.data() + begin, size),
                         ef::TensorView<float, 1>(gradient_.data() + begin, size)};
  }

  ef::reference::Mlp layout_;
  ef::Tensor<float, 1> weights_, gradient_;
  ef::Tensor<float, 2> inputs_, activations_;
};

/// A micro-batch for TinyMlp, as a data loader yields them.
struct TinyBatch {
  ef::Tensor<float, 2> inputs;
  ef::Tensor<std::int32_t, 1> targets;
};

/// Every `ignored_every`-th target is -100 (0: none).
inline TinyBatch tiny_batch(ef::Index rows, ef::Index features, ef::Index classes, unsigned seed,
                            ef::Index ignored_every = 0) {
  TinyBatch batch{random_tensor<float, 2>({rows, features}, seed),
                  ef::Tensor<std::int32_t, 1>(rows)};
  for (ef::Index r = 0; r < rows; ++r) {
    const bool ignored = ignored_every > 0 && r % ignored_every == 0;
    batch.targets(r) =
        ignored ? -100
                : static_cast<std::int32_t>((r * 7 + static_cast<ef::Index>(seed)) % classes);
  }
  return batch;
}

/// The one big batch that micro-batches [begin, end) form.
inline TinyBatch joined(const std::vector<TinyBatch>& batches, std::size_t begin, std::size_t end) {
  ef::Index rows = 0;
  for (std::size_t i = begin; i < end; ++i) rows += batches[i].targets.size();
  TinyBatch big{ef::Tensor<float, 2>(rows, batches[begin].inputs.dimension(1)),
                ef::Tensor<std::int32_t, 1>(rows)};
  float* inputs = big.inputs.data();
  std::int32_t* targets = big.targets.data();
  for (std::size_t i = begin; i < end; ++i) {
    inputs = std::copy(batches[i].inputs.data(),
                       batches[i].inputs.data() + batches[i].inputs.size(), inputs);
    targets = std::copy(batches[i].targets.data(),
                        batches[i].targets.data() + batches[i].targets.size(), targets);
  }
  return big;
}

constexpr ef::Index kFeatures = 5, kHidden = 7, kClasses = 4;

inline TinyMlp new_model(unsigned seed = 3) { return TinyMlp(kFeatures, kHidden, kClasses, seed); }

/// Ragged, with ignored targets, one micro-batch all ignored and one empty.
inline std::vector<TinyBatch> ragged_batches(unsigned seed = 10) {
  std::vector<TinyBatch> batches;
  for (ef::Index rows : {3, 1, 6, 0, 2, 9, 4})
    batches.push_back(tiny_batch(rows, kFeatures, kClasses, ++seed,
                                 rows == 2  ? 1
                                 : rows > 3 ? 3
                                            : 0));
  return batches;
}

/// A reference's vector as a tensor.
inline ef::Tensor<double, 1> tensor(const std::vector<double>& x) {
  ef::Tensor<double, 1> result(static_cast<ef::Index>(x.size()));
  std::copy(x.begin(), x.end(), result.data());
  return result;
}

}  // namespace eigenformer_test
