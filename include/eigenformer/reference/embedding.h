/// \file
/// Embedding and its gradient in plain loops: what the tests and a doubting user compare with.
#pragma once

#include "../embedding.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace reference {

inline Tensor<double, 2> embedding(const Tensor<std::int32_t, 1>& ids,
                                   const Tensor<double, 2>& table) {
  Tensor<double, 2> y(ids.dimension(0), table.dimension(1));
  for (Index t = 0; t < y.dimension(0); ++t)
    for (Index j = 0; j < y.dimension(1); ++j) y(t, j) = table(ids(t), j);
  return y;
}

inline void embedding_backward(Tensor<double, 2>& grad_table, const Tensor<double, 2>& grad_y,
                               const Tensor<std::int32_t, 1>& ids) {
  for (Index t = 0; t < grad_y.dimension(0); ++t)
    for (Index j = 0; j < grad_y.dimension(1); ++j) grad_table(ids(t), j) += grad_y(t, j);
}

}  // namespace reference
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
