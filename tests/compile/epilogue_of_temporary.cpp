// expect: eigenformer: an epilogue holds a view, and this tensor ends with the expression. Give it a name first.
#include <eigenformer/linear.h>
int main() {
  const auto epilogue = eigenformer::Epilogue{}.bias(eigenformer::Tensor<float, 1>(4));
  return epilogue.bias_size() == 4;
}
