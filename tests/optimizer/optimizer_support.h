/// \file
/// Parameters for the tests of optimizers.
#pragma once

#include <algorithm>
#include <vector>

#include <eigenformer/optimizer.h>

#include "compare.h"

namespace eigenformer_test {

/// Parameters of the given sizes with random weights and gradients.
struct Model {
  explicit Model(const std::vector<Index>& sizes, unsigned seed = 1) {
    for (Index size : sizes) {
      values.push_back(random_tensor<float, 1>({size}, seed++));
      gradients.push_back(random_tensor<float, 1>({size}, seed++));
    }
  }
  std::vector<ef::Parameter> parameters() {
    std::vector<ef::Parameter> result;
    for (std::size_t i = 0; i < values.size(); ++i)
      result.push_back(
          ef::Parameter{ef::TensorView<float, 1>(values[i].data(), values[i].size()),
                        ef::TensorView<float, 1>(gradients[i].data(), gradients[i].size())});
    return result;
  }
  void new_gradients(unsigned seed) {
    for (auto& gradient : gradients) {  // in place: the optimizer refers to this memory
      const auto fresh = random_tensor<float, 1>({gradient.size()}, seed++);
      std::copy(fresh.data(), fresh.data() + fresh.size(), gradient.data());
    }
  }
  std::vector<ef::Tensor<float, 1>> values, gradients;
};

inline std::vector<double> doubles(const ef::Tensor<float, 1>& x) {
  return {x.data(), x.data() + x.size()};
}

}  // namespace eigenformer_test
