# cmake -C cmake/isa/generic.cmake ... : our tests and benchmarks for this ISA
set(EIGENFORMER_ISA_FLAGS "" CACHE STRING "")
