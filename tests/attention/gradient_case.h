/// \file
/// A random case of attention_backward, its loss and gradients, and their comparison with the
/// definition.
#pragma once

#include "attention_case.h"

namespace eigenformer_test {

/// loss = sum of weights * attention(q, k, v); weights and outputs of padding rows are NaN for the
/// backward pass.
template <typename T>
struct GradientCase : AttentionCase<T> {
  ef::Tensor<T, 4> weights, out;
  ef::Tensor<ef::compute_type<T>, 3> lse;

  GradientCase(const AttentionShape& s, std::vector<Index> lengths, unsigned seed = 1)
      : AttentionCase<T>(s, std::move(lengths), seed),
        weights(random_tensor<T, 4>({s.batch, s.queries, s.heads, s.value_dim}, seed + 3)),
        out(s.batch, s.queries, s.heads, s.value_dim),
        lse(s.batch, s.heads, s.queries) {}

  ef::Tensor<T, 4> forward(const ef::AttentionOptions& options) const {
    return ef::batched_attention_with_padding(this->q, this->k, this->v, this->key_lengths,
                                              options);
  }

  double loss(const ef::AttentionOptions& options) const {
    const auto result = forward(options);
    double sum = 0;
    for (Index i = 0; i < result.size(); ++i)
      sum += static_cast<double>(weights.data()[i]) * static_cast<double>(result.data()[i]);
    return sum;
  }

  auto reference_gradients(const ef::AttentionOptions& options) const {
    return ef::reference::attention_backward(to_double(weights), to_double(this->q),
                                             to_double(this->k), to_double(this->v),
                                             this->key_lengths, this->query_lengths, options);
  }

  template <typename D>
  auto gradients(const D& device, ef::AttentionOptions options) {
    options.log_sum_exp = lse;
    out = forward(options);
    auto grad_out = weights;
    const auto& s = this->shape;
    for (Index b = 0; b < s.batch; ++b)
      for (Index i = this->query_lengths[static_cast<std::size_t>(b)]; i < s.queries; ++i)
        for (Index x = 0; x < s.heads * s.value_dim; ++x)
          (&grad_out(b, i, 0, 0))[x] = (&out(b, i, 0, 0))[x] = std::numeric_limits<T>::quiet_NaN();
    return ef::attention_backward(device, grad_out, this->q, this->k, this->v, out, lse,
                                  this->key_lengths, options);
  }
};

/// P and dS are rounded to bfloat16 before their products, where these are: single elements take
/// part in few sums, whose errors cancel less than those of the whole.
template <typename T>
inline constexpr double kElementFactor = std::is_same_v<T, ef::bfloat16> ? 3 : 1;

/// Every element of every gradient against the formulas in double, which gradients.cpp holds
/// against the derivative in small cases.
template <typename T>
void check_against_definition(GradientCase<T>& c, const NamedOptions& named,
                              double bound = tolerance<T>(),
                              double element_factor = kElementFactor<T>) {
  SCOPED_TRACE(named.name);
  ef::AttentionOptions options = named.options;
  std::vector<float> sinks_gradient(options.sinks.size(), 7.0f);
  options.sinks_gradient = sinks_gradient;
  if (c.shape.queries != c.shape.keys || c.query_lengths != c.key_lengths)
    options.query_lengths = c.query_lengths;
  const auto g = c.gradients(Eigen::DefaultDevice{}, options);
  const auto expected = c.reference_gradients(options);
  EXPECT_TRUE(within(g.grad_q, expected.grad_q, bound, element_factor * bound));
  EXPECT_TRUE(within(g.grad_k, expected.grad_k, bound, element_factor * bound));
  EXPECT_TRUE(within(g.grad_v, expected.grad_v, bound, element_factor * bound));
  for (std::size_t h = 0; h < sinks_gradient.size(); ++h)
    EXPECT_NEAR(sinks_gradient[h], expected.grad_sinks[h],
                std::max(bound, 1e-6) * (1 + std::abs(expected.grad_sinks[h])))
        << h;
}

template <typename T>
class AttentionGradientScalars : public ::testing::Test {};
using GradientScalars = ::testing::Types<float, ef::bfloat16, ef::half>;
TYPED_TEST_SUITE(AttentionGradientScalars, GradientScalars);

}  // namespace eigenformer_test
