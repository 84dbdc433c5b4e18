// The CPU kernels for the avx512 instruction set; CMake gives this file its compiler flags.
#define DWATTN_ISA avx512
#include "kernels/cpu/attention_variance_impl.h"
#include "kernels/cpu/dw_aggregate_impl.h"
#include "kernels/cpu/gemm_impl.h"
#include "kernels/cpu/prefix_rows_impl.h"
