# cmake -C cmake/isa/amx.cmake ... : our tests and benchmarks for this ISA
set(EIGENFORMER_ISA_FLAGS "-march=sapphirerapids" CACHE STRING "")
