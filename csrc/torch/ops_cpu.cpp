// The operators on CPU tensors.
#include "kernels/cpu/dw_aggregate.h"
#include "kernels/cpu/dw_layer.h"
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/scratch.h"
#include "torch/checks.h"
#include "torch/cpu_parallel.h"
#include "torch/cpu_tensors.h"

namespace dwattn::torch_ops {
namespace {

int64_t workspace_bytes(ScalarType v_type, int64_t batch, int64_t channels) {
  DwAggregateParams p{};
  p.v_dtype = kernel_dtype(v_type);
  p.batch = batch;
  p.channels = channels;
  return cpu::dw_aggregate_workspace(p);
}

// y (B, H*W, C) = aggregation of v (B, N, C); coefficients and v_bias prepared.
void aggregate(const Tensor& v, const OptionalTensor& v_bias, const Coefficients& k,
               const Geometry& g, const Tensor& y, void* workspace) {
  DwAggregateParams p{};
  p.v = v.const_data_ptr();
  p.v_dtype = kernel_dtype(v.scalar_type());
  p.v_stride_batch = v.stride(0);
  p.v_stride_token = v.stride(1);
  p.y = y.mutable_data_ptr();
  p.y_dtype = kernel_dtype(y.scalar_type());
  p.y_stride_batch = y.stride(0);
  p.y_stride_token = y.stride(1);
  p.kernel = k.kernel.const_data_ptr();
  p.kappa = data_or_null(k.kappa);
  p.mu = data_or_null(k.mu);
  p.beta = data_or_null(k.beta);
  p.v_bias = data_or_null(v_bias);
  p.batch = v.size(0);
  p.height = g.height;
  p.width = g.width;
  p.num_prefix = g.num_prefix;
  p.channels = v.size(2);
  check_status(cpu::dw_aggregate(p, workspace, torch_parallel_for()));
}

Tensor dw_aggregate_cpu(const Tensor& v, const Tensor& kernel, const OptionalTensor& kappa,
                        const OptionalTensor& mu, const OptionalTensor& beta, int64_t height,
                        int64_t width, int64_t num_prefix) {
  const Geometry geometry{height, width, num_prefix};
  const Coefficients given{kernel, kappa, mu, beta};
  check_tokens("v", v, geometry);
  check_coefficients(v, v.size(2), geometry, given);
  const ScalarType type = v.scalar_type();
  const Tensor rows = dense_rows(v);
  const Tensor y = empty_cpu({v.size(0), height * width, v.size(2)}, type);
  if (y.numel() == 0) return y;
  const int64_t bytes = workspace_bytes(type, v.size(0), v.size(2));
  cpu::Scratch scratch(cpu::Scratch::padded(bytes));
  aggregate(rows, std::nullopt, given.prepared(accumulation_type(type)), geometry, y,
            scratch.take(bytes));
  return y;
}

// Whether products in this dtype are emulated on this CPU, several times slower than in fp32.
bool emulated(ScalarType type) {
  return (type == ScalarType::BFloat16 && !cpu::native_bf16_gemm()) ||
         (type == ScalarType::Half && !cpu::native_fp16_gemm());
}

// Whether the kernels compute the products of a layer of this inner width too (measured:
// benchmarks/bench_cpu_layer.py). Up to kNarrow they are as fast as the BLAS of PyTorch on x86, and
// need neither a pass for the bias nor calls through the dispatcher; that BLAS is Intel's, and on
// an AMD CPU with AVX-512 they were 3 to 14 % faster at 768 and 1024 (at 1536 not for one image).
// fp16 they convert to fp32 on the way, at which the products of a CPU with instructions for fp16
// are no faster. bf16 by AMX tiles or AVX512_BF16 is faster at every width, and emulated dtypes
// they convert, too.
bool own_products(ScalarType type, int64_t channels) {
  constexpr int64_t kNarrow = 512, kWide = 1024;
  const DType dtype = kernel_dtype(type);
  if (emulated(type) || cpu::by_tiles(dtype, cpu::Isa::kAuto) ||
      cpu::by_pairs(dtype, cpu::Isa::kAuto)) {
    return true;
  }
  const cpu::Features& f = cpu::features();
  const int64_t most = f.amd && f.avx512 ? kWide : kNarrow;
  return type != ScalarType::Double && type != ScalarType::BFloat16 && channels <= most && f.avx2;
}

// `out (B, H*W, D_out)`, or without wo `(B, H*W, C)`, by the kernels alone.
void run_layer(const Tensor& x, const Tensor& wv, const OptionalTensor& bv,
               const Coefficients& given, const Geometry& g, const OptionalTensor& wo,
               const OptionalTensor& bo, const Tensor& out) {
  const ScalarType wide = accumulation_type(x.scalar_type());
  const Tensor tokens = dense_rows(x), value = dense_rows(wv);
  OptionalTensor back;
  if (wo.has_value()) back = dense_rows(*wo);
  const Widened value_bias(bv, wide), back_bias(bo, wide), kernel(given.kernel, wide),
      kappa(given.kappa, wide), mu(given.mu, wide), beta(given.beta, wide);
  cpu::DwLayerParams p{};
  p.dtype = kernel_dtype(x.scalar_type());
  p.x = tokens.const_data_ptr();
  p.x_stride_batch = tokens.stride(0);
  p.x_stride_token = tokens.stride(1);
  p.out = out.mutable_data_ptr();
  p.out_stride_batch = out.stride(0);
  p.out_stride_token = out.stride(1);
  p.wv = value.const_data_ptr();
  p.wv_stride = value.stride(0);
  p.bv = value_bias.data();
  p.kernel = kernel.data();
  p.kappa = kappa.data();
  p.mu = mu.data();
  p.beta = beta.data();
  p.wo = data_or_null(back);
  p.wo_stride = back.has_value() ? back->stride(0) : 0;
  p.bo = back_bias.data();
  p.batch = x.size(0);
  p.height = g.height;
  p.width = g.width;
  p.num_prefix = g.num_prefix;
  p.dim = x.size(2);
  p.channels = wv.size(0);
  p.dim_out = out.size(2);
  const cpu::ParallelFor parallel = torch_parallel_for();
  const int64_t bytes = cpu::dw_layer_workspace(p, parallel.threads);
  cpu::Scratch scratch(cpu::Scratch::padded(bytes));
  check_status(cpu::dw_layer(p, scratch.take(bytes), parallel));
}

// Images per chunk: large enough that the product and its threads are worth starting, small enough
// that the values are still in the cache when they are aggregated (measured:
// benchmarks/bench_cpu_dw.py).
int64_t images_per_chunk(int64_t batch, int64_t image_bytes) {
  constexpr int64_t kBytesPerThread = 4 << 20;
  const int64_t bytes = kBytesPerThread * static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t fitting = image_bytes > 0 ? bytes / image_bytes : batch;
  return fitting < 1 ? 1 : fitting > batch ? batch : fitting;
}

// The values of a batch with PyTorch's products, chunk by chunk of images: sizes, scratch tensors
// and the loop.
//
// V of a chunk is aggregated while it is still in the cache, and V of the whole batch never exists.
// The bias of the projection is added by the aggregation, where it costs nothing.
class ValueChunks {
 public:
  ValueChunks(const Tensor& x, const Tensor& wv, const OptionalTensor& bv,
              const Coefficients& given, const Geometry& geometry)
      : x_(x),
        wv_(wv),
        geometry_(geometry),
        type_(x.scalar_type()),
        element_(dtype_size(kernel_dtype(type_))),
        batch_(x.size(0)),
        tokens_(x.size(1)),
        dim_(x.size(2)),
        channels_(wv.size(0)),
        row_(type_ == accumulation_type(type_) ? cpu::spaced_row(channels_, element_) : channels_),
        chunk_(images_per_chunk(batch_, tokens_ * row_ * element_)),
        coefficients_(given.prepared(accumulation_type(type_))),
        bias_(dense(bv, accumulation_type(type_))) {}

