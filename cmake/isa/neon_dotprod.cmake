# cmake -C cmake/isa/neon_dotprod.cmake ... : our tests and benchmarks for this ISA
set(EIGENFORMER_ISA_FLAGS "-march=armv8.2-a+dotprod+fp16" CACHE STRING "")
