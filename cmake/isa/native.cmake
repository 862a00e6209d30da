# cmake -C cmake/isa/native.cmake ... : our tests and benchmarks for this ISA
set(EIGENFORMER_ISA_FLAGS "-march=native" CACHE STRING "")
