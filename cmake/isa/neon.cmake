# cmake -C cmake/isa/neon.cmake ... : our tests and benchmarks for this ISA
set(EIGENFORMER_ISA_FLAGS "-march=armv8-a" CACHE STRING "")
