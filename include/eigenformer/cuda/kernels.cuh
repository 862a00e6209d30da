/// \file
/// The CUDA kernels, one line each.
#pragma once

#include "causal_mask.cuh"
#include "kv_cache.cuh"
#include "normalization.cuh"
#include "quantization.cuh"
#include "sampling.cuh"
