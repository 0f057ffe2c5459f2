// dispatch.cpp: cpuid or HWCAP, and the choice of an ISA.
// Method  The best that the CPU has. But products of bfloat16 pairs are not fast wherever they are: on Zen 4 and 5 they
//         go as often as FMAs, on one of Intel's a fourth as often (one thread: 84 GFLOP/s, where FMAs reach 170). No
//         bit of cpuid tells, so both are timed.
// Source  Intel SDM volume 2A, CPUID; volume 1, 14.3 (AVX), 15.2 (AVX-512), 18.2 (AMX): the instruction set and the
//         operating system's saving of its registers (XCR0) are both needed, for AMX its permission besides (Linux
//         Documentation/arch/x86/xstate.rst). Linux Documentation/arch/arm64/elf_hwcaps.rst.

#include "cpu/dispatch.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#endif

namespace mixattn {
namespace cpu {
namespace {

#if defined(__x86_64__)

struct X86Features {
  bool avx2 = false;         // AVX2, FMA, F16C, and the system saves YMM
  bool avx2_vnni = false;    // besides AVX_VNNI
  bool avx512 = false;       // besides those of avx2 F, BW, VL, DQ, and the system saves ZMM and the masks
  bool avx512_vnni = false;  // besides VNNI
  bool avx512_bf16 = false;  // besides BF16
  bool amx = false;          // besides AMX-TILE, AMX-BF16 and AMX-INT8, and the system saves tiles, of this process too
};

// Tiles are 8 KiB more of a thread's state, and of the frame that a signal finds on its stack: Linux keeps them of
// processes that ask for it, and refuses where some thread has an alternate signal stack without room for them.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr long kArchReqXcompPerm = 0x1023, kXfeatureXtiledata = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureXtiledata) == 0;
#else
  return false;
#endif
}

X86Features x86_features() {
  X86Features features;
  const auto bit = [](unsigned value, int index) { return ((value >> index) & 1) != 0; };
  unsigned eax, ebx, ecx, edx;
  if (__get_cpuid(1, &eax, &ebx, &ecx, &edx) == 0) return features;
  const bool has_fma = bit(ecx, 12), has_xsave = bit(ecx, 27), has_avx = bit(ecx, 28), has_f16c = bit(ecx, 29);
  if (!has_xsave || !has_avx) return features;
  unsigned xcr0, xcr0_high;
  __asm__("xgetbv" : "=a"(xcr0), "=d"(xcr0_high) : "c"(0));
  const bool saves_ymm = (xcr0 & 0x06) == 0x06, saves_zmm = (xcr0 & 0xe6) == 0xe6;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return features;
  features.avx2 = bit(ebx, 5) && has_fma && has_f16c && saves_ymm;
  const bool has_f_dq_bw_vl = bit(ebx, 16) && bit(ebx, 17) && bit(ebx, 30) && bit(ebx, 31);
  features.avx512 = features.avx2 && has_f_dq_bw_vl && saves_zmm;
  features.avx512_vnni = features.avx512 && bit(ecx, 11);
  const bool has_subleaf_1 = eax >= 1;
  const bool has_tiles = bit(edx, 22) && bit(edx, 24) && bit(edx, 25), saves_tiles = (xcr0 & 0x60000) == 0x60000;
  if (!has_subleaf_1 || __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) == 0) return features;
  features.avx2_vnni = features.avx2 && bit(eax, 4);
  features.avx512_bf16 = features.avx512_vnni && bit(eax, 5);
  features.amx = features.avx512_bf16 && has_tiles && saves_tiles && may_use_tiles();
  return features;
}

#elif defined(__aarch64__)

// NEON itself, and its conversions from float16, every aarch64 CPU has.
bool has_dot_products() {
  return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
}
bool has_bfloat16_products() {
  const unsigned long needed = HWCAP2_BF16 | HWCAP2_I8MM;
  return has_dot_products() && (getauxval(AT_HWCAP2) & needed) == needed;
}

#endif

// Expected are 1 and 4 times an FMA's time, and 2 divides them: what disturbs a measurement does not make the one the
// other, so that each process can measure for itself and no file need keep the outcome. 55 us on a Zen 4. The least of
// the rounds leaves out those that were interrupted, and the first ones, in which the CPU still powers up its wide
// units (some 20 us on Intel's).
LoopTimes time_loops(const IsaKernels& kernels) {
  constexpr int kRounds = 16;
  constexpr int64_t kLoopRounds = 256;  // of 16 chains: 4,096 clocks at an instruction per clock
  volatile float last;                  // somebody must want the result, or the loops are not run
  const auto seconds = [&](float (*loop)(int64_t)) {
    const auto start = std::chrono::steady_clock::now();
    last = loop(kLoopRounds);
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  };
  LoopTimes best{seconds(kernels.bfloat16_loop), seconds(kernels.fma_loop)};
  for (int round = 1; round < kRounds; ++round) {
    best.bfloat16_s = std::min(best.bfloat16_s, seconds(kernels.bfloat16_loop));
    best.fma_s = std::min(best.fma_s, seconds(kernels.fma_loop));
  }
  return best;
}

int64_t cache_bytes(int name) {
  const long bytes = sysconf(name);
  return bytes > 0 ? bytes : 0;
}

}  // namespace

