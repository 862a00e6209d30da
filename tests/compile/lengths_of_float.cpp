// expect: eigenformer: this argument holds lengths or offsets, which are integers
#include <eigenformer/attention.h>
int main() {
  eigenformer::Tensor<float, 3> x(1, 2, 4);
  eigenformer::batched_attention_with_padding(x, x, x, std::vector<float>{2});
}
