/// \file
/// OpenBLAS as a peer: float matrix products. It has no packed weights; sgemm packs on every call.
#pragma once

#include <functional>
#include <string>

#include "product.h"

namespace bench::openblas {

/// For example "OpenBLAS 0.3.21".
std::string version();

/// A call f(threads) that writes the product into y (tokens, out): sgemv for one token, sgemm for
/// more. Takes float only.
std::function<void(int threads)> matmul(const Product& product, std::shared_ptr<float> y);

}  // namespace bench::openblas
