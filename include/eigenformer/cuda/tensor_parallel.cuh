/// \file
/// CUDA kernels of the tensor-parallel layers, apart from the products themselves: the candidates
/// of a vocabulary-parallel head.
#pragma once

#include "vocabulary.cuh"
