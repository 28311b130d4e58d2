// This header is all that the kernels use of CUDA: thread numbers, memory that others
// read, barriers, matrix units. So they also compile for the host, where
// emulator/device.h defines the same names over fibers.
//
//   thread(), block_x(), blocks_x(), …  the thread in its block, the block in its grid
//   shared()                 the block's dynamic shared memory
//   sync_warp(), sync_block(), sync_cluster()
//                            barriers, which order memory. A cluster is all blocks of
//                            one y
//   store_in_peer(p, rank, value, arrivals)
//                            stores 16 bytes at the same place of shared memory in block
//                            `rank` of the cluster, at some time, and then counts 16 in
//                            its `arrivals`
//   clear(arrivals)          called by one thread, before a sync_cluster()
//   expect(arrivals, bytes)  called by one thread, once in each round: a round ends when
//                            the expected bytes are known and have arrived
//   wait_for(arrivals, odd)  waits for the end of a round, numbered from 0; called by
//                            whole warps
//   load_constant(p)         loads 16 bytes that no kernel writes meanwhile
//   load_exchanged(p), store_exchanged(p, value)
//                            16 bytes that blocks exchange through L2. Each 8 bytes are
//                            atomic; only fence() orders them with others
//   fence()                  orders what the thread read and wrote before it and what it
//                            reads and writes after it, for all blocks that use fences
//   add_to(p, x)             *p += x in memory, without waiting for the result
//   wait_until(ready)        calls ready() until it is true in the whole warp, which it
//                            synchronizes. With FUSEDRNN_WAIT_LIMIT this and wait_for()
//                            end the kernel with an error after so many seconds
//   exp2_of(x), reciprocal(x), of floats, as the chip approximates them: errors of 2 and
//                            1 ULP; the reciprocal of more than 2^126 is 0
//   bounded(x, least, most)  of floats; most where x is NaN
//   MmaTensorFloat32, MmaBFloat16, MmaFloat16
//                            (d, a, b): d += a·b of one warp, 16 rows × 8 columns, 32
//                            bytes of depth; fragments as in PTX's m16n8k8 and m16n8k16
#pragma once

#include <cstddef>
#include <cstdint>

#include "../csrc/target.h"

namespace fusedrnn::cuda {

struct alignas(16) Quad {
  std::uint32_t word[4];
};

// Half is a bfloat16 or a float16: both share their code, which a flag distinguishes.
struct Half {
  std::uint16_t bits;
};
// TensorFloat32 is float32 as the matrix units read it, with 10 bits of mantissa.
struct TensorFloat32 {
  float value;
};

// Arrivals counts, in shared memory, the bytes that the peers of a cluster send.
struct alignas(8) Arrivals {
  std::uint32_t state[2];
};

}  // namespace fusedrnn::cuda

#ifndef __CUDACC__
#include "emulator/device.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace fusedrnn::cuda {

FUSEDRNN_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
FUSEDRNN_DEVICE int threads() { return static_cast<int>(blockDim.x); }
FUSEDRNN_DEVICE int block_x() { return static_cast<int>(blockIdx.x); }
FUSEDRNN_DEVICE int block_y() { return static_cast<int>(blockIdx.y); }
FUSEDRNN_DEVICE int blocks_x() { return static_cast<int>(gridDim.x); }
FUSEDRNN_DEVICE int blocks_y() { return static_cast<int>(gridDim.y); }

FUSEDRNN_DEVICE char* shared() {
  extern __shared__ __align__(16) char dynamic_shared[];
  return dynamic_shared;
}

FUSEDRNN_DEVICE void sync_warp() { __syncwarp(); }
FUSEDRNN_DEVICE void sync_block() { __syncthreads(); }

// A Wait is told of its polls. It looks at the clock seldom, so that polls stay as fast.
struct Wait {
#if FUSEDRNN_WAIT_LIMIT > 0
  unsigned polls = 0;
  std::uint64_t begin = 0;
  FUSEDRNN_DEVICE void poll() {
    if (++polls % 1024 != 0) return;
    std::uint64_t now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    if (begin == 0) begin = now;
    if (now - begin > FUSEDRNN_WAIT_LIMIT * std::uint64_t{1'000'000'000}) __trap();
  }
#else
  FUSEDRNN_DEVICE void poll() {}
#endif
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
FUSEDRNN_DEVICE std::uint32_t shared_address(const void* p) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}
FUSEDRNN_DEVICE void sync_cluster() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
FUSEDRNN_DEVICE void store_in_peer(Quad* p, int rank, const Quad& value, Arrivals* a) {
  std::uint32_t arrivals;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(arrivals)
      : "r"(shared_address(a)), "r"(rank));
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 "
      "[%0], {%1, %2, %3, %4}, [%5];" ::"r"(arrivals + shared_address(p) -
                                            shared_address(a)),
      "r"(value.word[0]), "r"(value.word[1]), "r"(value.word[2]), "r"(value.word[3]),
      "r"(arrivals)
      : "memory");
}
FUSEDRNN_DEVICE void clear(Arrivals* a) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(a))
               : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
