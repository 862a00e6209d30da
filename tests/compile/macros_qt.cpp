// expect-success
// Qt's keywords, which any of its headers defines unless QT_NO_KEYWORDS is set.
// foreign_macros.cmake has more of the kind.
#define EIGEN_USE_THREADS
#define EIGEN_MAX_ALIGN_BYTES 64
#include <unsupported/Eigen/CXX11/Tensor>
#define slots
#define signals public
#define emit
#define foreach(variable, container) for (variable : container)
#include <eigenformer/eigenformer.h>
int main() {}
