// This test is of csrc/cpu/contention.h (contention_test.cpp).
#pragma once

namespace fusedrnn::test {

// Prints what fails and returns how much does.
int failures_of_contention();

}  // namespace fusedrnn::test
