// Matrix products with the weight of a linear layer, for inner widths and dtypes at which a BLAS
// spends much of its time on other things: out = a weight^T + bias, the bias for nothing, 16-bit
// numbers converted on the way.
#pragma once

#include "kernels/cpu/features.h"
#include "kernels/cpu/parallel.h"
#include "kernels/params.h"

namespace dwattn::cpu {

// Whether the instruction set multiplies numbers of this dtype as they are: bf16 by AMX tiles, or
// by AVX512_BF16. Then weight, `a` and `out` all have it.
bool by_tiles(DType dtype, Isa isa);  // the weight is packed in passing, not before
bool by_pairs(DType dtype, Isa isa);

// A weight (n, k) in the order in which the product reads it. Packed numbers have the accumulation
// type, double for fp64, else float, unless they are multiplied as they are.
struct WeightParams {
  const void* weight;
  DType dtype;
  int64_t stride;  // elements between rows
  int64_t n, k;
  void* packed;  // packed_weight_bytes()
  // Whether the product packs each part right before it reads it, and pack_weight does nothing.
  bool in_passing = false;
};

// Whether that is faster for a weight that one product alone reads, with so many rows.
bool pack_in_passing(int64_t rows, Isa isa = Isa::kAuto);

int64_t packed_weight_bytes(const WeightParams& params, Isa isa = Isa::kAuto);
Status pack_weight(const WeightParams& params, const ParallelFor& parallel, Isa isa = Isa::kAuto);

// out (batch, m, n) = a (batch, m, k) weight (n, k)^T + bias (n); rows are dense, strides in
// elements. `a` and `out` are both fp64, or each fp32, fp16 or bf16.
struct GemmParams {
  const void* a;
  DType a_dtype;
  int64_t a_stride_batch, a_stride_row;
  const WeightParams* weight;
  const void* bias;  // in the accumulation type, or null
  void* out;
  DType out_dtype;
  int64_t out_stride_batch, out_stride_row;
  int64_t batch, m, n, k;
};

int64_t gemm_workspace(const GemmParams& params, int64_t threads, Isa isa = Isa::kAuto);
Status gemm(const GemmParams& params, void* workspace, const ParallelFor& parallel,
            Isa isa = Isa::kAuto);

#define DWATTN_DECLARE_ISA(ISA)                                                        \
  namespace ISA {                                                                      \
  Status pack_weight(const WeightParams& params, const ParallelFor& parallel);         \
  Status gemm(const GemmParams& params, void* workspace, const ParallelFor& parallel); \
  }
DWATTN_DECLARE_ISA(generic)
DWATTN_DECLARE_ISA(avx2)
DWATTN_DECLARE_ISA(avx512)
#undef DWATTN_DECLARE_ISA

// Rows of a block, which passes by all panels of the weight, in tiles of `tile` rows: a few of
// them, so that the outputs of a block lie close together; many where the weight is too large for
// the cache and has to be read again by each block. Where blocks are few, every thread gets as
// many, and all are about as long: 577 rows in blocks of 288 would leave the second of two threads
// a single row.
int64_t rows_of_a_block(const GemmParams& params, int64_t tile, int64_t weight_bytes,
                        int64_t threads);

// Columns of a packed weight are rounded up to this many, a multiple of every vector width.
constexpr int64_t kColumnPad = 16;

}  // namespace dwattn::cpu
