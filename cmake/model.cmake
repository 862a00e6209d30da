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
elseif(NOT TARGET eigenformer::model)
  add_library(eigenformer::model INTERFACE IMPORTED ${EIGENFORMER_MODEL_SCOPE})
  set_target_properties(eigenformer::model PROPERTIES
    INTERFACE_LINK_LIBRARIES "eigenformer::eigenformer;nlohmann_json::nlohmann_json")
endif()
