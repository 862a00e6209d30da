// flags: -Wfatal-errors -UEIGEN_MAX_ALIGN_BYTES
// expect: eigenformer: EIGEN_MAX_ALIGN_BYTES is not 64.
#include <Eigen/Dense>

#include <eigenformer/eigenformer.h>
int main() {}
