/// \file
/// oneDNN 2 or 3 as a peer: matrix products with weights in the layout that oneDNN prefers, packed
/// before timing.
#pragma once

#include <functional>
#include <string>

#include "product.h"

namespace bench::onednn {

/// For example "oneDNN 2.6.3".
std::string version();

/// A call f(threads) that writes the product into y (tokens, out). It builds its primitive and
/// packs the weights on the first call with a number of threads. bfloat16 and INT8 inputs are
/// converted beforehand, INT8 with one scale for x and one for each row of w.
std::function<void(int threads)> matmul(const Product& product, std::shared_ptr<float> y);

}  // namespace bench::onednn
