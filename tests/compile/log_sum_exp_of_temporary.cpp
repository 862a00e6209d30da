// expect: eigenformer: log_sum_exp would be written into a temporary tensor
#include <eigenformer/attention.h>
int main() {
  const eigenformer::AttentionOptions options{.log_sum_exp = eigenformer::Tensor<float, 2>(1, 2)};
  return options.log_sum_exp.present();
}
