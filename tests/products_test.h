// These products test csrc/cpu/kernels.h (products_test.cpp).
#pragma once

#include "../csrc/cpu/kernels.h"

namespace fusedrnn::test {

extern const Product int8_product, matrix_product;

}  // namespace fusedrnn::test
