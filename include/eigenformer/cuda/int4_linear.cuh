/// \file
/// CUDA kernels of linear layers over packed int4 weights. W4A8: x is quantized per token as for
/// int8 weights (int8_linear.cuh), and weights become int8 on their way to the tensor cores
/// (tile/grouped_product.cuh), the bits of the CPU; where groups have minimums, a kernel more sums
/// the quantized tokens of each group. W4A16: weights become floats in registers, by multiply-adds
/// (tile/lane_product.cuh): the bits of a PackedWeight<float> of what they stand for, out of an
/// eighth of its memory traffic.
#pragma once

#include <cmath>
#include <cstdint>

#include "int8_linear.cuh"
#include "linear.cuh"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace cuda {

/// Packed rows (int4.cuh) as rows of int8: u - 8 or, above minimums, u. Chunks of 16 from multiples
/// of 16 on.
template <int Matrices>
struct Int4Rows {
  static constexpr int kMatrices = Matrices;
  using Chunk = typename Operand<std::int8_t, std::int8_t>::Chunk;
  const int4* data[Matrices];
  Index rows, depth, stride;
  bool symmetric;

  EIGENFORMER_DEVICE const int4* line(int matrix, Index row) const {
    return (matrix == 0 ? data[0] : data[Matrices - 1]) + (row < rows ? row : rows - 1) * stride;
  }
  template <bool Inside>
  EIGENFORMER_DEVICE Chunk load(const int4* line, Index k) const {
    const auto words = *reinterpret_cast<const Pack<std::uint32_t, 2>*>(line + k / 2);
    Chunk values;
    for (int i = 0; i < 4; ++i) {
      const std::uint32_t u = words[i % 2] >> (i / 2 * 4) & 0x0f0f0f0fu;
      // 8 less in each byte: 128 more keeps borrows out of the next
      values[i] = symmetric ? ((u | 0x80808080u) - 0x08080808u) ^ 0x80808080u : u;
    }
    return values;
  }
};

/// The same as numbers, in chunks of 4: scale * (u - 8), or fma(scale, u, minimum).
template <int Matrices>
struct Int4Numbers {
  static constexpr int kMatrices = Matrices;
  const int4* data[Matrices];
  const float* scales[Matrices];    // (rows, groups)
  const float* minimums[Matrices];  // the same, or nullptr
  Index rows, depth, stride, group, groups;
  bool whole = true;  // rows are filled up

  struct Line {
    const int4* packed;
    const float *scales, *minimums;
  };
  EIGENFORMER_DEVICE Line line(int matrix, Index row) const {
    const int m = matrix == 0 ? 0 : Matrices - 1;
    const Index own = row < rows ? row : rows - 1;
    return {data[m] + own * stride, scales[m] + own * groups,
            minimums[m] == nullptr ? nullptr : minimums[m] + own * groups};
  }
  /// Zeros from the depth on, as those of a packed row of floats.
  template <bool Inside>
  EIGENFORMER_DEVICE Pack<float, 4> load(const Line& line, Index k) const {
    const std::uint32_t word =
        *reinterpret_cast<const std::uint32_t*>(line.packed + k / 16 * 8 + k % 8);
    const Index g = k / group;
    Pack<float, 4> numbers;
    for (int i = 0; i < 4; ++i) {
      const int u = static_cast<int>(word >> (8 * i + static_cast<int>(k % 16 / 8) * 4) & 15u);
      const float number = line.minimums == nullptr
                               ? line.scales[g] * static_cast<float>(u - 8)
                               : std::fma(line.scales[g], static_cast<float>(u), line.minimums[g]);
      numbers[i] = k + i < depth ? number : 0.0f;
    }
    return numbers;
  }
};

/// sums[at]: of the values of a token's group; at counts (tokens, groups).
struct SumGroupsBody {
  const std::int8_t* values;  // (tokens, stride), zeros past the inputs
  std::int32_t* sums;
  Index stride, group, groups;

  EIGENFORMER_DEVICE void operator()(Index at) const {
    const Index first = at % groups * group, token = at / groups;
    std::int32_t sum = 0;
    for (Index k = first; k < first + group && k < stride; ++k) sum += values[token * stride + k];
    sums[at] = sum;
  }
};

/// W4A8.
template <int Matrices, typename D, typename Problem, typename Finish>
void int4_by_int8(const Backend<D>& on, const char* name, const Problem& p,
                  const Int4Numbers<Matrices>& from, const Finish& finish) {
  const bool symmetric = from.minimums[0] == nullptr;
  Int4Rows<Matrices> weight{{}, from.rows, from.depth, from.stride, symmetric};
  GroupScales<Matrices> scales{{}, from.groups, from.group};
  for (int m = 0; m < Matrices; ++m) {
    weight.data[m] = from.data[m];
    scales.data[m] = from.scales[m];
    scales.minimums[m] = from.minimums[m];
  }
  const Index sums = symmetric ? 0 : p.tokens * from.groups;
  with_int8_tokens(
      on, name, p, sums * Index{sizeof(std::int32_t)},
      [&](const auto& x, const float* x_scales, std::byte* scratch) {
        auto* const token_sums = reinterpret_cast<std::int32_t*>(scratch);
        if (sums > 0)
          launch_for_each(on, name, sums,
                          SumGroupsBody{x.data[0], token_sums, x.stride, from.group, from.groups});
        scales.token_sums = token_sums;
        multiply_groups(on, name, weight, x, scales, GroupedSums<Finish>{finish, x_scales});
      });
}

template <typename D, typename Y, typename X, bool Gated, typename E>
void execute(const Backend<D>& on, const problem::PackedLinear<Y, X, int4, Gated, E>& p) {
  constexpr auto name = Gated ? "gated_linear" : "linear";
  constexpr int matrices = Gated ? 2 : 1;
  require_rows(p.weight, name);
  const auto finish = finish_of<Gated>(p);
  using Finish = std::remove_const_t<decltype(finish)>;
  const Index stride = packed_stride<int4>(p.in), groups = scale_groups(p.in, p.weight.group);
  Int4Numbers<matrices> weight{{}, {}, {}, p.out, p.in, stride, p.weight.group, groups};
  for (int m = 0; m < matrices; ++m) {
    weight.data[m] = p.weight.data + m * p.out * stride;
    weight.scales[m] = p.weight.scales + m * p.out * groups;
    if (p.weight.minimums != nullptr) weight.minimums[m] = p.weight.minimums + m * p.out * groups;
  }
  if (p.weight.quantizes_activations)
    int4_by_int8(on, name, p, weight, finish);
  else
    multiply_by_lanes<float>(on, name, weight, operand<float, 1>({p.x}, p.tokens, p.in, p.in),
                             BiasedSums<Finish>{finish});
}

}  // namespace cuda
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
