# cmake -C cmake/isa/avx_vnni.cmake ... : our tests and benchmarks for this ISA
set(EIGENFORMER_ISA_FLAGS "-march=x86-64-v3 -mavxvnni" CACHE STRING "")
