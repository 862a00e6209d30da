/// \file
/// The CUDA kernels, one line each, the memory they work on and the graphs they go into. To add one
/// for an operator X that has a problem:
///
/// 1. cuda/X.cuh: a struct of pointers and sizes (the problem, mostly) with
///
///      static constexpr int kThreads = 256;          // which bounds the registers
///      template <typename Block>
///      EIGENFORMER_DEVICE void operator()(Block& block) const;
///
///    written over Block alone (block.cuh says what one can do, collectives.cuh what is built of
///    it) with std:: functions for arithmetic, so that the C++ compiler takes it as well as nvcc;
///    and execute(const Backend<D>& on, const problem::X& p), which calls launch, launch_rows or
///    launch_for_each (launch.cuh) with the bytes of shared memory that the kernel takes.
/// 2. Host memory of the problem that the kernel reads goes there by stage.cuh, all in one copy;
///    what a kernel leaves for the host comes back by fetch, for later kernels by with_scratch.
/// 3. The line below.
/// 4. tests/X/X_device_test.cpp over for_each_device: it runs on the host, on emulated blocks
///    under several schedules (races, divergent barriers and memory that is not the device's are
///    faults), and on a GPU where there is one; over for_each_gpu without the host.
/// 5. Its words in cmake/operators.cmake, which tests/compile/runs_on.cu compares.
#pragma once

#include "activation.cuh"
#include "attention.cuh"
#include "attention_backward.cuh"
#include "attention_merge.cuh"
#include "attention_scores.cuh"
#include "causal_mask.cuh"
#include "communicator.cuh"
#include "embedding.cuh"
#include "expert_feed_forward.cuh"
#include "expert_routing.cuh"
#include "graph.cuh"
#include "int4_linear.cuh"
#include "int8_linear.cuh"
#include "kv_cache.cuh"
#include "linear.cuh"
#include "linear_backward.cuh"
#include "linear_pack.cuh"
#include "log_softmax.cuh"
#include "loss.cuh"
#include "memory.cuh"
#include "normalization.cuh"
#include "normalization_backward.cuh"
#include "optimizer.cuh"
#include "quantization.cuh"
#include "rope.cuh"
#include "sampling.cuh"
#include "tensor_parallel.cuh"
#include "top_k.cuh"
#include "vocabulary_rows.cuh"
