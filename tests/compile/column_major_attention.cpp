// expect: eigenformer: this tensor is column-major, which is Eigen's default. Declare it as ef::Tensor<T, Rank> (row-major)
#include <eigenformer/eigenformer.h>
int main() {
  Eigen::Tensor<float, 4> q(1, 2, 1, 4);
  const std::vector<int> lengths{2};
  eigenformer::batched_attention_with_padding(q, q, q, lengths);
}
