/// \file
/// eigenformer: transformer kernels on Eigen tensors. The table of contents: one line an operator; each header is its manual.
#pragma once

#include "causal_mask.h"  // causal, sliding-window, prefix and packed-document masks; ALiBi
