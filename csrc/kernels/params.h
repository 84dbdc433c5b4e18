// What every kernel of the project takes: raw pointers, plain sizes and a status code. Nothing
// under csrc/kernels knows torch, Python or TensorRT.
#pragma once

#include <cstdint>

namespace dwattn {

enum class DType : int32_t { kFloat32 = 0, kFloat64 = 1, kFloat16 = 2, kBFloat16 = 3 };

enum class Status : int32_t {
  kOk = 0,
  kInvalidArgument = 1,
  kUnsupportedDType = 2,
  kUnsupportedIsa = 3,
  kLaunchFailed = 4,
};

inline const char* status_text(Status status) {
  switch (status) {
    case Status::kOk:
      return "ok";
    case Status::kInvalidArgument:
      return "invalid argument: a size is out of range or a pointer is null";
    case Status::kUnsupportedDType:
      return "unsupported combination of dtypes";
    case Status::kUnsupportedIsa:
      return "the requested instruction set is not compiled in or this CPU lacks it";
    case Status::kLaunchFailed:
      return "the GPU refused the launch: no kernel image for its architecture, too little shared "
             "memory, or an earlier asynchronous error";
  }
  return "unknown status";
}

constexpr int64_t dtype_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// The depthwise 3x3 aggregation with context:
//   Y[b, i*W+j, c] = sum_{r,s in 0..2} K[c,r,s] * V'[b, P + (i+r-1)*W + (j+s-1), c] + ctx[b,c]
//   ctx[b,c]       = sum_{t<P} kappa[t,c] V'[b,t,c] + mu[c] * mean_patches(V')[b,c] + beta[c]
//   V'             = V + v_bias, and zero outside the grid
// The bias of the value projection is an argument because adding it here is free, while adding it
// in the matrix product costs one more pass over V.
//
// Strides are in elements, not bytes; the channel stride of v and y is 1. The accumulation type
// ("acc") is double when v is fp64, else float; coefficients are given in it, contiguous.
struct DwAggregateParams {
  const void* v;  // (B, N, C), N = num_prefix + height * width
  DType v_dtype;
  int64_t v_stride_batch;
  int64_t v_stride_token;

  void* y;  // (B, H*W, C); same dtype as v, or fp16/bf16 from an fp32 v
  DType y_dtype;
  int64_t y_stride_batch;
  int64_t y_stride_token;

  const void* kernel;  // (C, 3, 3) acc
  const void* kappa;   // (P, C) acc, or null
  const void* mu;      // (C) acc, or null
  const void* beta;    // (C) acc, or null
  const void* v_bias;  // (C) acc, or null

  int64_t batch;
  int64_t height;
  int64_t width;
  int64_t num_prefix;
  int64_t channels;
};

}  // namespace dwattn
