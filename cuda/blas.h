// This header declares the part of cuBLASLt that is used. The library is loaded when it
// is first needed, from the wheel nvidia-cublas beside this package or from the system.
// Its C interface is stable within version 13. The declarations replace a header that
// comes with a 440 MB wheel.
#pragma once

#include <cuda_runtime.h>
#include <library_types.h>

#include <cstddef>
#include <cstdint>

namespace fusedrnn::cuda::blas {

using Handle = void*;
using Description = void*;
using Layout = void*;
using Preference = void*;

constexpr int success = 0;

enum Compute : int { compute_32f = 68, compute_64f = 70, compute_32f_fast_tf32 = 77 };
enum DescriptionAttribute : int { desc_transa = 3, desc_transb = 4 };
enum Transpose : std::int32_t { op_n = 0, op_t = 1 };
enum PreferenceAttribute : int {
  pref_max_workspace_bytes = 1,
  pref_reduction_scheme_mask = 3,
  pref_min_alignment_a_bytes = 5,
  pref_min_alignment_b_bytes = 6,
  pref_min_alignment_c_bytes = 7,
  pref_min_alignment_d_bytes = 8
};

constexpr std::uint32_t reduction_in_compute_type = 2;

struct Algorithm {
  std::uint64_t data[8];
};
struct Heuristic {
  Algorithm algorithm;
  std::size_t workspace_bytes;
  int status;
  float waves;
  int reserved[4];
};

struct Library {
  int (*create)(Handle*);
  int (*description_create)(Description*, int compute, cudaDataType scale);
  int (*description_destroy)(Description);
  int (*description_set)(Description, int attribute, const void*, std::size_t);
  int (*layout_create)(Layout*, cudaDataType, std::uint64_t rows, std::uint64_t columns,
                       std::int64_t stride);
  int (*layout_destroy)(Layout);
  int (*preference_create)(Preference*);
  int (*preference_destroy)(Preference);
  int (*preference_set)(Preference, int attribute, const void*, std::size_t);
  int (*heuristic)(Handle, Description, Layout a, Layout b, Layout c, Layout d,
                   Preference, int requested, Heuristic*, int* found);
  int (*matmul)(Handle, Description, const void* alpha, const void* a, Layout,
                const void* b, Layout, const void* beta, const void* c, Layout, void* d,
                Layout, const Algorithm*, void* workspace, std::size_t workspace_bytes,
                cudaStream_t);
};

// Returns the library, or throws an Error that says what to install.
const Library& library();

}  // namespace fusedrnn::cuda::blas
