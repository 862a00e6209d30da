/// \file
/// What log-softmax asks for.
#pragma once

#include "../core/tensor.h"

namespace eigenformer {
inline namespace EIGENFORMER_VERSION_NAMESPACE {

namespace problem {

/// A checked request: pointers and sizes only.
template <typename Y, typename T>
struct LogSoftmax {
  Y* y;        // (rows, columns), may be the memory of x where Y is T
  const T* x;  // (rows, columns)
  Index rows, columns;
};

}  // namespace problem
}  // namespace EIGENFORMER_VERSION_NAMESPACE
}  // namespace eigenformer
