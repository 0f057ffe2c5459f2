// prim.cuh: every device instruction that our CUDA kernels use, under one name with two implementations.
// Method  under nvcc a primitive is the inline PTX instruction that its comment names; under a host compiler it is the
//         emulation in csrc/emu. A kernel includes this header, is otherwise plain C++, and so runs in both.
// Memory  shared memory has no pointers here, only byte addresses from shared_base(): so every access to it is one of
//         these primitives, and the emulation can poison, check and count it
// Limits  sm_80+; one-dimensional grids and blocks; warp collectives take all 32 lanes; f16 and bf16 matrices
// Twins   csrc/emu/emu.h (semantics); tests/emu/test_primitives.py (fragment tables)
// Source  PTX ISA 8.7, sections 9.7.9.25 (cp.async), 9.7.13 (barriers, fences, atomics), 9.7.14 (ldmatrix, mma)
#pragma once

#include <math.h>
#include <stdint.h>

#ifdef __CUDACC__
#define MX_DEVICE __device__ __forceinline__
#define MX_KERNEL __global__ void
#define MX_LAUNCH_BOUNDS(threads, blocks_per_sm) __launch_bounds__(threads, blocks_per_sm)
#define MX_GRID_CONSTANT __grid_constant__
#define MX_UNROLL _Pragma("unroll")
#define MX_NO_UNROLL _Pragma("unroll 1")
#define MX_PRAGMA(text) _Pragma(#text)
#define MX_UNROLL_BY(count) MX_PRAGMA(unroll count)
// A primitive's hidden last argument: where the kernel calls it, for the emulation's reports.
#define MX_SITE
#define MX_ONLY_SITE
#else
#include "emu/emu.h"

#define MX_DEVICE inline
#define MX_KERNEL inline void
#define MX_LAUNCH_BOUNDS(threads, blocks_per_sm)
#define MX_GRID_CONSTANT
#define MX_UNROLL
#define MX_NO_UNROLL
#define MX_UNROLL_BY(count)
#define MX_SITE , emu::Site site = emu::Site::here()
#define MX_ONLY_SITE emu::Site site = emu::Site::here()
#endif

namespace mx {

constexpr int kWarpSize = 32;
constexpr int kVectorBytes = 16;  // the widest access of one thread

// Elements of matrices, two to a 32-bit register, the lower index in the lower half.
struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

struct float2 {
  float x, y;
};

// 16 bytes: what one thread moves at most.
struct Words4 {
  uint32_t word[4];
};

#ifdef __CUDACC__

// ---- threads, barriers ----------------------------------------------------------------------------------------------

// Read where it is called, and not kept from one call to the next: what is computed from it is not hoisted out of loops
// that the call is in.
MX_DEVICE int thread_idx() {
  int idx;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(idx));
  return idx;
}
MX_DEVICE int block_idx() {
  return blockIdx.x;
}
MX_DEVICE int num_blocks() {
  return gridDim.x;
}

// All threads of the block. Orders their accesses to shared and global memory within the block.
MX_DEVICE void sync_threads() {
  __syncthreads();
}
// All lanes of the warp; orders their accesses.
MX_DEVICE void sync_warp() {
  __syncwarp();
}
// Barrier id in [1, 16) of num_threads threads, a multiple of 32; sync waits, arrive does not.
MX_DEVICE void bar_sync(int id, int num_threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(num_threads) : "memory");
}
MX_DEVICE void bar_arrive(int id, int num_threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(num_threads) : "memory");
}

// Of the block.
MX_DEVICE int num_threads() {
  return blockDim.x;
}

// ---- warp collectives -----------------------------------------------------------------------------------------------

MX_DEVICE float shfl_xor(float value, int lane_mask) {
  return __shfl_xor_sync(0xffffffffu, value, lane_mask);
}
MX_DEVICE int64_t shfl_idx(int64_t value, int lane) {
  return __shfl_sync(0xffffffffu, static_cast<long long>(value), lane);
}

// Whether any lane's predicate holds.
MX_DEVICE bool any(bool predicate) {
  return __any_sync(0xffffffffu, predicate);
}

// Four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8 and gets, of each
// matrix, row l / 4, columns 2 (l % 4) and 2 (l % 4) + 1. trans: of each matrix's transpose.
MX_DEVICE void ldmatrix_x4(uint32_t (&r)[4], uint32_t row_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row_address)
               : "memory");
}
MX_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t row_address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row_address)
               : "memory");
}

