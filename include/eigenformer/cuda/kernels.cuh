/// \file
/// The CUDA kernels, one line each, and the memory they work on.
#pragma once

#include "causal_mask.cuh"
#include "kv_cache.cuh"
#include "memory.cuh"
#include "normalization.cuh"
#include "quantization.cuh"
#include "sampling.cuh"
