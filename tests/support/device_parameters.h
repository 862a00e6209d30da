/// \file
/// Parameters of a model, their gradients and the state of an optimizer on a device.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include <eigenformer/optimizer.h>

#include "device.h"

namespace eigenformer_test {

/// Parameters in the memory of a bench's device, from the vectors `values` and `gradients` of a
/// model on the host.
template <typename B>
struct DeviceParameters {
  template <typename Model>
  DeviceParameters(const B& on, const Model& model) : bench(on) {
    for (std::size_t i = 0; i < model.values.size(); ++i) {
      values.push_back(std::make_unique<Tensor>(on, model.values[i]));
      gradients.push_back(std::make_unique<Tensor>(on, model.gradients[i]));
    }
  }
  std::vector<ef::Parameter> parameters() const {
    std::vector<ef::Parameter> result;
    for (std::size_t i = 0; i < values.size(); ++i)
      result.push_back({values[i]->view(), gradients[i]->view()});
    return result;
  }
  ef::Tensor<float, 1> state(std::span<const float> memory) const {
    ef::Tensor<float, 1> result(static_cast<Index>(memory.size()));
    bench.to_host(result.data(), memory.data(), result.size());
    return result;
  }

  using Tensor = DeviceTensor<B, float, 1>;
  const B& bench;
  std::vector<std::unique_ptr<Tensor>> values, gradients;
};

}  // namespace eigenformer_test
