// expect-success
#include <eigenformer/eigenformer.h>
int main() {
  eigenformer::Tensor<float, 2> logits(1, 2);
  logits.setZero();
  return eigenformer::greedy_sample(logits)(0);
}
