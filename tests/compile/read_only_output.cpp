// expect: eigenformer: the output is read-only; pass a mutable ef::Tensor or an ef::TensorView of non-const T.
#include <eigenformer/eigenformer.h>
int main() {
  const eigenformer::Tensor<float, 3> mask(1, 2, 2);
  eigenformer::causal_mask_into(Eigen::DefaultDevice{}, mask);
}