// d (16 x 8, float32) += a (16 x 16) b (16 x 8). With g = lane / 4 and c = 2 (lane % 4), a lane holds
//   a[0]: row g, columns c, c + 1    a[1]: row g + 8    a[2]: row g, columns c + 8, c + 9    a[3]: row g + 8 of those
//   b0: column g, rows c, c + 1      b1: rows c + 8, c + 9
//   d[0], d[1]: row g, columns c, c + 1                 d[2], d[3]: row g + 8
// Not volatile: it has no effect but d, and the compiler may move it.
MX_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, f16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
MX_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bf16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- asynchronous copies --------------------------------------------------------------------------------------------

// 16 bytes from global to shared memory, past L1, both 16-byte aligned; with is_valid false, 16 zero bytes and the
// source is not read. They are there for this thread after a wait, for others after a barrier behind that.
MX_DEVICE void cp_async16(uint32_t shared_address, const void* source, bool is_valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address), "l"(source),
               "r"(is_valid ? kVectorBytes : 0)
               : "memory");
}
// Ends this thread's current group of copies.
MX_DEVICE void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Until all but this thread's kNumPending latest groups have landed.
template <int kNumPending>
MX_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kNumPending) : "memory");
}

// ---- memory ---------------------------------------------------------------------------------------------------------

MX_DEVICE uint32_t shared_base() {
  extern __shared__ __align__(1024) char mx_shared[];
  return static_cast<uint32_t>(__cvta_generic_to_shared(mx_shared));
}

MX_DEVICE int32_t ld_shared(uint32_t address) {
  int32_t value;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}
MX_DEVICE void st_shared(uint32_t address, int32_t value) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}
MX_DEVICE float2 ld_shared_v2(uint32_t address) {
  float2 value;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(value.x), "=f"(value.y) : "r"(address) : "memory");
  return value;
}
MX_DEVICE void st_shared_v2(uint32_t address, float2 value) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(value.x), "f"(value.y) : "memory");
}
MX_DEVICE Words4 ld_shared_v4(uint32_t address) {
  Words4 value;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.word[0]), "=r"(value.word[1]), "=r"(value.word[2]), "=r"(value.word[3])
               : "r"(address)
               : "memory");
  return value;
}
MX_DEVICE void st_shared_v4(uint32_t address, const Words4& value) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(value.word[0]), "r"(value.word[1]),
               "r"(value.word[2]), "r"(value.word[3])
               : "memory");
}

// Global memory that other blocks write during the launch: through L2, because L1 may hold what was there before.
MX_DEVICE float ld_global_cg(const float* address) {
  float value;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(value) : "l"(address) : "memory");
  return value;
}
MX_DEVICE float2 ld_global_cg_v2(const float* address) {
  float2 value;
  asm volatile("ld.global.cg.v2.f32 {%0, %1}, [%2];" : "=f"(value.x), "=f"(value.y) : "l"(address) : "memory");
  return value;
}
MX_DEVICE void st_global(void* address, uint32_t value) {
  asm volatile("st.global.b32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}
MX_DEVICE void st_global(float* address, float value) {
  asm volatile("st.global.f32 [%0], %1;" ::"l"(address), "f"(value) : "memory");
}
MX_DEVICE void st_global_v2(float* address, float2 value) {
  asm volatile("st.global.v2.f32 [%0], {%1, %2};" ::"l"(address), "f"(value.x), "f"(value.y) : "memory");
}

MX_DEVICE Words4 ld_global_v4(const void* address) {
  Words4 value;
  asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.word[0]), "=r"(value.word[1]), "=r"(value.word[2]), "=r"(value.word[3])
               : "l"(address)
               : "memory");
  return value;
}
MX_DEVICE void st_global_v4(void* address, const Words4& value) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(value.word[0]), "r"(value.word[1]),
               "r"(value.word[2]), "r"(value.word[3])
               : "memory");
}
MX_DEVICE void st_global_v2(void* address, uint32_t first, uint32_t second) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(address), "r"(first), "r"(second) : "memory");
}

// What was at address before; the addition is atomic on the device and orders nothing.
MX_DEVICE int32_t atomic_add_relaxed(int32_t* address, int32_t value) {
  int32_t before;
  asm volatile("atom.relaxed.gpu.global.add.s32 %0, [%1], %2;" : "=r"(before) : "l"(address), "r"(value) : "memory");
  return before;
}
// Everything that this thread has written, or has seen written through a barrier, is seen by whoever synchronises with
// a later operation of it, and the other way round.
MX_DEVICE void fence_gpu() {
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
}

// ---- arithmetic -----------------------------------------------------------------------------------------------------

// The same value, of which the compiler knows nothing: what is computed from it stays behind this line, and so inside
// the loop that this line is in, where otherwise it would be hoisted out of it and take registers all through.
MX_DEVICE uint32_t opaque(uint32_t value) {
  asm volatile("" : "+r"(value));
  return value;
}

