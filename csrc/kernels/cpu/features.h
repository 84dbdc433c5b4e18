// What this CPU can execute, and which of the compiled instruction sets the kernels use.
#pragma once

#include <cstdint>

namespace dwattn::cpu {

// Each with those before it. The last two are kAvx512 with other products of bf16: by instructions
// for pairs of numbers, and by AMX tiles.
enum class Isa : int32_t {
  kAuto = -1,
  kGeneric = 0,
  kAvx2 = 1,
  kAvx512 = 2,
  kAvx512Bf16 = 3,
  kAmx = 4,
};
constexpr Isa kAllIsas[] = {Isa::kAmx, Isa::kAvx512Bf16, Isa::kAvx512, Isa::kAvx2,
                            Isa::kGeneric};  // best first

const char* isa_name(Isa isa);

// Features that decide something here; all false where the architecture has no such thing.
struct Features {
  bool amd = false;     // who made it
  bool avx2 = false;    // with FMA and F16C
  bool avx512 = false;  // F, BW, DQ, VL
  bool avx512_bf16 = false;
  bool avx512_fp16 = false;
  bool amx_bf16 = false;
  bool amx_fp16 = false;
  bool arm_bf16 = false;
};

const Features& features();

bool isa_compiled(Isa isa);
bool isa_usable(Isa isa);  // compiled, this CPU has it, and the system grants its registers

// The best usable one, or the one named by the environment variable DWATTN_CPU_ISA
// (generic, avx2, avx512, avx512_bf16, amx) if that is usable. Read once.
Isa default_isa();

// Whether matrix products in this dtype have hardware instructions. Where they have none, libraries
// emulate them several times slower than fp32, so the caller converts to fp32 instead.
bool native_bf16_gemm();
bool native_fp16_gemm();

}  // namespace dwattn::cpu
