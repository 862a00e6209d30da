// flags: -Wfatal-errors
// expect: eigenformer: Eigen's Tensor module was included before eigenformer without EIGEN_USE_THREADS, so half of it is missing.
#undef EIGEN_USE_THREADS
#include <unsupported/Eigen/CXX11/Tensor>

#include <eigenformer/eigenformer.h>
