// expect: eigenformer: this argument is neither an ef::Tensor nor an ef::TensorView. Evaluate an Eigen expression into an
#include <eigenformer/eigenformer.h>
int main() {
  eigenformer::Tensor<float, 2> logits(1, 2);
  logits.setZero();
  return eigenformer::greedy_sample(logits * 2.0f)(0);
}
