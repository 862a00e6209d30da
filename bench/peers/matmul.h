/// \file
/// The peers of a matrix product, as rows of a benchmark. Peers that were not found when the build
/// was configured are left out.
///
///   add_matmul_peers(row, tokens, in, out, x, w);                        // oneDNN, OpenBLAS
///   add_matmul_peers(row, tokens, in, out, x, w, WeightType::bfloat16);  // w, x: oneDNN
///   add_matmul_peers(row, tokens, in, out, x, w, WeightType::int8);      // w, x: oneDNN
///
/// x (tokens, in) and w (out, in) are std::shared_ptr of float tensors; peers convert and pack
/// before they are timed, so their figures leave out quantizing the input. They write float.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "../report/harness.h"
#include "product.h"

namespace bench {

/// Names and versions of the peers in this build.
std::vector<std::string> peer_versions();

void add_matmul_peers(Row& row, const Product& product);

template <typename X, typename W>
void add_matmul_peers(Row& row, Eigen::Index tokens, Eigen::Index in, Eigen::Index out,
                      const std::shared_ptr<X>& x, const std::shared_ptr<W>& w,
                      WeightType type = WeightType::float32, int copies = 1) {
  add_matmul_peers(row, Product{tokens, in, out, std::shared_ptr<const float>(x, x->data()),
                                std::shared_ptr<const float>(w, w->data()), type, copies});
}

}  // namespace bench
