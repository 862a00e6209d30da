# Finds Eigen 3.4 or 5, unless the project around has an Eigen3::Eigen. What is wrong is left in EIGENFORMER_EIGEN_PROBLEM.
# No version is asked of find_package, because the version file of Eigen 5 refuses a request for 3.4.
set(EIGENFORMER_EIGEN_PROBLEM "")
if(NOT TARGET Eigen3::Eigen)
  find_package(Eigen3 CONFIG QUIET)
  set(_eigenformer_eigen_version "${Eigen3_VERSION}")
  if(NOT _eigenformer_eigen_version)
    set(_eigenformer_eigen_version "${EIGEN3_VERSION_STRING}")
  endif()
  if(NOT TARGET Eigen3::Eigen)
    set(EIGENFORMER_EIGEN_PROBLEM
      "eigenformer needs Eigen 3.4 or later. Install it (Debian: apt-get install libeigen3-dev) or set Eigen3_DIR.")
  elseif(_eigenformer_eigen_version AND _eigenformer_eigen_version VERSION_LESS 3.4)
    set(EIGENFORMER_EIGEN_PROBLEM
      "eigenformer needs Eigen 3.4 or later, but ${Eigen3_DIR} has ${_eigenformer_eigen_version}.")
  endif()
endif()
