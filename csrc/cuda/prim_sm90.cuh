// prim_sm90.cuh: the instructions that Hopper adds, under one name with two implementations, as in prim.cuh.
// Method  A warpgroup is 4 warps, the first a multiple of 4; what is said of one, all 128 threads of it do together.
//         Matrices of wgmma lie in shared memory as rows of 128 bytes whose 16-byte chunks are permuted: chunk c of row
//         r lies where chunk c ^ (r mod 8) would; 8 rows, 1,024 bytes, start at a multiple of 1,024.
// Hazard  wgmma reads and load_box writes shared memory through the async proxy: who wrote there by other instructions,
//         cp.async and mbarrier_init too, is to fence_proxy_async() before the barrier that tells who goes on.
// Limits  sm_90a; accumulators in float32 of 64 rows by 8 kColumnTiles columns, 64, 96, 128, 192 or 256
// Twins   csrc/emu/emu.h (semantics); tests/emu/test_primitives_sm90.py (fragment and descriptor tables)
// Source  PTX ISA 8.7, sections 9.7.9.27 (cp.async.bulk.tensor), 9.7.13.15 (mbarrier), 9.7.15 (wgmma, its matrix
//         descriptor), 9.7.19.5 (setmaxnreg); CUDA Driver API, cuTensorMapEncodeTiled
#pragma once

#include "cuda/prim.cuh"

namespace mx {

constexpr int kWarpgroupSize = 128;
constexpr int kWgmmaRows = 64;
constexpr int kWgmmaDepth = 16;
constexpr uint32_t kSwizzledRowBytes = 128;
constexpr uint32_t kSwizzledBlockBytes = 8 * kSwizzledRowBytes;

// What tells wgmma where a matrix is. Of rows that hold the depth (K-major): stride_bytes from 8 rows to the next 8,
// leading_bytes not used. Of rows that are a step of the depth each (MN-major): leading_bytes from 64 columns to the
// next 64, stride_bytes from 8 rows to the next 8.
MX_DEVICE uint64_t matrix_descriptor(uint32_t address, uint32_t leading_bytes, uint32_t stride_bytes) {
  constexpr uint64_t kSwizzle128 = 1;
  const auto field = [](uint32_t bytes) { return uint64_t{(bytes & 0x3ffff) >> 4}; };
  return field(address) | field(leading_bytes) << 16 | field(stride_bytes) << 32 | kSwizzle128 << 62;
}

// A tensor in global memory and the box that one load takes of it: what the driver makes of them, for nobody to look
// into (cuda/image.h, TensorMap). A kernel has it as a parameter that is a MX_GRID_CONSTANT.
struct alignas(64) TensorMap {
  uint64_t opaque[16];
};

#ifdef __CUDACC__

// ---- barriers in shared memory --------------------------------------------------------------------------------------

// A phase of the barrier at this address, 8 bytes, ends when num_arrivals threads have arrived; phases are counted from
// 0. Others may use it behind a barrier of the block.
MX_DEVICE void mbarrier_init(uint32_t address, int num_arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address), "r"(num_arrivals) : "memory");
}
// What the thread did before is seen by who waits for the phase.
MX_DEVICE void mbarrier_arrive(uint32_t address) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address) : "memory");
}
// The same, and before: the phase also waits for so many bytes more of load_box.
MX_DEVICE void mbarrier_arrive_expect(uint32_t address, uint32_t num_bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address), "r"(num_bytes) : "memory");
}
// Until a phase of this parity has ended; at once if the phase under way is of the other one. So a wait for parity 1
// ends at once on a barrier that nobody has arrived at.
MX_DEVICE void mbarrier_wait(uint32_t address, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "WAIT:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra WAIT;\n"
      "}" ::"r"(address),
      "r"(parity)
      : "memory");
}

// What this thread wrote to shared memory, by whatever instruction, comes before wgmma and load_box that other threads
// issue behind a barrier.
MX_DEVICE void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- boxes of tensors -----------------------------------------------------------------------------------------------