  // The aggregated values, straight into y (B, H*W, C).
  void run(const Tensor& y) const {
    each_chunk(0, [&](int64_t first, int64_t images, const Tensor& v, void* workspace) {
      aggregate(v, bias_, coefficients_, geometry_, slice(y, first, images), workspace);
    });
  }

  // The whole layer: aggregated values, then `out (B, H*W, D_out) = Y wo^T + bo`; images of `out`
  // may lie apart.
  void run(const Tensor& wo, const OptionalTensor& bo, const Tensor& out) const {
    const int64_t rows = geometry_.height * geometry_.width;
    // One thread writes Y over V, which leaves half as much to keep in the cache.
    const bool in_place = torch::stable::get_num_threads() == 1;
    const int64_t y_rows = in_place ? cpu::kRowsInFront * geometry_.width : chunk_ * rows;
    const int64_t y_bytes = y_rows * row_ * element_;
    each_chunk(y_bytes, [&](int64_t first, int64_t images, const Tensor& v, void* workspace) {
      void* const in_front = static_cast<char*>(v.mutable_data_ptr()) - y_bytes;
      const Tensor y = blob(in_front, {images, rows, channels_}, {rows * row_, row_, 1});
      aggregate(v, bias_, coefficients_, geometry_, y, workspace);
      project(y, wo, bo, slice(out, first, images));
    });
  }

