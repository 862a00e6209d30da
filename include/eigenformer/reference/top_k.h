/// \file
/// Top-k by a stable sort: what the tests and a doubting user compare with.
#pragma once

#include <algorithm>
#include <numeric>
#include <vector>

#include "../top_k.h"

namespace eigenformer {
inline namespace EIGENFORMER_ABI {
namespace reference {

/// The ids (rows, k), of rows without NaN.
inline Tensor<std::int32_t, 2> top_k(const Tensor<double, 2>& x, Index k,
                                     const TopKOptions& options = {}) {
  Tensor<std::int32_t, 2> ids(x.dimension(0), k);
  std::vector<std::int32_t> order(static_cast<std::size_t>(x.dimension(1)));
  for (Index r = 0; r < x.dimension(0); ++r) {
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](std::int32_t a, std::int32_t b) {
      return options.largest ? x(r, a) > x(r, b) : x(r, a) < x(r, b);
    });
    if (!options.sorted) std::sort(order.begin(), order.begin() + k);
    std::copy_n(order.begin(), k, ids.data() + r * k);
  }
  return ids;
}

}  // namespace reference
}  // namespace EIGENFORMER_ABI
}  // namespace eigenformer