FUSEDRNN_DEVICE void expect(Arrivals* a, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(
                   shared_address(a)),
               "r"(bytes)
               : "memory");
}
FUSEDRNN_DEVICE void wait_for(Arrivals* a, bool odd) {
  std::uint32_t done;
  Wait wait;
  do {
    wait.poll();
    asm volatile(
        "{\n"
        ".reg .pred complete;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 complete, [%1], %2;\n"
        "selp.u32 %0, 1, 0, complete;\n"
        "}"
        : "=r"(done)
        : "r"(shared_address(a)), "r"(static_cast<std::uint32_t>(odd))
        : "memory");
  } while (!done);
  __syncwarp();
}
#else
// Before Hopper a cluster is one block, which has no peers.
FUSEDRNN_DEVICE void sync_cluster() { __syncthreads(); }
FUSEDRNN_DEVICE void store_in_peer(Quad*, int, const Quad&, Arrivals*) {}
FUSEDRNN_DEVICE void clear(Arrivals*) {}
FUSEDRNN_DEVICE void expect(Arrivals*, int) {}
FUSEDRNN_DEVICE void wait_for(Arrivals*, bool) {}
#endif

FUSEDRNN_DEVICE Quad load_constant(const Quad* p) {
  const uint4 v = __ldg(reinterpret_cast<const uint4*>(p));
  return {v.x, v.y, v.z, v.w};
}
FUSEDRNN_DEVICE Quad load_exchanged(const Quad* p) {
  ulonglong2 v;
  asm volatile("ld.relaxed.gpu.global.v2.b64 {%0, %1}, [%2];"
               : "=l"(v.x), "=l"(v.y)
               : "l"(p));
  Quad quad;
  __builtin_memcpy(&quad, &v, sizeof(quad));
  return quad;
}
// The value is passed by value: from a reference nvcc would copy single bytes.
FUSEDRNN_DEVICE void store_exchanged(Quad* p, Quad value) {
  ulonglong2 v;
  __builtin_memcpy(&v, &value, sizeof(v));
  asm volatile("st.relaxed.gpu.global.v2.b64 [%0], {%1, %2};" ::"l"(p), "l"(v.x), "l"(v.y)
               : "memory");
}
FUSEDRNN_DEVICE void fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
FUSEDRNN_DEVICE void add_to(float* p, float x) { atomicAdd(p, x); }
FUSEDRNN_DEVICE void add_to(double* p, double x) { atomicAdd(p, x); }
template <class F>
FUSEDRNN_DEVICE void wait_until(const F& ready) {
  Wait wait;
  while (!__all_sync(~0u, ready())) wait.poll();
  __syncwarp();
}

// The multiplications of two fragments are types, so that a product can take one as an
// argument.
#define FUSEDRNN_MMA(Name, shape, type)                                         \
  struct Name {                                                                 \
    FUSEDRNN_DEVICE void operator()(float (&d)[4], const std::uint32_t (&a)[4], \
                                    const std::uint32_t (&b)[2]) const {        \
      asm("mma.sync.aligned." shape ".row.col.f32." type "." type               \
          ".f32 "                                                               \
          "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"     \
          : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                      \
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));  \
    }                                                                           \
  };
FUSEDRNN_MMA(MmaTensorFloat32, "m16n8k8", "tf32")
FUSEDRNN_MMA(MmaBFloat16, "m16n8k16", "bf16")
FUSEDRNN_MMA(MmaFloat16, "m16n8k16", "f16")
#undef FUSEDRNN_MMA

FUSEDRNN_DEVICE float from_half(Half x, bool bfloat) {
  return bfloat ? __uint_as_float(static_cast<unsigned>(x.bits) << 16)
                : __half2float(__ushort_as_half(x.bits));
}
FUSEDRNN_DEVICE Half to_half(float x, bool bfloat) {
  return {bfloat ? __bfloat16_as_ushort(__float2bfloat16_rn(x))
                 : __half_as_ushort(__float2half_rn(x))};
}
FUSEDRNN_DEVICE TensorFloat32 to_tensor_float32(float x) {
  std::uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return {__uint_as_float(bits)};
}

FUSEDRNN_DEVICE float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
FUSEDRNN_DEVICE double multiply_add(double a, double b, double c) { return fma(a, b, c); }
FUSEDRNN_DEVICE float exp2_of(float x) {
  float y;
  asm("ex2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
FUSEDRNN_DEVICE float bounded(float x, float least, float most) {
  return fmaxf(fminf(x, most), least);
}
// Functions of doubles are long, so they are called: inlined they were a third of the
// code.
__device__ __noinline__ inline double exp_of(double x) { return exp(x); }
FUSEDRNN_DEVICE float tanh_of(float x) { return tanhf(x); }
__device__ __noinline__ inline double tanh_of(double x) { return tanh(x); }
__device__ __noinline__ inline float expm1_of(float x) { return expm1f(x); }
__device__ __noinline__ inline double expm1_of(double x) { return expm1(x); }
__device__ __noinline__ inline float log1p_of(float x) { return log1pf(x); }
__device__ __noinline__ inline double log1p_of(double x) { return log1p(x); }
FUSEDRNN_DEVICE float root_of(float x) { return sqrtf(x); }
FUSEDRNN_DEVICE double root_of(double x) { return sqrt(x); }
// This is not __frcp_rn, which calls a function for denormals.
FUSEDRNN_DEVICE float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __noinline__ inline double reciprocal(double x) { return 1 / x; }

}  // namespace fusedrnn::cuda
#endif
