// expect: eigenformer: this tensor is column-major, which is Eigen's default. Declare it as ef::Tensor<T, Rank> (row-major)
#include <eigenformer/eigenformer.h>
int main() {
  Eigen::Tensor<float, 2> logits(1, 2);
  logits.setZero();
  return eigenformer::greedy_sample(logits)(0);
}
