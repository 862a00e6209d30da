// flags: -DEIGEN_DEFAULT_DENSE_INDEX_TYPE=short
// expect: eigenformer: Eigen::Index is not std::ptrdiff_t, so EIGEN_DEFAULT_DENSE_INDEX_TYPE was set.
#include <eigenformer/core/eigen.h>
int main() {}
