/// \file
/// eigenformer: transformer kernels on Eigen tensors. The table of contents: one line per operator;
/// each header is its manual.
#pragma once

// The nine systems
#include "attention.h"     // padded, packed and cached attention, and its gradients
#include "causal_mask.h"   // causal, sliding-window, prefix and packed-document masks; ALiBi
#include "communicator.h"  // ranks: alone, as threads, over MPI
#include "grad_scaler.h"   // loss scaling for mixed precision
#include "kv_cache.h"      // keys and values of a batch: append, truncate, reserve, INT8 storage
#include "linear.h"        // linear layers over plain and packed weights, and their gradients
#include "paged_kv_cache.h"  // keys and values in pages: any lengths, forks, shared prefixes, save and load
#include "quantization.h"     // symmetric INT8; the exact INT8 linear layer
#include "sampling.h"         // filters, penalties, exact probabilities, speculation
#include "scheduler.h"        // continuous batching
#include "tensor_parallel.h"  // column- and row-parallel layers, vocabulary-parallel sampling
#include "training.h"         // training steps with gradient accumulation and in mixed precision

// What every operator shares
#include "parallel_region.h"  // keeps a pool's threads awake over several operators
#include "step_graph.h"       // CUDA graphs around a step

// What a decoder needs besides
#include "activation.h"           // SiLU, GELU, ReLU, gated pairs, residual sums
#include "beam_search.h"          // beam search, step by step
#include "decoder.h"              // a Llama-shaped decoder out of all of these
#include "embedding.h"            // tokens to vectors
#include "expert_feed_forward.h"  // mixture of experts: products by expert and their sums
#include "expert_routing.h"       // which experts a token goes through, and the order by expert
#include "log_softmax.h"          // logarithms of probabilities
#include "loss.h"                 // softmax cross-entropy
#include "normalization.h"        // RMSNorm, LayerNorm
#include "optimizer.h"            // AdamW, SGD, gradient clipping
#include "rope.h"                 // rotary embedding
#include "top_k.h"                // the largest or smallest of every row
