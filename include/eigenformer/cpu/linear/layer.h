/// \file
/// CPU kernels of linear layers and their gradients: which dot product of the tiles a problem is
/// multiplied with, and what becomes of its sums. The product itself is linear.h and parts.h.
#pragma once

#include <type_traits>

#include "../../problem/linear.h"
#include "pack.h"
#include "pack_int4.h"
#include "parts.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cpu {

/// What plain weights of W are packed to for activations of X.
template <typename X, typename W>
using operand_scalar = std::conditional_t<
    std::is_same_v<X, double> || std::is_same_v<W, double>, double,
    std::conditional_t<std::is_same_v<X, bfloat16> &&
                           (std::is_same_v<W, bfloat16> || std::is_same_v<W, float>),
                       bfloat16, float>>;

/// y = residual + function(sums).
template <bool Gated, typename Sums, typename Problem>
auto finish(const Sums& sums, const Problem& p) {
  using E = std::remove_cvref_t<decltype(p.epilogue)>;
  using Y = std::remove_pointer_t<decltype(p.y)>;
  return Finish<Sums, typename E::function, Gated, Y, typename E::residual_scalar>(
      sums, p.y, p.tokens, p.out, p.epilogue.residual);
}

/// What is multiplied for a layer.
template <typename Problem, typename Weights, typename End>
auto product_of(const Problem& p, const Weights& weights, const End& end) {
  using X = std::remove_const_t<std::remove_pointer_t<decltype(p.x)>>;
  return ProductProblem<X, Weights, End>{{p.x, p.in, 1}, weights, p.tokens, p.out, p.in, end};
}

template <typename D, typename Isa, typename Y, typename X, typename W, int Matrices, typename E>
void execute(const Backend<D, Isa>& on, const problem::Linear<Y, X, W, Matrices, E>& p) {
  using B = typename E::bias_scalar;
  product<tile::Dot<operand_scalar<X, W>, X, Isa>>(
      on, product_of(p, weight_rows<W, Matrices>(p.weights, p.out, p.in),
                     finish<(Matrices > 1)>(PlainSums<B>{p.epilogue.bias}, p)));
}

/// How layers of packed weights of S are multiplied: Dot, and what is multiplied for a layer.
template <typename DotOf, typename Make>
struct PackedProduct {
  using Dot = DotOf;
  Make make;
};
template <typename Dot, typename Make>
PackedProduct<Dot, Make> packed_product(const Make& make) {
  return {make};
}

/// Calls f(PackedProduct) of the one that weights like this one have, for layers of such a type.
template <typename Isa, typename Y, typename X, typename S, bool Gated, typename E, typename F>
void with_packed_product(const problem::PackedLinear<Y, X, S, Gated, E>& like, F&& f) {
  using Layer = problem::PackedLinear<Y, X, S, Gated, E>;
  using B = typename E::bias_scalar;
  if constexpr (std::is_same_v<S, std::int8_t>) {
    if (like.weight.group > 0)
      f(packed_product<tile::GroupedDot<Isa>>([](const Layer& p) {
        const auto& w = p.weight;
        return product_of(p, GroupedPanels{w.data, w.scales, w.half_scales, w.group},
                          finish<Gated>(GroupedSums<B>{p.epilogue.bias}, p));
      }));
    else
      f(packed_product<tile::Dot<S, X, Isa>>([](const Layer& p) {
        return product_of(p, PackedPanels<S>{p.weight.data},
                          finish<Gated>(ScaledSums<B>{p.epilogue.bias, p.weight.scales}, p));
      }));
  } else if constexpr (std::is_same_v<S, int4>) {
    constexpr auto panels = [](const problem::PackedPanels<const S>& w) {
      return Int4Panels{w.data, w.scales, w.group, w.minimums};
    };
    if (like.weight.quantizes_activations)
      f(packed_product<tile::Dot<S, X, Isa>>([panels](const Layer& p) {
        return product_of(p, panels(p.weight), finish<Gated>(GroupedSums<B>{p.epilogue.bias}, p));
      }));
    else
      f(packed_product<tile::Dot<float, X, Isa>>([panels](const Layer& p) {
        return product_of(p, WideInt4Panels{panels(p.weight)},
                          finish<Gated>(PlainSums<B>{p.epilogue.bias}, p));
      }));
  } else {
    f(packed_product<tile::Dot<S, X, Isa>>([](const Layer& p) {
      return product_of(p, PackedPanels<S>{p.weight.data},
                        finish<Gated>(PlainSums<B>{p.epilogue.bias}, p));
    }));
  }
}

