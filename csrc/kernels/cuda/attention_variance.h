// Attention and running statistics of its maps on CUDA. See ../attention_variance_params.h for the
// definition.
//
// E never exists in memory: one kernel computes lse and out, a second one forms E again tile by
// tile and keeps the moments of its tile in registers for all images of the batch.
#pragma once

#include "kernels/attention_variance_params.h"

struct CUstream_st;  // cudaStream_t is a pointer to it

namespace dwattn::cuda {

using Stream = CUstream_st*;

Status attention_variance(const AttentionVarianceParams& params, Stream stream);

}  // namespace dwattn::cuda