 private:
  using Sizes = std::initializer_list<int64_t>;

  // body(first image, images, V (images, N, C), workspace of the aggregation). The bytes `in_front`
  // of V are free, without padding between them and V: Y in them is whole rows away from V.
  template <class Body>
  void each_chunk(int64_t in_front, const Body& body) const {
    const int64_t bytes = in_front + chunk_ * tokens_ * row_ * element_;
    const int64_t work_bytes = workspace_bytes(type_, chunk_, channels_);
    cpu::Scratch scratch(cpu::Scratch::padded(bytes) + cpu::Scratch::padded(work_bytes));
    void* const v_memory = static_cast<char*>(scratch.take(bytes)) + in_front;
    void* const workspace = scratch.take(work_bytes);
    for (int64_t first = 0; first < batch_; first += chunk_) {
      const int64_t images = batch_ - first < chunk_ ? batch_ - first : chunk_;
      const int64_t rows = images * tokens_;
      const Tensor inputs = as_rows(slice(x_, first, images));
      const Tensor v = blob(v_memory, {images, tokens_, channels_}, {tokens_ * row_, row_, 1});
      linear_out(blob(v_memory, {rows, channels_}, {row_, 1}), inputs, wv_, std::nullopt);
      body(first, images, v, workspace);
    }
  }

  // (images, N, D) -> (images * N, D): a view where the strides allow it.
  Tensor as_rows(const Tensor& t) const {
    const int64_t images = t.size(0), step = t.stride(1);
    if (t.stride(2) == 1 && (images == 1 || t.stride(0) == tokens_ * step)) {
      return blob(const_cast<void*>(t.const_data_ptr()), {images * tokens_, dim_}, {step, 1});
    }
    return torch::stable::reshape(t, {images * tokens_, dim_});
  }

  // out = y weight^T + bias, all images in one product where their rows follow each other.
  void project(const Tensor& y, const Tensor& weight, const OptionalTensor& bias,
               const Tensor& out) const {
    const int64_t images = y.size(0), rows = y.size(1), dim_out = weight.size(0);
    const bool together = images == 1 || out.stride(0) == rows * dim_out;
    const int64_t step = together ? images : 1;
    for (int64_t image = 0; image < images; image += step) {
      const char* from =
          static_cast<const char*>(y.const_data_ptr()) + image * rows * row_ * element_;
      char* to = static_cast<char*>(out.mutable_data_ptr()) + image * out.stride(0) * element_;
      linear_out(blob(to, {step * rows, dim_out}, {dim_out, 1}),
                 blob(const_cast<char*>(from), {step * rows, channels_}, {row_, 1}), weight, bias);
    }
  }

