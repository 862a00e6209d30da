// flags: -Wfatal-errors -UEIGEN_MAX_ALIGN_BYTES -DEIGEN_MAX_ALIGN_BYTES=32
// expect: eigenformer: EIGEN_MAX_ALIGN_BYTES is not 64.
#include <eigenformer/linear.h>
int main() {}
