# The test compile.foreign_macros: Eigen and what our headers include of others, which promise nothing about macros; then names that
# other people's headers define as macros, each with a value that no use survives; then every header of ours, those of all ISAs of
# x86-64 among them.
include(CheckCXXCompilerFlag)
set(_objects
  # Qt without QT_NO_KEYWORDS
  slots signals emit forever Q_SLOTS Q_SIGNALS Q_EMIT Q_OBJECT Q_GADGET Q_DECL_OVERRIDE
  # windows.h
  near far small hyper interface pascal cdecl NEAR FAR PASCAL CALLBACK APIENTRY IN OUT OPTIONAL CONST VOID TRUE FALSE BOOL ERROR NO_ERROR
  DELETE IGNORE INFINITE STRICT ABSOLUTE RELATIVE ALTERNATE WINDING OPAQUE TRANSPARENT THIS DIFFERENCE DOMAIN OVERFLOW UNDERFLOW SING
  MOD_ALT CREATE_NEW S_OK E_FAIL GetObject GetMessage SendMessage PostMessage CreateWindow CreateFile DeleteFile CopyFile MoveFile
  CreateMutex CreateEvent CreateSemaphore OpenEvent LoadLibrary LoadImage DrawText GetClassName GetUserName GetCommandLine
  ReportEvent StartService InterlockedExchange MemoryBarrier rad1 lst1 chx1 grp1
  # X11
  None Bool Status Success True False Always Complex Convex Nonconvex CurrentTime Unsorted YSorted Above Below TopIf BottomIf Opposite
  KeyPress KeyRelease ButtonPress ButtonRelease MotionNotify EnterNotify LeaveNotify FocusIn FocusOut Expose GrayScale StaticGray
  PseudoColor TrueColor DirectColor CursorShape InputOutput InputOnly AllocNone AllocAll DestroyAll RetainPermanent NoSymbol AnyKey
  AnyButton LSBFirst MSBFirst PointerRoot ParentRelative CopyFromParent BadRequest BadValue BadMatch BadAlloc
  # Objective-C, C's complex.h, compilers with extensions
  nil Nil YES NO I unix linux)
set(_functions
  # Qt, windows.h
  foreach Q_FOREACH Q_UNUSED Q_ASSERT Q_PROPERTY Q_ENUM Q_DISABLE_COPY
  min max Yield GetCurrentTime GetNextWindow GetFreeSpace CopyMemory MoveMemory FillMemory ZeroMemory UNREFERENCED_PARAMETER TEXT
  # Apple's AssertMacros.h
  check check_noerr require require_noerr require_action require_quiet verify verify_noerr ncheck nrequire
  # sys/sysmacros.h, gettext, game engines, loggers
  major minor makedev _ N_ ensure checkf CHECK DCHECK LOG ASSERT UNUSED ARRAY_SIZE)
set(_macros "")
foreach(name IN LISTS _objects)
  string(APPEND _macros "#undef ${name}\n#define ${name} )}\n")
endforeach()
foreach(name IN LISTS _functions)
  string(APPEND _macros "#undef ${name}\n#define ${name}(...) )}\n")
endforeach()

set(_others "<unsupported/Eigen/CXX11/Tensor>")
set(_ours "")
file(GLOB_RECURSE _headers RELATIVE ${PROJECT_SOURCE_DIR}/include CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/include/*.h)
if(NOT TARGET eigenformer::model)
  list(FILTER _headers EXCLUDE REGEX "^eigenformer/model")
elseif(NOT EIGENFORMER_PCRE2)
  list(FILTER _headers EXCLUDE REGEX "^eigenformer/model(/tokenizer|/chat_template|\\.h)")
endif()
foreach(header ${_headers})
  if(NOT header MATCHES "neon\\.h|communicator/(mpi|nccl)\\.h")
    file(STRINGS ${PROJECT_SOURCE_DIR}/include/${header} _includes REGEX "^#include <[a-z0-9_/]+(\\.h(pp)?)?>")
    list(APPEND _others ${_includes})
    string(APPEND _ours "#include <${header}>\n")
  endif()
endforeach()
list(TRANSFORM _others REPLACE "#include " "")
list(REMOVE_DUPLICATES _others)
list(FILTER _others EXCLUDE REGEX "arm_neon|intrin\\.h|cpuid")
list(TRANSFORM _others REPLACE "(.+)" "#if __has_include(\\1)\n#include \\1\n#endif\n")
string(JOIN "" _others ${_others})
file(CONFIGURE OUTPUT ${CMAKE_CURRENT_BINARY_DIR}/foreign_macros.cpp @ONLY CONTENT [[
// expect-success
#define PCRE2_CODE_UNIT_WIDTH 8
@_others@
#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif
@_macros@
@_ours@]])
check_cxx_compiler_flag(-march=sapphirerapids EIGENFORMER_KNOWS_SAPPHIRERAPIDS)  # AVX2 to AMX; nothing is run
add_test(NAME compile.foreign_macros COMMAND ${_check_compile} ${CMAKE_CURRENT_BINARY_DIR}/foreign_macros.cpp ${CMAKE_CXX_COMPILER}
  ${_compile_flags} $<$<BOOL:${EIGENFORMER_KNOWS_SAPPHIRERAPIDS}>:-march=sapphirerapids>)
