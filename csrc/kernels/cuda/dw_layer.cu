// dw_layer: which kernels a layer takes, and where in the workspace they meet. Host code.
//
// Prefix rows that go through the output projection of the patches are put above them, into the
// first P rows of Y: one product then writes all of `out`.
#include "kernels/cuda/dw_attention.h"
#include "kernels/cuda/dw_layer.h"
#include "kernels/cuda/linear.h"
#include "kernels/cuda/lowrank_dw_attention.h"
#include "kernels/cuda/prefix_rows.h"

namespace dwattn::cuda {
namespace {

// Rows of `out` above the patches.
int64_t rows_above(const DwLayerParams& p) {
  return p.prefix == PrefixRows::kNone ? 0 : p.num_prefix;
}

// Whether prefix rows share the product of the patches.
bool rows_in_y(const DwLayerParams& p) {
  return rows_above(p) > 0 && !p.narrow && p.prefix_out == nullptr;
}

bool has_context(const DwLayerParams& p) {
  return p.mu != nullptr || p.beta != nullptr || (p.kappa != nullptr && p.num_prefix > 0);
}

const void* advanced(const void* base, DType dtype, int64_t elements) {
  return static_cast<const char*>(base) + elements * dtype_size(dtype);
}
void* advanced(void* base, DType dtype, int64_t elements) {
  return static_cast<char*>(base) + elements * dtype_size(dtype);
}

DwAttentionParams values_of(const DwLayerParams& p) {
  DwAttentionParams v{};
  v.dtype = p.dtype;
  v.tf32 = p.tf32;
  v.x = p.x;
  v.x_stride_batch = p.x_stride_batch;
  v.x_stride_token = p.x_stride_token;
  v.wv = p.wv;
  v.wv_stride = p.dim;
  v.bv = p.bv;
  v.kernel = p.kernel;
  v.kappa = p.kappa;
  v.mu = p.mu;
  v.beta = p.beta;
  v.batch = p.batch;
  v.height = p.height;
  v.width = p.width;
  v.num_prefix = p.num_prefix;
  v.dim = p.dim;
  v.channels = p.channels;
  return v;
}

PrefixRowsParams rows_of(const DwLayerParams& p) {
  const bool own = p.prefix_value != nullptr;
  PrefixRowsParams r{};
  r.dtype = p.dtype;
  r.x = p.x;
  r.x_stride_batch = p.x_stride_batch;
  r.x_stride_token = p.x_stride_token;
  r.value = own ? p.prefix_value : p.wv;
  r.value_bias = own ? p.prefix_value_bias : p.bv;
  r.query = p.query;
  r.query_bias = p.query_bias;
  r.key = p.key;
  r.a = p.static_a;
  r.b = p.static_b;
  r.rows_stride_batch = p.num_prefix * p.prefix_channels;
  r.rows_stride_token = p.prefix_channels;
  r.batch = p.batch;
  r.num_prefix = p.num_prefix;
  r.patches = p.height * p.width;
  r.dim = p.dim;
  r.channels = p.prefix_channels;
  r.num_heads = p.num_heads;
  return r;
}

// The projection of y into rows first, first + 1, ... of `out`.
LinearParams projection_of(const DwLayerParams& p, int64_t first) {
  LinearParams l{};
  l.dtype = p.dtype;
  l.tf32 = p.tf32;
  l.weight = p.wo;
  l.weight_stride = p.channels;
  l.bias = p.bo;
  if (p.residual != nullptr) {
    l.residual = advanced(p.residual, p.dtype, first * p.residual_stride_token);
  }
  l.residual_stride_batch = p.residual_stride_batch;
  l.residual_stride_token = p.residual_stride_token;
  l.gamma = p.gamma;
  l.out = advanced(p.out, p.dtype, first * p.out_stride_token);
  l.out_stride_batch = p.out_stride_batch;
  l.out_stride_token = p.out_stride_token;
  l.batch = p.batch;
  l.dim = p.channels;
  l.dim_out = p.dim_out;
  return l;
}

LowrankDwParams narrow_of(const DwLayerParams& p, const float* ctx) {
  LowrankDwParams n{};
  n.dtype = p.dtype;
  n.tf32 = p.tf32;
  n.x = p.x;
  n.x_stride_batch = p.x_stride_batch;
  n.x_stride_token = p.x_stride_token;
  n.a = p.wv;
  n.a_stride = p.dim;
  n.b = p.wo;
  n.b_stride = p.channels;
  n.a_bias = p.bv;
  n.kernel = p.kernel;
  n.ctx = ctx;
  n.b_bias = p.bo;
  n.gamma = p.gamma;
  // The kernel counts rows from the first prefix token, which `out` may not have.
  const int64_t missing = p.num_prefix - rows_above(p);
  if (p.residual != nullptr) {
    n.residual = advanced(p.residual, p.dtype, -missing * p.residual_stride_token);
  }
  n.residual_stride_batch = p.residual_stride_batch;
  n.residual_stride_token = p.residual_stride_token;
  n.out = advanced(p.out, p.dtype, -missing * p.out_stride_token);
  n.out_stride_batch = p.out_stride_batch;
  n.out_stride_token = p.out_stride_token;
  n.batch = p.batch;
  n.height = p.height;
  n.width = p.width;
  n.num_prefix = p.num_prefix;
  n.dim = p.dim;
  n.dim_out = p.dim_out;
  n.rank = p.channels;
  return n;
}

// Parts of the workspace, in bytes; each starts at a 16-byte boundary. Those that a layer does not
// need are empty.
struct Parts {
  int64_t y;       // wide: (B, N_y, C) of dtype, N_y = H*W, and P more if prefix rows are in it
  int64_t values;  // wide: what dw_attention needs
  int64_t ctx;     // narrow: (B, C)
  int64_t mean;    // narrow: (B, D)
  int64_t rows;    // prefix rows that are not in y: (B, P, Cp) of dtype
  int64_t prefix;  // what making the prefix rows needs
  int64_t end = 0;