// 2^x: exact at -inf (0) and 0 (1), else within 2 ulp; subnormal results are 0.
MX_DEVICE float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// log2 x, within 2^-22 absolute in [0.5, 2] and 2^-22 relative elsewhere.
MX_DEVICE float lg2(float x) {
  float y;
  asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// 1 / x, within 1 ulp; 0 at inf.
MX_DEVICE float rcp(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Both rounded to nearest even; low is the lower half.
MX_DEVICE uint32_t pack2(float low, float high, f16) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
MX_DEVICE uint32_t pack2(float low, float high, bf16) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

MX_DEVICE uint32_t bits_of(float value) {
  return __float_as_uint(value);
}
MX_DEVICE float float_of(uint32_t bits) {
  return __uint_as_float(bits);
}
// The lower and the upper half.
MX_DEVICE float2 unpack2(uint32_t pair, f16) {
  float2 value;
  asm("{.reg .b16 low, high;\n mov.b32 {low, high}, %2;\n cvt.f32.f16 %0, low;\n cvt.f32.f16 %1, high;}"
      : "=f"(value.x), "=f"(value.y)
      : "r"(pair));
  return value;
}
MX_DEVICE float2 unpack2(uint32_t pair, bf16) {
  return {float_of(pair << 16), float_of(pair & 0xffff0000u)};
}
// Byte i of the result is that of the eight in (b, a), a's lowest the first, that digit i of the selector names; where
// the digit has its bit 3 set, that byte's sign, eight times.
MX_DEVICE uint32_t byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t bytes;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(a), "r"(b), "r"(selector));
  return bytes;
}
// a b + c of either half, rounded once; subnormals are kept.
MX_DEVICE uint32_t fma2_f16(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t pair;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(pair) : "r"(a), "r"(b), "r"(c));
  return pair;
}

// Each rounded to nearest even by itself: products and sums are not fused, so that the bits are those of the host.
MX_DEVICE float mul_rn(float a, float b) {
  return __fmul_rn(a, b);
}
MX_DEVICE float add_rn(float a, float b) {
  return __fadd_rn(a, b);
}
MX_DEVICE float div_rn(float a, float b) {
  return __fdiv_rn(a, b);
}
// Of |x| < 2^31, to nearest even.
MX_DEVICE int32_t round_to_int(float x) {
  int32_t y;
  asm("cvt.rni.s32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

#else  // the same names, emulated

MX_DEVICE int thread_idx() {
  return emu::thread_idx();
}
MX_DEVICE int block_idx() {
  return emu::block_idx();
}
MX_DEVICE int num_blocks() {
  return emu::num_blocks();
}
MX_DEVICE void sync_threads(MX_ONLY_SITE) {
  emu::barrier(0, emu::num_threads(), true, site);
}
MX_DEVICE void sync_warp(MX_ONLY_SITE) {
  emu::sync_warp(site);
}
MX_DEVICE void bar_sync(int id, int num_threads MX_SITE) {
  emu::barrier(id, num_threads, true, site);
}
MX_DEVICE void bar_arrive(int id, int num_threads MX_SITE) {
  emu::barrier(id, num_threads, false, site);
}
MX_DEVICE float shfl_xor(float value, int lane_mask MX_SITE) {
  return emu::from_bits<float>(emu::shuffle(emu::to_bits(value), emu::lane() ^ lane_mask, site));
}
MX_DEVICE int64_t shfl_idx(int64_t value, int lane MX_SITE) {
  return static_cast<int64_t>(emu::shuffle(static_cast<uint64_t>(value), lane, site));
}
MX_DEVICE bool any(bool predicate MX_SITE) {
  return emu::any(predicate, site);
}
MX_DEVICE void ldmatrix_x4(uint32_t (&r)[4], uint32_t row_address MX_SITE) {
  emu::ldmatrix_x4(r, row_address, false, site);
}
MX_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t row_address MX_SITE) {
  emu::ldmatrix_x4(r, row_address, true, site);
}
MX_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, f16 MX_SITE) {
  emu::mma_m16n8k16(d, a, b0, b1, emu::Element::kFloat16, site);
}
MX_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bf16 MX_SITE) {
  emu::mma_m16n8k16(d, a, b0, b1, emu::Element::kBFloat16, site);
}
MX_DEVICE void cp_async16(uint32_t shared_address, const void* source, bool is_valid MX_SITE) {
  emu::cp_async16(shared_address, source, is_valid, site);
}
MX_DEVICE void cp_async_commit() {
  emu::cp_async_commit();
}
template <int kNumPending>
MX_DEVICE void cp_async_wait() {
  emu::cp_async_wait(kNumPending);
}
MX_DEVICE uint32_t shared_base() {
  return emu::shared_base();
}
MX_DEVICE int32_t ld_shared(uint32_t address MX_SITE) {
  int32_t value;
  emu::load_shared(address, &value, sizeof value, site);
  return value;
}
MX_DEVICE void st_shared(uint32_t address, int32_t value MX_SITE) {
  emu::store_shared(address, &value, sizeof value, site);
}
MX_DEVICE float2 ld_shared_v2(uint32_t address MX_SITE) {
  float2 value;
  emu::load_shared(address, &value, sizeof value, site);
  return value;
}
MX_DEVICE void st_shared_v2(uint32_t address, float2 value MX_SITE) {
  emu::store_shared(address, &value, sizeof value, site);
}
MX_DEVICE Words4 ld_shared_v4(uint32_t address MX_SITE) {
  Words4 value;
  emu::load_shared(address, &value, sizeof value, site);
  return value;
}
MX_DEVICE void st_shared_v4(uint32_t address, const Words4& value MX_SITE) {
  emu::store_shared(address, &value, sizeof value, site);
}
MX_DEVICE float ld_global_cg(const float* address MX_SITE) {
  float value;
  emu::load_global(address, &value, sizeof value, site);
  return value;
}
MX_DEVICE float2 ld_global_cg_v2(const float* address MX_SITE) {
  float2 value;
  emu::load_global(address, &value, sizeof value, site);
  return value;
}
MX_DEVICE void st_global(void* address, uint32_t value MX_SITE) {
  emu::store_global(address, &value, sizeof value, site);
}
MX_DEVICE void st_global(float* address, float value MX_SITE) {
  emu::store_global(address, &value, sizeof value, site);
}
MX_DEVICE void st_global_v2(float* address, float2 value MX_SITE) {
  emu::store_global(address, &value, sizeof value, site);
}
MX_DEVICE int32_t atomic_add_relaxed(int32_t* address, int32_t value MX_SITE) {
  return emu::atomic_add(address, value, site);
}
MX_DEVICE void fence_gpu() {
  emu::fence_gpu();
}
MX_DEVICE uint32_t opaque(uint32_t value) {
  return value;
}
MX_DEVICE float ex2(float x) {
  return emu::flush_subnormal(exp2f(x));
}
MX_DEVICE float lg2(float x) {
  return log2f(x);
}
MX_DEVICE float rcp(float x) {
  return emu::flush_subnormal(1.0f / emu::flush_subnormal(x));
}
MX_DEVICE uint32_t pack2(float low, float high, f16) {
  return emu::float16_bits(low) | uint32_t{emu::float16_bits(high)} << 16;
}
MX_DEVICE uint32_t pack2(float low, float high, bf16) {
  return emu::bfloat16_bits(low) | uint32_t{emu::bfloat16_bits(high)} << 16;
}

