# Flags of our own tests and benchmarks. None of them reaches a user's build.
add_library(eigenformer_program INTERFACE)
target_link_libraries(eigenformer_program INTERFACE eigenformer::eigenformer)
separate_arguments(_isa_flags UNIX_COMMAND "${EIGENFORMER_ISA_FLAGS}")
target_compile_options(eigenformer_program INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Wpedantic -Wshadow -Wno-psabi ${_isa_flags}>
  # g++ 12 sees uninitialised registers in its own AVX-512 intrinsics where Eigen uses them (GCC bug 105593).
  $<$<COMPILE_LANG_AND_ID:CXX,GNU>:-Wno-maybe-uninitialized -Wno-uninitialized>
  $<$<AND:$<COMPILE_LANGUAGE:CXX>,$<BOOL:${EIGENFORMER_WERROR}>>:-Werror>)
if(EIGENFORMER_SANITIZE)
  # Null pointers are found by the address sanitizer, at no cost. Checking each access for them besides, clang took 124 s of CPU to compile
  # kv_cache_test.cpp instead of 87.
  target_compile_options(eigenformer_program INTERFACE -fsanitize=${EIGENFORMER_SANITIZE} -fno-sanitize=null,object-size,vptr
    -fno-omit-frame-pointer -g1 -fno-sanitize-recover=all)
  target_link_options(eigenformer_program INTERFACE -fsanitize=${EIGENFORMER_SANITIZE})
  target_compile_definitions(eigenformer_program INTERFACE EIGENFORMER_SANITIZED)
endif()
find_program(EIGENFORMER_CCACHE ccache)
if(EIGENFORMER_CCACHE)
  set(CMAKE_CXX_COMPILER_LAUNCHER ${CMAKE_COMMAND} -E env CCACHE_SLOPPINESS=pch_defines,time_macros ${EIGENFORMER_CCACHE})
  set(CMAKE_CUDA_COMPILER_LAUNCHER ${CMAKE_CXX_COMPILER_LAUNCHER})
endif()
