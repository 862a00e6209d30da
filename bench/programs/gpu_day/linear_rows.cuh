/// \file
/// Linear layers of 8192 x 8192 weights: a token and a small batch are bound by the bytes of the
/// weights, many tokens by products of tiles.
#pragma once

#include <eigenformer/linear.h>

#include <memory>

#include "cublaslt.cuh"

namespace gpu_day {
namespace linear {

using T = ef::bfloat16;
constexpr Index kSize = 8192;

template <typename S, typename D>
void add_packed(Rows& rows, const char* scalar, Index tokens, Peak peak) {
  if constexpr (ef::RunsOn<
                    ef::cuda::Backend<D>,
                    ef::problem::PackedLinear<T, T, S, false, typename ef::Epilogue<>::pointers>>) {
    const double m = static_cast<double>(tokens), n = kSize;
    Row row{"linear",
            "linear " + std::to_string(tokens) + " x 8192 x 8192 " + scalar,
            n * n * sizeof(S) + 4 * m * n,
            2 * m * n * n,
            peak,
            [=](Memory& memory) -> Call {
              const D& device = memory.device();
              auto weight = std::make_shared<ef::PackedWeight<S>>(
                  ef::pack_weight<S>(device, memory.tensor<T>(kSize, kSize)));
              auto x = memory.tensor<T>(tokens, kSize), y = memory.tensor<T>(tokens, kSize);
              return [=, &memory] {
                const D& on = memory.device();
                ef::linear_into(on, y, x, *weight);
              };
            }};
    if constexpr (std::is_same_v<S, T>)
      if (Prepare peer = cublaslt_linear(tokens, kSize, kSize)) row.peers = {{"cuBLASLt", peer}};
    rows.push_back(std::move(row));
  }
}

}  // namespace linear

inline void add_linear_rows(Rows& rows) {
  using namespace linear;
  for (Index tokens : {1, 16, 512, 4096}) {
    add_packed<T, Eigen::GpuDevice>(rows, "bfloat16", tokens, Peak::bfloat16);
    add_packed<std::int8_t, Eigen::GpuDevice>(rows, "int8", tokens, Peak::int8);
  }
}

}  // namespace gpu_day