MX_DEVICE int num_threads() {
  return emu::num_threads();
}
MX_DEVICE Words4 ld_global_v4(const void* address MX_SITE) {
  Words4 value;
  emu::load_global(address, &value, sizeof value, site);
  return value;
}
MX_DEVICE void st_global_v4(void* address, const Words4& value MX_SITE) {
  emu::store_global(address, &value, sizeof value, site);
}
MX_DEVICE void st_global_v2(void* address, uint32_t first, uint32_t second MX_SITE) {
  const uint32_t value[2] = {first, second};
  emu::store_global(address, value, sizeof value, site);
}
MX_DEVICE uint32_t bits_of(float value) {
  return static_cast<uint32_t>(emu::to_bits(value));
}
MX_DEVICE float float_of(uint32_t bits) {
  return emu::from_bits<float>(bits);
}
MX_DEVICE float2 unpack2(uint32_t pair, f16) {
  return {emu::float16_value(static_cast<uint16_t>(pair)), emu::float16_value(static_cast<uint16_t>(pair >> 16))};
}
MX_DEVICE float2 unpack2(uint32_t pair, bf16) {
  return {float_of(pair << 16), float_of(pair & 0xffff0000u)};
}
MX_DEVICE uint32_t byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = a | uint64_t{b} << 32;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t digit = selector >> (4 * i) & 15;
    const uint32_t byte = bytes >> (8 * (digit & 7)) & 0xff;
    result |= (digit < 8 ? byte : (byte >> 7) * 0xff) << (8 * i);
  }
  return result;
}
MX_DEVICE uint32_t fma2_f16(uint32_t a, uint32_t b, uint32_t c) {
  return emu::fma_f16(a, b, c) | uint32_t{emu::fma_f16(a >> 16, b >> 16, c >> 16)} << 16;
}
MX_DEVICE float mul_rn(float a, float b) {
  return a * b;
}
MX_DEVICE float add_rn(float a, float b) {
  return a + b;
}
MX_DEVICE float div_rn(float a, float b) {
  return a / b;
}
MX_DEVICE int32_t round_to_int(float x) {
  return static_cast<int32_t>(rintf(x));
}

#endif

}  // namespace mx
