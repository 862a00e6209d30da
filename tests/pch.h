// What every test includes anyway.
#pragma once
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <span>
#include <string>
#include <vector>

#include <eigenformer/core/check.h>
#include <eigenformer/core/device.h>
#include <eigenformer/core/eigen.h>
#include <eigenformer/core/tensor.h>
