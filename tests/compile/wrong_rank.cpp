// expect: eigenformer: this tensor has the wrong rank for this argument
#include <eigenformer/eigenformer.h>
int main() {
  eigenformer::Tensor<float, 3> logits(1, 1, 2);
  logits.setZero();
  return eigenformer::greedy_sample(logits)(0);
}
