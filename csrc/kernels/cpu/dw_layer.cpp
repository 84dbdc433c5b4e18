#include "kernels/cpu/dw_layer.h"

#include "kernels/cpu/dw_aggregate.h"
#include "kernels/cpu/gemm.h"
#include "kernels/cpu/scratch.h"

namespace dwattn::cpu {
namespace {

// Hands out parts of the workspace, or counts what they need where there is none.
class Workspace {
 public:
  explicit Workspace(void* memory) : memory_(static_cast<char*>(memory)) {}

  void* take(int64_t bytes) {
    char* at = memory_ == nullptr ? nullptr : memory_ + used_;
    used_ += Scratch::padded(bytes);
    return at;
  }
  int64_t used() const { return used_; }

 private:
  char* memory_;
  int64_t used_ = 0;
};

// One call: the packed weights, and a region of values for each group of threads that walks through
// the images on its own.
class Layer {
 public:
  Layer(const DwLayerParams& p, int64_t threads, void* memory, Isa isa)
      : p_(p), isa_(isa), threads_(threads) {
    // With an even share of images for everybody, threads need not meet within an image, and what
    // one step leaves in a core's cache the next step finds there.
    const bool apart = threads > 1 && (p.batch % threads == 0 || p.batch >= 4 * threads);
    groups_ = apart ? threads : 1;
    const int64_t value = dtype_size(value_dtype()), together = apart ? 1 : threads;
    row_ = spaced_row(p.channels, value);
    const int64_t image = tokens() * row_ * value, fitting = together * kCachedBytes / (image + 1);
    const int64_t share = (p.batch + groups_ - 1) / groups_;
    chunk_ = fitting < 1 ? 1 : fitting < share ? fitting : share;
    in_place_ = together == 1;

    Workspace workspace(memory);
    wv_ = {p.wv, p.dtype, p.wv_stride, p.channels, p.dim, nullptr};
    wo_ = {p.wo, p.dtype, p.wo_stride, p.dim_out, p.channels, nullptr};
    const int64_t first = packed_weight_bytes(wv_, isa);
    const int64_t second = p.wo == nullptr ? 0 : packed_weight_bytes(wo_, isa);
    once_ = groups_ == 1 && chunk_ == p.batch;
    wv_.in_passing = wo_.in_passing = once_ && pack_in_passing(p.batch * tokens(), isa);
    wv_.packed = workspace.take(once_ && second > first ? second : first);
    wo_.packed = once_ ? wv_.packed : workspace.take(second);
    Workspace region(nullptr);
    Region().take(region, *this, value);
    region_bytes_ = region.used();
    regions_ = static_cast<char*>(workspace.take(groups_ * region_bytes_));
    bytes_ = workspace.used();
  }

  int64_t bytes() const { return bytes_; }

  Status run(const ParallelFor& parallel) const {
    Status status = pack_weight(wv_, parallel, isa_);
    if (status == Status::kOk && !once_) status = pack_output_weight(parallel);
    if (status != Status::kOk) return status;
    if (groups_ == 1) return images(0, 0, p_.batch, parallel);
    auto body = [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g) {
        const int64_t first = g * p_.batch / groups_, last = (g + 1) * p_.batch / groups_;
        images(g, first, last, serial_for());  // its arguments were good in pack_weight
      }
    };
    parallel(groups_, p_.batch * tokens() * p_.dim, body);
    return Status::kOk;
  }

 private:
  // The values of a chunk of images are to stay in a core's cache until they are aggregated.
  static constexpr int64_t kCachedBytes = 1 << 20;

  // Memory of one group of threads.
  struct Region {
    void *v, *y, *aggregation, *rows;

    void take(Workspace& from, const Layer& layer, int64_t value) {
      const int64_t row = layer.row_ * value;
      const int64_t rows_of_y = layer.p_.wo == nullptr ? 0
                                : layer.in_place_      ? kRowsInFront * layer.p_.width
                                                       : layer.chunk_ * layer.patches();
      y = from.take(rows_of_y * row);  // V follows at once: spaced rows are whole cache lines
      v = from.take(layer.chunk_ * layer.tokens() * row);
      aggregation = from.take(dw_aggregate_workspace(layer.aggregation(*this, 0, layer.chunk_)));
      // One product at a time.
      const int64_t threads = layer.groups_ > 1 ? 1 : layer.threads_;
      const int64_t first =
          gemm_workspace(layer.projection(*this, 0, layer.chunk_), threads, layer.isa_);
      const int64_t second =
          layer.p_.wo == nullptr
              ? 0
              : gemm_workspace(layer.output(*this, 0, layer.chunk_), threads, layer.isa_);
      rows = from.take(first < second ? second : first);
    }
  };

