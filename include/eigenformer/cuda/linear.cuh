/// \file
/// CUDA kernels of linear layers with floating weights: which product a problem is multiplied with,
/// and what becomes of its sums. bfloat16 and half pairs go to the tensor cores
/// (tile/product.cuh), everything else to multiply-adds in float or double
/// (tile/lane_product.cuh); both say what they cost. One launch, without scratch; packed weights
/// (linear_pack.cuh) and plain ones are read by the same kernels.
#pragma once

#include <type_traits>

#include "epilogue.cuh"
#include "gemm.cuh"
#include "linear_pack.cuh"
#include "tile/lane_product.cuh"
#include "tile/product.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

template <typename T>
inline constexpr bool is_16_bit = std::is_same_v<T, bfloat16> || std::is_same_v<T, half>;

/// What tokens of X and weights of W are multiplied in.
template <typename X, typename W>
using factor_type = std::conditional_t<
    is_16_bit<X> && std::is_same_v<X, W>, X,
    std::conditional_t<std::is_same_v<X, double> || std::is_same_v<W, double>, double, float>>;

/// The same where the weight is plain: a float one is rounded to bfloat16 for bfloat16 tokens.
template <typename X, typename W>
using plain_factor_type =
    std::conditional_t<std::is_same_v<X, bfloat16> && std::is_same_v<W, float>, bfloat16,
                       factor_type<X, W>>;

/// The sums of floating weights, each with its bias.
template <typename Finish>
struct BiasedSums {
  Finish finish;

  template <typename C>
  EIGENFORMER_DEVICE void store(Index token, Index row, const C (&sums)[Finish::kMatrices]) const {
    C values[Finish::kMatrices];
    for (int m = 0; m < Finish::kMatrices; ++m)
      values[m] = sums[m] + finish.template bias<C>(row, m);
    finish.store(token, row, values);
  }
};

/// The layer of `matrices` (p.out, p.in), from one row of which to the next it is `stride`.
template <typename T, int Matrices, typename D, typename Problem, typename W>
void layer(const Backend<D>& on, const Problem& p, const W* const (&matrices)[Matrices],
           Index stride) {
  using Finish = decltype(finish_of<(Matrices > 1)>(p));
  const char* const name = Matrices > 1 ? "gated_linear" : "linear";
  const auto weight = operand<T, Matrices>(matrices, p.out, p.in, stride);
  const auto x = operand<T, 1>({p.x}, p.tokens, p.in, p.in);
  const BiasedSums<Finish> end{finish_of<(Matrices > 1)>(p)};
  if (layer_by_gemm(on, name, weight, x, end)) return;
  if constexpr (is_16_bit<T>)
    multiply_by_tiles<T>(on, name, weight, x, end);
  else
    multiply_by_lanes<T>(on, name, weight, x, end);
}

template <typename D, typename Y, typename X, typename W, int Matrices, typename E>
void execute(const Backend<D>& on, const problem::Linear<Y, X, W, Matrices, E>& p) {
  layer<plain_factor_type<X, W>>(on, p, p.weights, p.in);
}

template <typename D, typename Y, typename X, typename S, bool Gated, typename E>
  requires(!problem::is_quantized_weight<S>)
void execute(const Backend<D>& on, const problem::PackedLinear<Y, X, S, Gated, E>& p) {
  require_rows(p.weight, Gated ? "gated_linear" : "linear");
  const Index stride = packed_stride<S>(p.in);
  const S* const data = p.weight.data;
  if constexpr (Gated)
    layer<factor_type<X, S>, 2>(on, p, {data, data + p.out * stride}, stride);
  else
    layer<factor_type<X, S>, 1>(on, p, {data}, stride);
}

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