// Starts the copy of the map's box from these coordinates on, in elements, the innermost dimension first, to `to`,
// which starts 1,024 bytes. Rows of 128 bytes lie there as wgmma wants them; what is outside of the tensor is 0. The
// bytes of the whole box count towards the phase of `barrier` that is under way: who waits for it sees them. Of the
// tensor it sees what kernels before this one wrote.
MX_DEVICE void load_box(uint32_t to, const TensorMap& map, int x0, int x1, int x2, int x3, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
      "[%6];" ::"r"(to),
      "l"(&map), "r"(x0), "r"(x1), "r"(x2), "r"(x3), "r"(barrier)
      : "memory");
}
// Has the map fetched ahead of the first load.
MX_DEVICE void prefetch_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// ---- registers ------------------------------------------------------------------------------------------------------

// Of a warpgroup, per thread: kCount is a multiple of 8 in [24, 256]. raise waits until the block has as many left.
template <int kCount>
MX_DEVICE void raise_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}
template <int kCount>
MX_DEVICE void lower_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

// ---- products of a warpgroup ----------------------------------------------------------------------------------------

// Before the first product, and whenever registers that products read or add to were touched since.
MX_DEVICE void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
// Ends the current group of products.
MX_DEVICE void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until all but the kNumPending latest groups are done: their sums may be used and their matrices overwritten.
template <int kNumPending>
MX_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kNumPending) : "memory");
}

// Register lists of an accumulator's inline PTX: operands 0 to n - 1.
#define MX_REGISTERS_32                                                                                            \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31"
#define MX_REGISTERS_48 \
  MX_REGISTERS_32       \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define MX_REGISTERS_64 \
  MX_REGISTERS_48       \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define MX_REGISTERS_96                                                                                    \
  MX_REGISTERS_64                                                                                          \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, " \
  "%84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define MX_REGISTERS_128                                                                                             \
  MX_REGISTERS_96                                                                                                    \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, " \
  "%115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define MX_TILE(d, i) "+f"(d[i][0]), "+f"(d[i][1]), "+f"(d[i][2]), "+f"(d[i][3])
#define MX_TILES_4(d, i) MX_TILE(d, i), MX_TILE(d, i + 1), MX_TILE(d, i + 2), MX_TILE(d, i + 3)
#define MX_SUMS_32(d) MX_TILES_4(d, 0), MX_TILES_4(d, 4)
#define MX_SUMS_48(d) MX_SUMS_32(d), MX_TILES_4(d, 8)
#define MX_SUMS_64(d) MX_SUMS_48(d), MX_TILES_4(d, 12)
#define MX_SUMS_96(d) MX_SUMS_64(d), MX_TILES_4(d, 16), MX_TILES_4(d, 20)
#define MX_SUMS_128(d) MX_SUMS_96(d), MX_TILES_4(d, 24), MX_TILES_4(d, 28)

