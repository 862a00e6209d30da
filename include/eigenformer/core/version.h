/// \file
/// The version: CMake reads it here too. Patches change no call; before 1.0 a new minor version
/// may.
#pragma once

#define EIGENFORMER_VERSION_MAJOR 0
#define EIGENFORMER_VERSION_MINOR 1
#define EIGENFORMER_VERSION_PATCH 0
