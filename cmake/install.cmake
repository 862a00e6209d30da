# The headers and the package that find_package(eigenformer) finds.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)
set(_package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/eigenformer)
install(TARGETS eigenformer EXPORT eigenformer-targets INCLUDES DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(DIRECTORY include/eigenformer DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(EXPORT eigenformer-targets NAMESPACE eigenformer:: DESTINATION ${_package_dir})
configure_package_config_file(cmake/eigenformer-config.cmake.in ${CMAKE_CURRENT_BINARY_DIR}/eigenformer-config.cmake
  INSTALL_DESTINATION ${_package_dir})
write_basic_package_version_file(${CMAKE_CURRENT_BINARY_DIR}/eigenformer-config-version.cmake
  COMPATIBILITY SameMinorVersion ARCH_INDEPENDENT)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/eigenformer-config.cmake ${CMAKE_CURRENT_BINARY_DIR}/eigenformer-config-version.cmake
  cmake/eigen.cmake cmake/cuda.cmake cmake/model.cmake cmake/nccl.cmake DESTINATION ${_package_dir})