// Both products of one width and element. The operands behind the kNumSums sums are A (a descriptor, or 4 registers), B
// and whether to add.
#define MX_WGMMA(element, type, kColumns, kNumSums, kA0, kA1, kA2, kA3, kB, kAdds)                                   \
  MX_DEVICE void wgmma_shared(float (&d)[kColumns / 8][4], uint64_t a, uint64_t b, bool adds, element) {             \
    asm volatile("{.reg .pred adds; setp.ne.b32 adds, %" #kA2 ", 0; wgmma.mma_async.sync.aligned.m64n" #kColumns     \
                 "k16.f32." type "." type " {" MX_REGISTERS_##kNumSums "}, %" #kA0 ", %" #kA1 ", adds, 1, 1, 0, 0;}" \
                 : MX_SUMS_##kNumSums(d)                                                                             \
                 : "l"(a), "l"(b), "r"(static_cast<int>(adds)));                                                     \
  }                                                                                                                  \
  MX_DEVICE void wgmma_registers(float (&d)[kColumns / 8][4], const uint32_t (&a)[4], uint64_t b, bool adds,         \
                                 element) {                                                                          \
    asm volatile("{.reg .pred adds; setp.ne.b32 adds, %" #kAdds ", 0; wgmma.mma_async.sync.aligned.m64n" #kColumns   \
                 "k16.f32." type "." type " {" MX_REGISTERS_##kNumSums "}, {%" #kA0 ", %" #kA1 ", %" #kA2 ", %" #kA3 \
                                                                       "}, %" #kB ", adds, 1, 1, 1;}"                \
                 : MX_SUMS_##kNumSums(d)                                                                             \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(adds)));                 \
  }
#define MX_WGMMA_WIDTHS(element, type)                       \
  MX_WGMMA(element, type, 64, 32, 32, 33, 34, 35, 36, 37)    \
  MX_WGMMA(element, type, 96, 48, 48, 49, 50, 51, 52, 53)    \
  MX_WGMMA(element, type, 128, 64, 64, 65, 66, 67, 68, 69)   \
  MX_WGMMA(element, type, 192, 96, 96, 97, 98, 99, 100, 101) \
  MX_WGMMA(element, type, 256, 128, 128, 129, 130, 131, 132, 133)

// d (64 x 8 kColumnTiles, float32) = a (64 x 16) b (16 x 8 kColumnTiles), plus d if adds. Warp w of the warpgroup has
// rows 16 w to 16 w + 15 of d, each 8 columns as mma_m16n8k16 has its d. Starts the product: d, and what it is made of,
// is not to be touched until wgmma_wait.
//   wgmma_shared      a and b K-major: rows of a, columns of b are rows of 128 bytes
//   wgmma_registers   a as mma_m16n8k16 has it, of the warp's rows; b MN-major: a step of the depth is a row
MX_WGMMA_WIDTHS(f16, "f16")
MX_WGMMA_WIDTHS(bf16, "bf16")

#undef MX_WGMMA_WIDTHS
#undef MX_WGMMA

#else  // the same names, emulated

MX_DEVICE void mbarrier_init(uint32_t address, int num_arrivals MX_SITE) {
  emu::mbarrier_init(address, num_arrivals, site);
}
MX_DEVICE void mbarrier_arrive(uint32_t address MX_SITE) {
  emu::mbarrier_arrive(address, site);
}
MX_DEVICE void mbarrier_arrive_expect(uint32_t address, uint32_t num_bytes MX_SITE) {
  emu::mbarrier_arrive_expect(address, num_bytes, site);
}
MX_DEVICE void mbarrier_wait(uint32_t address, int parity MX_SITE) {
  emu::mbarrier_wait(address, parity, site);
}
MX_DEVICE void fence_proxy_async() {
  emu::fence_proxy_async();
}
MX_DEVICE void load_box(uint32_t to, const TensorMap& map, int x0, int x1, int x2, int x3, uint32_t barrier MX_SITE) {
  emu::load_box(to, &map, {x0, x1, x2, x3}, barrier, site);
}
MX_DEVICE void prefetch_map(const TensorMap& map MX_SITE) {
  emu::check_map(&map, site);
}
template <int kCount>
MX_DEVICE void raise_registers(MX_ONLY_SITE) {
  emu::set_registers(kCount, true, site);
}
template <int kCount>
MX_DEVICE void lower_registers(MX_ONLY_SITE) {
  emu::set_registers(kCount, false, site);
}
MX_DEVICE void wgmma_fence() {
  emu::wgmma_fence();
}
MX_DEVICE void wgmma_commit(MX_ONLY_SITE) {
  emu::wgmma_commit(site);
}
template <int kNumPending>
MX_DEVICE void wgmma_wait(MX_ONLY_SITE) {
  emu::wgmma_wait(kNumPending, site);
}
constexpr emu::Element emulated_element(f16) {
  return emu::Element::kFloat16;
}
constexpr emu::Element emulated_element(bf16) {
  return emu::Element::kBFloat16;
}
template <int kColumnTiles, class T>
MX_DEVICE void wgmma_shared(float (&d)[kColumnTiles][4], uint64_t a, uint64_t b, bool adds, T element MX_SITE) {
  emu::wgmma(&d[0][0], kColumnTiles, {a, nullptr}, b, adds, emulated_element(element), site);
}
template <int kColumnTiles, class T>
MX_DEVICE void wgmma_registers(float (&d)[kColumnTiles][4], const uint32_t (&a)[4], uint64_t b, bool adds,
                               T element MX_SITE) {
  emu::wgmma(&d[0][0], kColumnTiles, {0, a}, b, adds, emulated_element(element), site);
}

#endif

}  // namespace mx