  Tensor blob(void* memory, Sizes sizes, Sizes strides) const {
    return torch::stable::from_blob(memory, sizes, strides, x_.device(), type_);
  }

  Tensor slice(const Tensor& t, int64_t first, int64_t images) const {
    if (images == batch_) return t;
    Tensor whole = t;
    return torch::stable::narrow(whole, 0, first, images);
  }

  const Tensor& x_;
  const Tensor& wv_;
  const Geometry geometry_;
  const ScalarType type_;  // of the products, of V and of Y
  const int64_t element_, batch_, tokens_, dim_, channels_;
  const int64_t row_;    // stride between tokens of V and of Y
  const int64_t chunk_;  // images
  const Coefficients coefficients_;
  const OptionalTensor bias_;
};

Tensor dw_attention_cpu(const Tensor& x, const Tensor& wv, const OptionalTensor& bv,
                        const Tensor& kernel, const OptionalTensor& kappa, const OptionalTensor& mu,
                        const OptionalTensor& beta, int64_t height, int64_t width,
                        int64_t num_prefix) {
  const Geometry geometry{height, width, num_prefix};
  const Coefficients given{kernel, kappa, mu, beta};
  check_tokens("x", x, geometry);
  check_projection(x, wv, bv);
  check_coefficients(x, wv.size(0), geometry, given);
  const Tensor y = empty_cpu({x.size(0), height * width, wv.size(0)}, x.scalar_type());
  if (y.numel() == 0) return y;
  if (own_products(x.scalar_type(), wv.size(0))) {
    run_layer(x, wv, bv, given, geometry, std::nullopt, std::nullopt, y);
  } else {
    ValueChunks(x, wv, bv, given, geometry).run(y);
  }
  return y;
}

Tensor dw_layer_cpu(const Tensor& x, const Tensor& wv, const OptionalTensor& bv,
                    const Tensor& kernel, const OptionalTensor& kappa, const OptionalTensor& mu,
                    const OptionalTensor& beta, const Tensor& wo, const OptionalTensor& bo,
                    const OptionalTensor& prefix_out, int64_t height, int64_t width,
                    int64_t num_prefix) {
  const Geometry geometry{height, width, num_prefix};
  const Coefficients given{kernel, kappa, mu, beta};
  check_tokens("x", x, geometry);
  check_projection(x, wv, bv);
  check_coefficients(x, wv.size(0), geometry, given);
  check_output(x, wv, wo, bo, prefix_out, geometry);
  const int64_t batch = x.size(0), prefix = prefix_out.has_value() ? num_prefix : 0;
  const int64_t rows = height * width, dim = wo.size(0);
  Tensor out = empty_cpu({batch, prefix + rows, dim}, x.scalar_type());
  if (out.numel() == 0) return out;
  if (prefix > 0) {
    Tensor head = torch::stable::narrow(out, 1, 0, prefix);
    torch::stable::copy_(head, *prefix_out);
  }
  const Tensor patches = prefix > 0 ? torch::stable::narrow(out, 1, prefix, rows) : out;
  if (own_products(x.scalar_type(), wv.size(0))) {
    run_layer(x, wv, bv, given, geometry, wo, bo, patches);
  } else {
    ValueChunks(x, wv, bv, given, geometry).run(wo, bo, patches);
  }
  return out;
}

}  // namespace
}  // namespace dwattn::torch_ops

STABLE_TORCH_LIBRARY_IMPL(dwattn, CPU, m) {
  m.impl("dw_aggregate", TORCH_BOX(&dwattn::torch_ops::dw_aggregate_cpu));
  m.impl("dw_attention", TORCH_BOX(&dwattn::torch_ops::dw_attention_cpu));
  m.impl("dw_layer", TORCH_BOX(&dwattn::torch_ops::dw_layer_cpu));
}