const std::vector<const IsaKernels*>& compiled_kernels() {
  static const std::vector<const IsaKernels*> kernels = {
#if defined(__x86_64__)
      &kAmxKernels,    &kAvx512Bf16Kernels, &kAvx512VnniKernels, &kAvx512Kernels, &kAvx2VnniKernels, &kAvx2Kernels,
#elif defined(__aarch64__)
      &kNeonBf16Kernels,
      &kNeonKernels,
#endif
      &kScalarKernels,
  };
  return kernels;
}

bool is_available(const IsaKernels& kernels) {
#if defined(__x86_64__)
  static const X86Features features = x86_features();
  if (&kernels == &kAmxKernels) return kernels.is_emulated ? features.avx512_bf16 : features.amx;
  if (&kernels == &kAvx512Bf16Kernels) return features.avx512_bf16;
  if (&kernels == &kAvx512VnniKernels) return features.avx512_vnni;
  if (&kernels == &kAvx512Kernels) return kernels.is_emulated || features.avx512;
  if (&kernels == &kAvx2VnniKernels) return kernels.is_emulated ? features.avx512_vnni : features.avx2_vnni;
  if (&kernels == &kAvx2Kernels) return features.avx2;
#elif defined(__aarch64__)
  if (&kernels == &kNeonBf16Kernels) return has_bfloat16_products();
  if (&kernels == &kNeonKernels) return has_dot_products();
#endif
  return &kernels == &kScalarKernels;
}

KernelChoice choose_kernels(const std::vector<const IsaKernels*>& candidates,
                            const std::function<LoopTimes(const IsaKernels&)>& time_loops) {
  constexpr double kProductsPerLane = 2.0;
  KernelChoice choice{candidates.front(), ""};
  for (const IsaKernels* kernels : candidates) {
    choice.kernels = kernels;
    if (kernels->bfloat16_loop == nullptr) break;
    const LoopTimes times = time_loops(*kernels);
    const double fmas = times.bfloat16_s / times.fma_s;
    if (fmas < kProductsPerLane) break;
    char reason[80];
    std::snprintf(reason, sizeof(reason), "%s: two bfloat16 products take as long as %.1f FMAs", kernels->name, fmas);
    choice.passed_over = reason;
  }
  return choice;
}

const KernelChoice& best_choice() {
  static const KernelChoice choice = [] {
    std::vector<const IsaKernels*> candidates;
    for (const IsaKernels* kernels : compiled_kernels()) {
      if (is_available(*kernels) && !kernels->is_emulated) candidates.push_back(kernels);
    }
    return choose_kernels(candidates, time_loops);
  }();
  return choice;
}

const IsaKernels& best_kernels() {
  return *best_choice().kernels;
}

const IsaKernels& compiled_kernels_named(const std::string& isa) {
  for (const IsaKernels* kernels : compiled_kernels()) {
    if (isa == kernels->name) return *kernels;
  }
  throw std::invalid_argument("this build has no kernels for '" + isa + "'");
}

const IsaKernels& kernels_named(const std::string& isa) {
  std::string names;
  for (const IsaKernels* kernels : compiled_kernels()) {
    if (!is_available(*kernels)) continue;
    if (isa == kernels->name) return *kernels;
    names += (names.empty() ? "" : ", ") + std::string(kernels->name);
  }
  throw std::invalid_argument("isa must be one that this CPU runs (" + names + "), got '" + isa + "'");
}

CpuDescription describe_cpu() {
  CpuDescription cpu;
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (line.compare(0, 10, "model name") == 0) {
      const size_t colon = line.find(": ");
      if (colon != std::string::npos) cpu.model = line.substr(colon + 2);
      break;
    }
  }
  if (cpu.model.empty()) cpu.model = "unknown CPU";
  cpu.num_cpus = sysconf(_SC_NPROCESSORS_ONLN);
#if defined(_SC_LEVEL1_DCACHE_SIZE)
  cpu.l1d_bytes = cache_bytes(_SC_LEVEL1_DCACHE_SIZE);
  cpu.l2_bytes = cache_bytes(_SC_LEVEL2_CACHE_SIZE);
#else
  cpu.l1d_bytes = cpu.l2_bytes = 0;
#endif
  return cpu;
}

}  // namespace cpu
}  // namespace mixattn
