// Softmax attention of the prefix tokens (CLS, registers) over all tokens, and the output
// projection of its rows, without keys or values of all tokens.
#pragma once

#include "kernels/cpu/features.h"
#include "kernels/cpu/parallel.h"
#include "kernels/params.h"

namespace dwattn::cpu {

//   q_h = scale (x[:P] wq_h^T + bq_h),  a_h = q_h wk_h,  w_h = softmax(a_h x^T)
//   rows_h = (w_h x) wv_h^T + bv_h,     out (B, P, D_out) = rows wo^T + bo
// A bias of the keys adds the same to all logits of a row and cancels. Rows of x and of the weights
// are dense, strides in elements. Biases have the accumulation type: double for fp64, else float;
// so has everything between x and out.
struct PrefixRowsParams {
  DType dtype;    // of x, the weights and out
  const void* x;  // (B, N, D)
  int64_t x_stride_batch, x_stride_token;
  const void *wq, *wk, *wv;  // (C, D), C = heads * head_dim
  int64_t wq_stride, wk_stride, wv_stride;
  const void *bq, *bv;  // (C), or null
  const void* wo;       // (D_out, C)
  int64_t wo_stride;
  const void* bo;  // (D_out), or null
  void* out;       // (B, P, D_out), contiguous
  double scale;
  int64_t batch, tokens, num_prefix, dim, heads, head_dim, dim_out;

  int64_t rows() const { return batch * num_prefix; }
  int64_t lanes() const { return heads * num_prefix; }
  int64_t channels() const { return heads * head_dim; }
};

int64_t prefix_rows_workspace(const PrefixRowsParams& params);

// The result has the same bits for any number of threads.
Status prefix_rows(const PrefixRowsParams& params, void* workspace, const ParallelFor& parallel,
                   Isa isa = Isa::kAuto);

// Parts of the workspace, in numbers of the accumulation type.
struct PrefixRowsMemory {
  explicit PrefixRowsMemory(const PrefixRowsParams& p)
      : stride(p.dim + 16),  // rows a page apart would crowd into one set of the cache
        queries(padded(p.rows() * stride)),
        mixed(queries + padded(p.rows() * p.channels())),
        weights(mixed + padded(p.batch * p.lanes() * stride)),
        rows(weights + padded(p.batch * p.tokens * p.lanes())),
        end(rows + padded(p.rows() * p.channels())) {}

  int64_t stride;   // between rows of D numbers
  int64_t queries;  // (C, rows); before it, at 0, the prefix tokens (rows, D)
  int64_t mixed;    // a (B, lanes, D), then w x (heads, rows, D)
  int64_t weights;  // logits, then w: (B, N, lanes)
  int64_t rows;     // (rows, C)
  int64_t end;

 private:
  static int64_t padded(int64_t count) { return (count + 15) & -16; }
};

#define DWATTN_DECLARE_ISA(ISA)                                                                \
  namespace ISA {                                                                              \
  Status prefix_rows(const PrefixRowsParams& p, void* workspace, const ParallelFor& parallel); \
  }
DWATTN_DECLARE_ISA(generic)
DWATTN_DECLARE_ISA(avx2)
DWATTN_DECLARE_ISA(avx512)
#undef DWATTN_DECLARE_ISA

}  // namespace dwattn::cpu
