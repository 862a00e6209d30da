# One word, one operator, the same word everywhere:
#   include/eigenformer/X.h  reference/X.h  cpu/X.h  cuda/X.cuh  tests/X_test.cpp  bench/X_bench.cpp
# A missing file stops the configuration. What an operator does not have is said here, in one visible list.

set(EIGENFORMER_OPERATORS "")
function(eigenformer_operator name)
  cmake_parse_arguments(arg "" "" "WITHOUT" ${ARGN})
  set(file_header include/eigenformer/${name}.h)
  set(file_reference include/eigenformer/reference/${name}.h)
  set(file_cpu include/eigenformer/cpu/${name}.h)
  set(file_cuda include/eigenformer/cuda/${name}.cuh)
  set(file_test tests/${name}_test.cpp)
  set(file_bench bench/${name}_bench.cpp)
  foreach(side header reference cpu cuda test bench)
    if(side IN_LIST arg_WITHOUT)
      if(EXISTS ${CMAKE_CURRENT_SOURCE_DIR}/${file_${side}})
        message(FATAL_ERROR "Operator ${name} is declared WITHOUT ${side} in cmake/operators.cmake, but ${file_${side}} exists.")
      endif()
    elseif(NOT EXISTS ${CMAKE_CURRENT_SOURCE_DIR}/${file_${side}})
      message(FATAL_ERROR "Operator ${name} lacks ${file_${side}}. Add it, or say WITHOUT ${side} in cmake/operators.cmake.")
    endif()
  endforeach()
  list(APPEND EIGENFORMER_OPERATORS ${name})
  set(EIGENFORMER_OPERATORS "${EIGENFORMER_OPERATORS}" PARENT_SCOPE)
  set(EIGENFORMER_${name}_WITHOUT "${arg_WITHOUT}" PARENT_SCOPE)
endfunction()

# The nine systems
eigenformer_operator(causal_mask)
# - keys and values
#eigenformer_operator(kv_cache)
# - keys and values in pages
#eigenformer_operator(paged_kv_cache WITHOUT cuda)
# - INT8
eigenformer_operator(quantization WITHOUT cuda)
# - matrix products
eigenformer_operator(linear WITHOUT cuda)
# - softmax(QK)V
#eigenformer_operator(attention WITHOUT cuda)
# - ranks
eigenformer_operator(communicator WITHOUT reference cpu cuda)
# - column- and row-parallel layers
eigenformer_operator(tensor_parallel WITHOUT cuda)
# - tokens
#eigenformer_operator(sampling)
# - steps
#eigenformer_operator(training WITHOUT cpu cuda)
# - loss scaling
#eigenformer_operator(grad_scaler WITHOUT reference cpu cuda)
# - requests
#eigenformer_operator(scheduler WITHOUT cpu cuda)
# What a decoder needs besides
#eigenformer_operator(normalization)
# - positions
#eigenformer_operator(rope WITHOUT cuda)
# - gates
#eigenformer_operator(activation WITHOUT cuda)
# - tokens to vectors
#eigenformer_operator(embedding WITHOUT cuda)
# - cross-entropy
#eigenformer_operator(loss WITHOUT cuda)
# - AdamW, SGD, clipping
#eigenformer_operator(optimizer WITHOUT cuda)
# - the model
#eigenformer_operator(decoder WITHOUT cpu cuda)
