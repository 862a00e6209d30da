/// \file
/// What top-k asks for.
#pragma once

#include <cstdint>

#include "../core/tensor.h"
#include "sampling_params.h"

namespace eigenformer {
inline namespace EIGENFORMER_VERSION_NAMESPACE {

namespace problem {

/// A checked request: pointers and sizes only.
template <typename T>
struct TopK {
  const T* x;              // (rows, columns)
  T* values;               // (rows, k)
  std::int32_t* ids;       // (rows, k)
  SampleStatus* statuses;  // (rows), or nullptr
  Index rows, columns, k;  // k at most columns
  bool largest, sorted;
};

}  // namespace problem
}  // namespace EIGENFORMER_VERSION_NAMESPACE
}  // namespace eigenformer
