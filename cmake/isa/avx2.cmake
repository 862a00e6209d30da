# cmake -C cmake/isa/avx2.cmake ... : our tests and benchmarks for this ISA
set(EIGENFORMER_ISA_FLAGS "-march=x86-64-v3" CACHE STRING "")
