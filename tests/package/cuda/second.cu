// A second file of the program: kernels that the first has too, and one more.
#include <eigenformer/causal_mask.h>
#include <eigenformer/normalization.h>

namespace ef = eigenformer;

void norm(const Eigen::GpuDevice& device, ef::TensorView<float, 2> x,
          ef::TensorView<const float, 1> weight) {
  ef::rms_norm_into(device, x, x, weight);
}

void mask(const Eigen::GpuDevice& device, ef::TensorView<float, 3> mask) {
  ef::causal_mask_into(device, mask);
}
