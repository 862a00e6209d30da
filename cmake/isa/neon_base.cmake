# cmake -C cmake/isa/neon_base.cmake ... : our tests and benchmarks for this ISA, without sdot
set(EIGENFORMER_ISA_FLAGS "-march=armv8-a" CACHE STRING "")
