#include "kernels/cpu/features.h"

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#define DWATTN_X86 1
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif
#if defined(DWATTN_HAVE_AMX) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace dwattn::cpu {
namespace {

#ifdef DWATTN_X86
uint64_t enabled_register_state() {
  uint32_t low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t{high} << 32) | low;
}

constexpr bool bit(uint32_t word, int index) { return (word >> index) & 1u; }

Features detect() {
  Features f;
  uint32_t a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(0, &a, &b, &c, &d)) return f;
  f.amd = b == signature_AMD_ebx && c == signature_AMD_ecx && d == signature_AMD_edx;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return f;
  const bool fma = bit(c, 12), osxsave = bit(c, 27), f16c = bit(c, 29);
  if (!osxsave) return f;
  const uint64_t state = enabled_register_state();
  const bool os_avx = (state & 0x6) == 0x6;
  const bool os_avx512 = (state & 0xe6) == 0xe6;
  const bool os_amx = (state & 0x60000) == 0x60000;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return f;
  const uint32_t subleaves = a;
  f.avx2 = os_avx && fma && f16c && bit(b, 5);
  f.avx512 = os_avx512 && f.avx2 && bit(b, 16) && bit(b, 17) && bit(b, 30) && bit(b, 31);
  f.avx512_fp16 = f.avx512 && bit(d, 23);
  f.amx_bf16 = os_amx && bit(d, 22) && bit(d, 24);
  if (subleaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) {
    f.avx512_bf16 = f.avx512 && bit(a, 5);
    f.amx_fp16 = f.amx_bf16 && bit(a, 21);
  }
  return f;
}
#elif defined(__aarch64__) && defined(__linux__)
Features detect() {
  constexpr unsigned long kHwcap2Bf16 = 1ul << 14;  // HWCAP2_BF16 of <asm/hwcap.h>
  Features f;
  f.arm_bf16 = (getauxval(AT_HWCAP2) & kHwcap2Bf16) != 0;
  return f;
}
#else
Features detect() { return {}; }
#endif

// Linux keeps the tile registers from a process until it asks for them, since they make the frames
// of its signal handlers larger; it may refuse.
bool tiles_granted() {
#if defined(DWATTN_HAVE_AMX) && defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // of <asm/prctl.h>
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
#else
  return false;
#endif
}

Isa choose_default() {
  if (const char* name = std::getenv("DWATTN_CPU_ISA")) {
    for (Isa isa : kAllIsas) {
      if (std::strcmp(name, isa_name(isa)) == 0 && isa_usable(isa)) return isa;
    }
  }
  for (Isa isa : kAllIsas) {
    if (isa_usable(isa)) return isa;
  }
  return Isa::kGeneric;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAuto:
      return "auto";
    case Isa::kGeneric:
      return "generic";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx512Bf16:
      return "avx512_bf16";
    case Isa::kAmx:
      return "amx";
  }
  return "unknown";
}

const Features& features() {
  static const Features detected = detect();
  return detected;
}

bool isa_compiled(Isa isa) {
  switch (isa) {
    case Isa::kGeneric:
      return true;
#ifdef DWATTN_HAVE_AVX2
    case Isa::kAvx2:
      return true;
#endif
#ifdef DWATTN_HAVE_AVX512
    case Isa::kAvx512:
      return true;
#endif
#ifdef DWATTN_HAVE_AVX512_BF16
    case Isa::kAvx512Bf16:
      return true;
#endif
#ifdef DWATTN_HAVE_AMX
    case Isa::kAmx:
      return true;
#endif
    default:
      return false;
  }
}

bool isa_usable(Isa isa) {
  if (!isa_compiled(isa)) return false;
  if (isa == Isa::kAvx2) return features().avx2;
  if (isa == Isa::kAvx512) return features().avx512;
  if (isa == Isa::kAvx512Bf16) return features().avx512_bf16;
  if (isa == Isa::kAmx) {
    return features().amx_bf16 && features().avx512_bf16 && tiles_granted();
  }
  return true;
}

Isa default_isa() {
  static const Isa chosen = choose_default();
  return chosen;
}

bool native_bf16_gemm() {
  const Features& f = features();
  return f.avx512_bf16 || f.amx_bf16 || f.arm_bf16;
}

bool native_fp16_gemm() {
  const Features& f = features();
  return f.avx512_fp16 || f.amx_fp16;
}

}  // namespace dwattn::cpu