template <typename D, typename Isa, typename Y, typename X, typename S, bool Gated, typename E>
void execute(const Backend<D, Isa>& on, const problem::PackedLinear<Y, X, S, Gated, E>& p) {
  require_layout(Isa{}, p.weight, Gated ? "gated_linear" : "linear");
  with_packed_product<Isa>(p, [&](const auto& layer) {
    product<typename std::remove_cvref_t<decltype(layer)>::Dot>(on, layer.make(p));
  });
}

template <typename D, typename Isa, typename Y, typename X, typename E>
void execute(const Backend<D, Isa>& on, const problem::Int8Linear<Y, X, E>& p) {
  using B = typename E::bias_scalar;
  product<tile::Dot<std::int8_t, X, Isa>>(
      on, product_of(p, weight_rows<std::int8_t, 1>({p.values}, p.out, p.in),
                     finish<false>(ScaledSums<B>{p.epilogue.bias, p.scales}, p)));
}

template <typename D, typename Isa, typename X, typename Y, typename W>
void execute(const Backend<D, Isa>& on, const problem::LinearBackwardInput<X, Y, W>& p) {
  using Dot = tile::Dot<operand_scalar<Y, W>, Y, Isa>;
  using End = Finish<PlainSums<float>, problem::Identity, false, X, float>;
  product<Dot>(on, ProductProblem<Y, WeightRows<W, 1>, End>{
                       {p.grad_y, p.out, 1},
                       {{{p.weight, 1, p.in}}, p.in},
                       p.tokens,
                       p.in,
                       p.out,
                       End(PlainSums<float>{nullptr}, p.grad_x, p.tokens, p.in, nullptr)});
}

template <typename D, typename Isa, typename G, typename Y, typename X>
void execute(const Backend<D, Isa>& on, const problem::LinearBackwardWeight<G, Y, X>& p) {
  constexpr bool narrow =
      std::is_same_v<X, bfloat16> && std::is_same_v<Y, bfloat16> && std::is_same_v<G, float>;
  using Dot = tile::Dot<std::conditional_t<narrow, bfloat16, G>, Y, Isa>;
  product<Dot>(on, ProductProblem<Y, WeightRows<X, 1>, AddSums<G>>{{p.grad_y, 1, p.out},
                                                                   {{{p.x, 1, p.in}}, p.in},
                                                                   p.out,
                                                                   p.in,
                                                                   p.tokens,
                                                                   {p.grad_weight, p.in}});
}

template <typename D, typename Isa, typename G, typename Y>
void execute(const Backend<D, Isa>& on, const problem::LinearBackwardBias<G, Y>& p) {
  using V = simd::Vec<G, Isa>;
  const Index blocks = (p.out + V::lanes - 1) / V::lanes;
  parallel_for(on, blocks, Cost{p.tokens * V::lanes, kPackCycles},
               [&](Index first, Index last, int) {
                 const Index end = (std::min)(last * V::lanes, p.out);
                 for_each_vector<V>(first * V::lanes, end, [&](Index at, auto part) {
                   V sum = load<V>(p.grad_bias + at, part);
                   for (Index r = 0; r < p.tokens; ++r)
                     sum = sum + load<V>(p.grad_y + r * p.out + at, part);
                   store(sum, p.grad_bias + at, part);
                 });
               });
}

}  // namespace cpu
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
