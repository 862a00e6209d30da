# eigenformer::model, what <eigenformer/model/...> needs besides the kernels' headers, in a subproject and in the installed package alike.
# What is wrong is left in EIGENFORMER_MODEL_PROBLEM.
set(EIGENFORMER_MODEL_PROBLEM "")
if(NOT TARGET nlohmann_json::nlohmann_json)
  find_package(nlohmann_json 3.9 CONFIG QUIET)
  if(TARGET nlohmann_json::nlohmann_json AND EIGENFORMER_MODEL_SCOPE)
    set_target_properties(nlohmann_json::nlohmann_json PROPERTIES IMPORTED_GLOBAL TRUE)
  endif()
endif()
if(NOT TARGET nlohmann_json::nlohmann_json)
  set(EIGENFORMER_MODEL_PROBLEM "eigenformer's component model needs nlohmann-json 3.9 or later. "
    "Install it (Debian: apt-get install nlohmann-json3-dev) or set nlohmann_json_DIR.")
endif()
# Tokenizers alone need it: readers of files work without, and so may our own tests of them.
find_path(EIGENFORMER_PCRE2_INCLUDE_DIR pcre2.h)
find_library(EIGENFORMER_PCRE2_LIBRARY pcre2-8)
mark_as_advanced(EIGENFORMER_PCRE2_INCLUDE_DIR EIGENFORMER_PCRE2_LIBRARY)
set(EIGENFORMER_PCRE2 OFF)
if(EIGENFORMER_PCRE2_INCLUDE_DIR AND EIGENFORMER_PCRE2_LIBRARY)
  set(EIGENFORMER_PCRE2 ON)
elseif(NOT EIGENFORMER_MODEL_PROBLEM)
  set(EIGENFORMER_MODEL_PROBLEM "eigenformer's component model needs PCRE2 for tokenizers, its 8-bit library. "
    "Install it (Debian: apt-get install libpcre2-dev) or set CMAKE_PREFIX_PATH.")
endif()
if(TARGET nlohmann_json::nlohmann_json AND NOT TARGET eigenformer::model)
  add_library(eigenformer::model INTERFACE IMPORTED ${EIGENFORMER_MODEL_SCOPE})
  set_target_properties(eigenformer::model PROPERTIES
    INTERFACE_LINK_LIBRARIES "eigenformer::eigenformer;nlohmann_json::nlohmann_json")
  if(EIGENFORMER_PCRE2)
    set_property(TARGET eigenformer::model APPEND PROPERTY INTERFACE_LINK_LIBRARIES ${EIGENFORMER_PCRE2_LIBRARY})
    set_property(TARGET eigenformer::model PROPERTY INTERFACE_INCLUDE_DIRECTORIES ${EIGENFORMER_PCRE2_INCLUDE_DIR})
  endif()
endif()