  int64_t patches() const { return p_.height * p_.width; }
  int64_t tokens() const { return p_.num_prefix + patches(); }
  // Products of bf16 as it is read and write the dtype of the layer.
  DType value_dtype() const {
    const bool as_it_is = by_tiles(p_.dtype, isa_) || by_pairs(p_.dtype, isa_);
    if (p_.dtype == DType::kFloat64 || as_it_is) return p_.dtype;
    return DType::kFloat32;
  }

  Status images(int64_t group, int64_t first, int64_t last, const ParallelFor& parallel) const {
    Workspace memory(regions_ + group * region_bytes_);
    Region region;
    region.take(memory, *this, dtype_size(value_dtype()));
    for (; first < last; first += chunk_) {
      const int64_t count = last - first < chunk_ ? last - first : chunk_;
      Status status = gemm(projection(region, first, count), region.rows, parallel, isa_);
      if (status == Status::kOk) {
        status =
            dw_aggregate(aggregation(region, first, count), region.aggregation, parallel, isa_);
      }
      if (status == Status::kOk && once_) status = pack_output_weight(parallel);
      if (status == Status::kOk && p_.wo != nullptr) {
        status = gemm(output(region, first, count), region.rows, parallel, isa_);
      }
      if (status != Status::kOk) return status;
    }
    return Status::kOk;
  }

  Status pack_output_weight(const ParallelFor& parallel) const {
    return p_.wo == nullptr ? Status::kOk : pack_weight(wo_, parallel, isa_);
  }

  const void* images_of_x(int64_t first) const {
    return static_cast<const char*>(p_.x) + first * p_.x_stride_batch * dtype_size(p_.dtype);
  }
  void* images_of_out(int64_t first) const {
    return static_cast<char*>(p_.out) + first * p_.out_stride_batch * dtype_size(p_.dtype);
  }

  // V (count, N, C) = x wv^T + bv
  GemmParams projection(const Region& region, int64_t first, int64_t count) const {
    return {images_of_x(first),
            p_.dtype,
            p_.x_stride_batch,
            p_.x_stride_token,
            &wv_,
            p_.bv,
            region.v,
            value_dtype(),
            tokens() * row_,
            row_,
            count,
            tokens(),
            p_.channels,
            p_.dim};
  }

  // Y (count, H*W, C): the output itself where there is no wo.
  DwAggregateParams aggregation(const Region& region, int64_t first, int64_t count) const {
    DwAggregateParams p{};
    p.v = region.v;
    p.v_dtype = value_dtype();
    p.v_stride_batch = tokens() * row_;
    p.v_stride_token = row_;
    const bool last = p_.wo == nullptr;
    p.y = last ? images_of_out(first) : region.y;
    p.y_dtype = last ? p_.dtype : value_dtype();
    p.y_stride_batch = last ? p_.out_stride_batch : patches() * row_;
    p.y_stride_token = last ? p_.out_stride_token : row_;
    p.kernel = p_.kernel;
    p.kappa = p_.kappa;
    p.mu = p_.mu;
    p.beta = p_.beta;
    p.batch = count;
    p.height = p_.height;
    p.width = p_.width;
    p.num_prefix = p_.num_prefix;
    p.channels = p_.channels;
    return p;
  }

  // out (count, H*W, D_out) = Y wo^T + bo
  GemmParams output(const Region& region, int64_t first, int64_t count) const {
    return {region.y,
            value_dtype(),
            patches() * row_,
            row_,
            &wo_,
            p_.bo,
            images_of_out(first),
            p_.dtype,
            p_.out_stride_batch,
            p_.out_stride_token,
            count,
            patches(),
            p_.dim_out,
            p_.channels};
  }

  const DwLayerParams& p_;
  const Isa isa_;
  const int64_t threads_;
  int64_t groups_;  // of threads; one group shares its images, several have their own
  int64_t row_;     // stride between tokens of V and of Y
  int64_t chunk_;   // images
  bool in_place_;   // Y is written over V, which leaves half as much to keep in the cache
  bool once_;       // all images are one chunk: its second weight is packed where the first one was
  WeightParams wv_, wo_;
  int64_t region_bytes_, bytes_;
  char* regions_;
};

}  // namespace

int64_t dw_layer_workspace(const DwLayerParams& p, int64_t threads, Isa isa) {
  return Layer(p, threads, nullptr, isa).bytes();
}

Status dw_layer(const DwLayerParams& p, void* workspace, const ParallelFor& parallel, Isa isa) {
  if (p.batch == 0) return Status::kOk;
  if (p.batch < 0 || p.channels < 0 || p.height < 1 || p.width < 1 || p.num_prefix < 0 ||
      p.dim < 0 || p.dim_out < 0 || workspace == nullptr) {
    return Status::kInvalidArgument;
  }
  if (isa != Isa::kAuto && !isa_usable(isa)) return Status::kUnsupportedIsa;
  return Layer(p, parallel.threads, workspace, isa).run(parallel);
}

}  // namespace dwattn::cpu