  explicit Parts(const DwLayerParams& p) {
    const int64_t size = dtype_size(p.dtype), above = rows_above(p);
    take(y, p.narrow ? 0 : p.batch * y_rows(p) * p.channels * size);
    take(values, p.narrow ? 0 : dw_attention_workspace(values_of(p)));
    take(ctx, p.narrow && has_context(p) ? p.batch * p.channels * kFloat : 0);
    take(mean, p.narrow && p.mu != nullptr ? p.batch * p.dim * kFloat : 0);
    take(rows, rows_in_y(p) ? 0 : p.batch * above * p.prefix_channels * size);
    take(prefix, above == 0                       ? 0
                 : p.prefix == PrefixRows::kExact ? exact_prefix_rows_workspace(rows_of(p))
                                                  : static_prefix_rows_workspace(rows_of(p)));
  }

  static int64_t y_rows(const DwLayerParams& p) {
    return p.height * p.width + (rows_in_y(p) ? p.num_prefix : 0);
  }

 private:
  static constexpr int64_t kFloat = sizeof(float);

  void take(int64_t& part, int64_t bytes) {
    part = end;
    end += (bytes + 15) / 16 * 16;
  }
};

// Prefix rows before the projection, to `r.rows`. `mean` of the patches is null where it is not
// known.
Status make_rows(const DwLayerParams& p, PrefixRowsParams r, const float* mean, void* workspace,
                 Stream stream) {
  r.mean = mean;
  return p.prefix == PrefixRows::kExact ? exact_prefix_rows(r, workspace, stream)
                                        : static_prefix_rows(r, workspace, stream);
}

// Prefix rows by a projection of their own.
Status write_rows(const DwLayerParams& p, const Parts& parts, char* workspace, const float* mean,
                  Stream stream) {
  PrefixRowsParams r = rows_of(p);
  r.rows = workspace + parts.rows;
  const Status status = make_rows(p, r, mean, workspace + parts.prefix, stream);
  if (status != Status::kOk) return status;
  LinearParams l = projection_of(p, 0);
  if (p.prefix_out != nullptr) {
    l.weight = p.prefix_out;
    l.weight_stride = p.prefix_channels;
    l.bias = p.prefix_out_bias;
    l.dim = p.prefix_channels;
  }
  l.y = r.rows;
  l.y_stride_batch = r.rows_stride_batch;
  l.y_stride_token = r.rows_stride_token;
  l.rows = p.num_prefix;
  return linear(l, stream);
}

Status run_narrow(const DwLayerParams& p, const Parts& parts, char* workspace, Stream stream) {
  float* const ctx = has_context(p) ? reinterpret_cast<float*>(workspace + parts.ctx) : nullptr;
  float* const mean = p.mu != nullptr ? reinterpret_cast<float*>(workspace + parts.mean) : nullptr;
  const LowrankDwParams n = narrow_of(p, ctx);
  DeviceLimits limits{};
  LowrankDwPlan plan{};
  Status status = device_limits(&limits);
  if (status == Status::kOk) status = plan_lowrank_dw(n, limits, &plan);
  if (status == Status::kOk && ctx != nullptr) status = dw_context(values_of(p), ctx, mean, stream);
  if (status == Status::kOk) status = lowrank_dw_attention(n, plan, stream);
  if (status != Status::kOk || rows_above(p) == 0) return status;
  return write_rows(p, parts, workspace, mean, stream);
}

Status run_wide(const DwLayerParams& p, const Parts& parts, char* workspace, Stream stream) {
  const bool joined = rows_in_y(p);
  char* const y = workspace + parts.y;
  DwAttentionParams v = values_of(p);
  v.y = advanced(y, p.dtype, joined ? p.num_prefix * p.channels : 0);
  v.y_stride_batch = Parts::y_rows(p) * p.channels;
  v.y_stride_token = p.channels;
  Status status = dw_attention(v, workspace + parts.values, stream);
  if (status != Status::kOk) return status;
  if (joined) {
    PrefixRowsParams r = rows_of(p);
    r.rows = y;
    r.rows_stride_batch = v.y_stride_batch;
    status = make_rows(p, r, nullptr, workspace + parts.prefix, stream);
  } else if (rows_above(p) > 0) {
    status = write_rows(p, parts, workspace, nullptr, stream);
  }
  if (status != Status::kOk) return status;
  LinearParams l = projection_of(p, joined ? 0 : rows_above(p));
  l.y = y;
  l.y_stride_batch = v.y_stride_batch;
  l.y_stride_token = v.y_stride_token;
  l.rows = Parts::y_rows(p);
  return linear(l, stream);
}

bool valid_rows(const DwLayerParams& p) {
  if (rows_above(p) == 0) return true;
  if ((p.prefix_value == nullptr || p.prefix_out == nullptr) && p.prefix_channels != p.channels) {
    return false;
  }
  switch (p.prefix) {
    case PrefixRows::kExact:
      return p.query != nullptr && p.key != nullptr && p.num_heads >= 1 &&
             p.prefix_channels % p.num_heads == 0;
    case PrefixRows::kStatic:
      return p.static_a != nullptr && p.static_b != nullptr;
    case PrefixRows::kNone:
      return true;
  }
  return false;
}

// The sizes that the kernels take; they check what else they need.
bool valid(const DwLayerParams& p) {
  const auto within = [](int64_t size, int64_t end) { return size >= 1 && size < end; };
  constexpr int64_t kFeatures = 1 << 20, kCount = 1 << 30;
  return within(p.batch, kCount) && within(p.height, kCount) && within(p.width, kCount) &&
         p.height < kCount / p.width && p.num_prefix >= 0 && p.num_prefix < kCount &&
         within(p.dim, kFeatures) && within(p.channels, kFeatures) &&
         within(p.dim_out, kFeatures) && p.x != nullptr && p.out != nullptr && p.wv != nullptr &&
         p.kernel != nullptr && p.wo != nullptr && valid_rows(p);
}

}  // namespace

int64_t dw_layer_workspace(const DwLayerParams& p) { return Parts(p).end; }

Status dw_layer(const DwLayerParams& p, void* workspace, Stream stream) {
  if (p.batch == 0) return Status::kOk;
  if (p.dtype == DType::kFloat64) return Status::kUnsupportedDType;
  if (!valid(p)) return Status::kInvalidArgument;
  const Parts parts(p);
  if (parts.end > 0 && workspace == nullptr) return Status::kInvalidArgument;
  char* const bytes = static_cast<char*>(workspace);
  return p.narrow ? run_narrow(p, parts, bytes, stream) : run_wide(p, parts, bytes, stream);
}

}  // namespace dwattn::cuda
