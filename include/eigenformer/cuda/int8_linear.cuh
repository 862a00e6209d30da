/// \file
/// CUDA kernels of linear layers over int8 weights, plain or packed, with a scale for each row or
/// for each group of inputs. A first kernel quantizes x per token, one block per token (two reads
/// of x, the second out of L2, and a byte written per number); the products are exact sums in
/// int32, of rows by tile/product.cuh (or gemm.cuh), of groups by tile/grouped_product.cuh, which
/// say what they cost. The values are those of the CPU kernels, bit for bit, up to the activation
/// function. Rows of a plain weight that do not begin at multiples of 16 bytes are read byte by
/// byte: pack such weights.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "epilogue.cuh"
#include "gemm.cuh"
#include "linear_pack.cuh"
#include "quantization.cuh"
#include "stage.cuh"
#include "tile/grouped_product.cuh"
#include "tile/product.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

/// y from exact sums: fma(float(sum), x's scale * the row's scale, bias).
template <typename Finish>
struct ScaledSums {
  static constexpr int kMatrices = Finish::kMatrices;
  Finish finish;
  const float* x_scales;
  const float* scales[kMatrices];

  EIGENFORMER_DEVICE void store(Index token, Index row,
                                const std::int32_t (&sums)[kMatrices]) const {
    float values[kMatrices];
    for (int m = 0; m < kMatrices; ++m)
      values[m] = std::fma(static_cast<float>(sums[m]), x_scales[token] * scales[m][row],
                           finish.template bias<float>(row, m));
    finish.store(token, row, values);
  }
};

/// y from chains over groups: fma(chain, x's scale, bias).
template <typename Finish>
struct GroupedSums {
  static constexpr int kMatrices = Finish::kMatrices;
  Finish finish;
  const float* x_scales;

  EIGENFORMER_DEVICE void store(Index token, Index row, const float (&chains)[kMatrices]) const {
    float values[kMatrices];
    for (int m = 0; m < kMatrices; ++m)
      values[m] = std::fma(chains[m], x_scales[token], finish.template bias<float>(row, m));
    finish.store(token, row, values);
  }
};

/// multiply(x as an operand, its scales, more scratch of `bytes`): the x of a problem, quantized.
template <typename D, typename Problem, typename Multiply>
void with_int8_tokens(const Backend<D>& on, const char* name, const Problem& p, Index bytes,
                      Multiply&& multiply) {
  using X = std::remove_const_t<std::remove_pointer_t<decltype(p.x)>>;
  if (p.tokens == 0 || p.out == 0) return;
  const Index stride = packed_stride<std::int8_t>(p.in);
  with_scratch<std::int8_t, float, std::byte>(
      on, name, {p.tokens * stride, p.tokens, bytes},
      [&](std::int8_t* values, float* scales, std::byte* scratch) {
        quantize_rows(on, name,
                      problem::Quantize<X>{p.x, values, scales, p.tokens, p.in, p.in, false}, 1,
                      stride);
        multiply(operand<std::int8_t, 1>({values}, p.tokens, p.in, stride), scales, scratch);
      });
}

/// Sums of whole rows.
template <typename D, int Matrices, typename End>
void multiply_rows(const Backend<D>& on, const char* name,
                   const Operand<std::int8_t, std::int8_t, Matrices>& weight,
                   const Operand<std::int8_t, std::int8_t>& x, const End& end, std::byte* scratch) {
  if (!layer_by_gemm(on, name, weight, x, end, scratch))
    multiply_by_tiles<std::int8_t>(on, name, weight, x, end);
}

template <typename D, typename Y, typename X, typename E>
void execute(const Backend<D>& on, const problem::Int8Linear<Y, X, E>& p) {
  constexpr auto name = "int8_linear";
  using Sums = ScaledSums<decltype(finish_of<false>(p))>;
  const auto weight = operand<std::int8_t, 1>({p.values}, p.out, p.in, p.in);
  with_int8_tokens(on, name, p, gemm_scratch<std::int8_t>(p.tokens, p.out, 1),
                   [&](const auto& x, const float* x_scales, std::byte* scratch) {
                     const Sums end{finish_of<false>(p), x_scales, {p.scales}};
                     multiply_rows(on, name, weight, x, end, scratch);
                   });
}

template <typename D, typename Y, typename X, bool Gated, typename E>
void execute(const Backend<D>& on, const problem::PackedLinear<Y, X, std::int8_t, Gated, E>& p) {
  constexpr auto name = Gated ? "gated_linear" : "linear";
  constexpr int matrices = Gated ? 2 : 1;
  require_rows(p.weight, name);
  const auto finish = finish_of<Gated>(p);
  using Finish = std::remove_const_t<decltype(finish)>;
  const Index stride = packed_stride<std::int8_t>(p.in),
              groups = scale_groups(p.in, p.weight.group);
  const std::int8_t* values[matrices];
  GroupScales<matrices> scales{{}, groups, p.weight.group};
  for (int m = 0; m < matrices; ++m) {
    values[m] = p.weight.data + m * p.out * stride;
    scales.data[m] = p.weight.scales + m * p.out * groups;
  }
  const auto weight = operand<std::int8_t, matrices>(values, p.out, p.in, stride);
  const Index bytes = p.weight.group > 0 ? 0 : gemm_scratch<std::int8_t>(p.tokens, p.out, matrices);
  with_int8_tokens(
      on, name, p, bytes, [&](const auto& x, const float* x_scales, std::byte* scratch) {
        if (p.weight.group > 0) {
          multiply_groups(on, name, weight, x, scales, GroupedSums<Finish>{finish, x_scales});
        } else {
          ScaledSums<Finish> end{finish, x_scales, {}};
          for (int m = 0; m < matrices; ++m) end.scales[m] = scales.data[m];
          multiply_rows(on, name, weight, x, end, scratch);
        }
      });
}

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
