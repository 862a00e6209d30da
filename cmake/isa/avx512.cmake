# cmake -C cmake/isa/avx512.cmake ... : our tests and benchmarks for this ISA
set(EIGENFORMER_ISA_FLAGS "-march=x86-64-v4" CACHE STRING "")
