// Gradients of attention where all is bfloat16: some instruction sets multiply pairs of it, with P
// and dS rounded to bfloat16.

#include "gradient_case.h"

using namespace eigenformer_test;

namespace {

using Scalar = ef::bfloat16;
using Gradients = ef::AttentionGradients<Scalar, 4>;

/// f(tag) for the best ISA, and below AMX the one with pairs in vectors.
template <typename F>
void for_each_pair_isa(F&& f) {
#if defined(EIGENFORMER_ISA_AMX)
  provide_amx();
  f(ef::isa::avx512_bf16{});
#endif
  f(ef::isa::best{});
}

template <typename D>
Gradients gradients_on(const D& device, const GradientCase<Scalar>& c,
                       const ef::AttentionOptions& options) {
  const auto& s = c.shape;
  Gradients g{poisoned_tensor<Scalar, 4>({s.batch, s.queries, s.heads, s.head_dim}),
              poisoned_tensor<Scalar, 4>({s.batch, s.keys, s.kv_heads, s.head_dim}),
              poisoned_tensor<Scalar, 4>({s.batch, s.keys, s.kv_heads, s.value_dim})};
  ef::attention_backward_into(device, g.grad_q, g.grad_k, g.grad_v, c.weights, c.q, c.k, c.v, c.out,
                              c.lse, c.key_lengths, options);
  return g;
}

bool same_gradients(const Gradients& a, const Gradients& b) {
  return same_bits(a.grad_q, b.grad_q) && same_bits(a.grad_k, b.grad_k) &&
         same_bits(a.grad_v, b.grad_v);
}

// Widths, rows and keys around those of panels, tiles and groups of rows.
TEST(AttentionGradientsBfloat16, AreTheDefinitionForEveryShape) {
  for (const AttentionShape& s : {AttentionShape{1, 1, 1, 1, 1, 1, 1},
                                  {2, 70, 70, 4, 2, 31, 33},
                                  {1, 13, 130, 1, 1, 64, 32},
                                  {1, 97, 65, 2, 1, 33, 65},
                                  {2, 12, 66, 4, 2, 128, 40},
                                  {1, 193, 193, 3, 3, 2, 96}}) {
    std::vector<Index> lengths(static_cast<std::size_t>(s.batch), s.keys);
    if (s.batch == 2) lengths[1] -= 3;
    GradientCase<Scalar> c(s, lengths);
    for (const ef::AttentionOptions& options :
         {ef::AttentionOptions{},
          ef::AttentionOptions{.causal = true, .window = 40, .softcap = 3}}) {
      SCOPED_TRACE("head " + std::to_string(s.head_dim));
      const auto expected = c.reference_gradients(options);
      for_each_pair_isa([&](auto isa) {
        const Gradients g = gradients_on(on(isa), c, options);
        const double bound = tolerance<Scalar>(), element = 2 * bound;
        EXPECT_TRUE(within(g.grad_q, expected.grad_q, bound, element)) << isa.name;
        EXPECT_TRUE(within(g.grad_k, expected.grad_k, bound, element)) << isa.name;
        EXPECT_TRUE(within(g.grad_v, expected.grad_v, bound, element)) << isa.name;
      });
    }
  }
}

TEST(AttentionGradientsBfloat16, BitsDoNotDependOnThreadsOrBatch) {
  const GradientCase<Scalar> c({2, 210, 210, 4, 2, 24, 40}, {210, 133});
  GradientCase<Scalar> alone({1, 210, 210, 4, 2, 24, 40}, {133});
  std::copy_n(&c.q(1, 0, 0, 0), alone.q.size(), alone.q.data());
  std::copy_n(&c.k(1, 0, 0, 0), alone.k.size(), alone.k.data());
  std::copy_n(&c.v(1, 0, 0, 0), alone.v.size(), alone.v.data());
  std::copy_n(&c.weights(1, 0, 0, 0), alone.weights.size(), alone.weights.data());
  const ef::AttentionOptions options{.causal = true, .window = 100, .prefix_length = 4};
  for_each_pair_isa([&](auto isa) {
    const Gradients g = gradients_on(on(isa), c, options);
    for (const int count : {2, 3}) {
      Threads threads(count);
      EXPECT_TRUE(
          same_gradients(g, gradients_on(ef::cpu::backend(threads.device, isa), c, options)))
          << isa.name;
    }
    const Gradients a = gradients_on(on(isa), alone, options);
    const auto equal = [](const auto& x, const Scalar* y) {
      return std::memcmp(x.data(), y, static_cast<std::size_t>(x.size()) * sizeof(Scalar)) == 0;
    };
    EXPECT_TRUE(equal(a.grad_q, &g.grad_q(1, 0, 0, 0))) << isa.name;
    EXPECT_TRUE(equal(a.grad_k, &g.grad_k(1, 0, 0, 0))) << isa.name;
    EXPECT_TRUE(equal(a.grad_v, &g.grad_v(1, 0, 0, 0))) << isa.name;
  });
}

// Key 71, in the middle of a block and of a pair, seen by rows 71 to 75, which see keys 67 to 75;
// row 37, which sees keys 33 to 37.
TEST(AttentionGradientsBfloat16, NaNReachesOnlyWhatItTakesPartIn) {
  const GradientCase<Scalar> c({1, 100, 100, 2, 1, 24, 40}, {100});
  const Scalar nan = std::numeric_limits<Scalar>::quiet_NaN(),
               infinity = std::numeric_limits<Scalar>::infinity();
  const ef::AttentionOptions options{.causal = true, .window = 5};
  for (const int where : {0, 1, 2, 3}) {
    SCOPED_TRACE(where);
    GradientCase<Scalar> bad = c;
    if (where == 0) bad.k(0, 71, 0, 3) = nan;
    if (where == 1) bad.v(0, 71, 0, 39) = infinity;
    if (where == 2) bad.q(0, 37, 1, 23) = infinity;
    if (where == 3) bad.weights(0, 37, 1, 0) = nan;
    const Index first_row = where < 2 ? 71 : 37, last_row = where < 2 ? 75 : 37,
                first_key = first_row - 4, last_key = last_row;
    for_each_pair_isa([&](auto isa) {
      const Gradients clean = gradients_on(on(isa), c, options),
                      g = gradients_on(on(isa), bad, options);
      for (Index i = 0; i < 100; ++i) {
        const bool row = first_row <= i && i <= last_row, key = first_key <= i && i <= last_key;
        for (Index x = 0; x < 24; ++x) {
          EXPECT_EQ(std::isnan(static_cast<float>(g.grad_q(0, i, 1, x))), row) << i;
          EXPECT_EQ(std::isnan(static_cast<float>(g.grad_k(0, i, 0, x))), key) << i;
        }
        for (Index x = 0; x < 40; ++x)
          EXPECT_EQ(std::isnan(static_cast<float>(g.grad_v(0, i, 0, x))), key) << i;
        if (!row) {
          EXPECT_EQ(std::memcmp(&g.grad_q(0, i, 0, 0), &clean.grad_q(0, i, 0, 0), 96), 0) << i;
        }
        if (key) continue;
        EXPECT_EQ(std::memcmp(&g.grad_k(0, i, 0, 0), &clean.grad_k(0, i, 0, 0), 48), 0) << i;
        EXPECT_EQ(std::memcmp(&g.grad_v(0, i, 0, 0), &clean.grad_v(0, i, 0, 0), 80), 0) << i;
      }
    });
  }
}

}  // namespace
