// The attention statistics, compiled once per instruction set (DWATTN_ISA names the namespace).
#pragma once

#include <atomic>
#include <cfloat>

#include "kernels/cpu/attention_moments_impl.h"
#include "kernels/cpu/exp2_impl.h"
#include "kernels/cpu/few_rows_impl.h"
#include "kernels/cpu/unroll.h"

namespace dwattn::cpu::DWATTN_ISA {
namespace {

// The memory of one worker and the steps of its tiles, one after the other: queries first_ ...
// first_ + rows_ of a head, along `lanes_` lanes. In is the type of q, k, v and out.
template <class In>
class VarianceTile {
  using V = Vec<float>;
  // A register tile of accumulators, and what one step loads beside it.
#if defined(__AVX512F__) || defined(__aarch64__)  // 32 registers
  static constexpr int kRows = 6, kVectors = 4;
#elif defined(__AVX2__)
  static constexpr int kRows = 6, kVectors = 2;
#else
  static constexpr int kRows = 4, kVectors = 2;
#endif

 public:
  VarianceTile(const AttentionVarianceParams& params, const AttentionTiles& tiles, char* memory)
      : p_(params), tiles_(tiles), moments_(params, tiles, memory), streamed_(streams()) {
    packed_ = take<float>(memory, tiles.packed_bytes);
    weights_ = take<float>(memory, tiles.weights_bytes);
    queries_ = take<float>(memory, tiles.queries_bytes);
    staged_ = take<float>(memory, tiles.queries_bytes);
    output_ = take<float>(memory, tiles.output_bytes);
    max_ = output_ + tiles.lanes * tiles.channels;
    sum_ = max_ + tiles.lanes;
  }

  // Tiles first ... last - 1 of a head for some images, whose keys and values are packed once.
  void run(int64_t head, int64_t first, int64_t last, int64_t image, int64_t images) {
    head_ = head;
    image_ = image;
    images_ = images;
    for (int64_t tile = first; tile < last; ++tile) run(tile, tile == first);
  }

 private:
  void run(int64_t tile, bool pack) {
    first_ = tiles_.first_row(tile);
    lanes_ = tiles_.first_row(tile + 1) - first_;
    rows_ = lanes_ < p_.tokens - first_ ? lanes_ : p_.tokens - first_;
    for (int64_t image = 0; image < images_; image += kImagesPerFold) {
      const int64_t rest = images_ - image;
      const int64_t count = rest < kImagesPerFold ? rest : kImagesPerFold;
      for (int64_t i = 0; i < count; ++i) attend(image + i, weights(i), inverse(i), pack);
      moments_.fold(weights_, count, lanes_, image == 0);
    }
    moments_.merge(head_, first_, rows_, lanes_, images_, p_.count + image_);
  }

  // Softmax weights of an image of the current fold, (N, lanes), not yet divided by their sums.
  float* weights(int64_t i) const { return weights_ + i * (p_.tokens + 1) * lanes_; }
  float* inverse(int64_t i) const { return weights(i) + p_.tokens * lanes_; }

  // f(Size<n>, first) over groups, as equal as possible, of at most kMost of 0 ... count - 1.
  template <int kCount>
  struct Size {
    static constexpr int value = kCount;
  };
  template <int kMost, class F>
  static void each_group(int64_t count, const F& f) {
    static_assert(kMost <= 6);
    const int64_t groups = (count + kMost - 1) / kMost;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t first = g * count / groups, size = (g + 1) * count / groups - first;
      if (kMost >= 6 && size == 6) f(Size<kMost >= 6 ? 6 : 1>{}, first);
      if (kMost >= 5 && size == 5) f(Size<kMost >= 5 ? 5 : 1>{}, first);
      if (kMost >= 4 && size == 4) f(Size<kMost >= 4 ? 4 : 1>{}, first);
      if (kMost >= 3 && size == 3) f(Size<kMost >= 3 ? 3 : 1>{}, first);
      if (kMost >= 2 && size == 2) f(Size<kMost >= 2 ? 2 : 1>{}, first);
      if (size == 1) f(Size<1>{}, first);
    }
  }

  // ---- attention of one image

  // `image` counts from the first packed one; `pack` if this one is not yet.
  void attend(int64_t image, float* e, float* inverse, bool pack) {
    const float* const keys = packed(image);
    const float* const values = p_.v == nullptr ? nullptr : keys + p_.tokens * tiles_.channels;
    if (pack) pack_image(image);
    if (first_ == p_.skip && values != nullptr) {
      for (int64_t i = 0; i < p_.skip; ++i) attend_row(image_ + image, i, keys, values, e);
    }
    load_queries(image_ + image);
    for (int64_t l = 0; l < lanes_; l += V::width) V::all(-FLT_MAX).store(max_ + l);
    const bool more = image + 1 < images_;
    scores(keys, e, [&](int64_t row, int64_t count) {
      if (more) fetch(image_ + image + 1, row, count, pack);
    });
    for (int64_t l = 0; l < lanes_; l += V::width) V::zero().store(sum_ + l);
    for (int64_t j = 0; j < p_.tokens; j += kKeyBlock) {
      const int64_t count = p_.tokens - j < kKeyBlock ? p_.tokens - j : kKeyBlock;
      exponentials(count, e + j * lanes_);
      if (values != nullptr) multiply(values + j * tiles_.channels, count, e + j * lanes_, j > 0);
    }
    for (int64_t l = 0; l < lanes_; ++l) inverse[l] = 1.0f / sum_[l];
    if (values == nullptr) return;
    for (int64_t i = 0; i < rows_; ++i) {
      write(image_ + image, first_ + i, output_ + i * tiles_.channels, inverse[i]);
    }
  }

  // The output of one query, with its keys along the lanes; e has room for all of them.
  void attend_row(int64_t image, int64_t query, const float* keys, const float* values, float* e) {
    copy(at<In>(p_.q, image, p_.q_stride_batch, p_.q_stride_head) + query * p_.q_stride_token,
         staged_, query_factor());
    const auto query_row = [&](int64_t) { return staged_; };
    dots<float>(Matrix<float>{keys, tiles_.channels}, 0, p_.tokens, 1, tiles_.channels, query_row,
                [&](int64_t j, int64_t, float s) { e[j] = s; });
    float top = e[0];
    for (int64_t j = 1; j < p_.tokens; ++j) top = e[j] > top ? e[j] : top;
    float sum = 0.0f;
    for (int64_t j = 0; j < p_.tokens; j += kKeyBlock) {
      const int64_t end = p_.tokens - j < kKeyBlock ? p_.tokens : j + kKeyBlock;
      V part = V::zero();
      for (int64_t i = j; i < end; i += V::width) {
        const int count = end - i < V::width ? static_cast<int>(end - i) : V::width;
        exp2_of(V::load_n(e + i, count) - V::all(top)).store_n(e + i, count);
        part = part + V::load_n(e + i, count);
      }
      sum += total(part);
    }
    const auto output_row = [&](int64_t) { return output_; };
    mix<float>(Matrix<float>{values, tiles_.channels}, p_.tokens, 0, tiles_.channels, e, 1, 1,
               output_row);
    write(image, query, output_, 1.0f / sum);
  }

  // Brings rows of an image that are needed soon into the cache: queries of the tile, and keys and
  // values that are packed next.
  void fetch(int64_t image, int64_t row, int64_t count, bool pack) const {
    const In* const q = queries(image);
    for (int64_t i = row; i < row + count && i < rows_; ++i) fetch(q + i * p_.q_stride_token);
    if (!pack) return;
    const In* const k = keys(image);
    for (int64_t i = row; i < row + count; ++i) fetch(k + i * p_.k_stride_token);
    if (p_.v == nullptr) return;
    const In* const v = values(image);
    for (int64_t i = row; i < row + count; ++i) fetch(v + i * p_.v_stride_token);
  }
  // The first line is read instead of prefetched: measured, 5 % of the whole on an AMD CPU, where
  // prefetching all lines gained nothing.
  void fetch(const In* row) const {
    const char* const first = reinterpret_cast<const char*>(row);
    static_cast<void>(*static_cast<const volatile char*>(first));
    const int64_t bytes = p_.head_dim * static_cast<int64_t>(sizeof(In));
    for (int64_t b = 64; b < bytes; b += 64) __builtin_prefetch(first + b, 0, 2);
  }

  const In* queries(int64_t image) const {
    return at<In>(p_.q, image, p_.q_stride_batch, p_.q_stride_head) + first_ * p_.q_stride_token;
  }
  const In* keys(int64_t image) const {
    return at<In>(p_.k, image, p_.k_stride_batch, p_.k_stride_head);
  }
  const In* values(int64_t image) const {
    return at<In>(p_.v, image, p_.v_stride_batch, p_.v_stride_head);
  }
  template <class T>
  T* at(T* base, int64_t image, int64_t stride_batch, int64_t stride_head) const {
    return base + image * stride_batch + head_ * stride_head;
  }
  template <class T>
  const T* at(const void* base, int64_t image, int64_t stride_batch, int64_t stride_head) const {
    return at(static_cast<const T*>(base), image, stride_batch, stride_head);
  }

  float* packed(int64_t image) const { return packed_ + image * 2 * p_.tokens * tiles_.channels; }
  void pack_image(int64_t image) const {
    float* const to = packed(image);
    pack(keys(image_ + image), p_.k_stride_token, to);
    if (p_.v == nullptr) return;
    pack(values(image_ + image), p_.v_stride_token, to + p_.tokens * tiles_.channels);
  }
  void pack(const In* rows, int64_t stride, float* to) const {
    for (int64_t i = 0; i < p_.tokens; ++i) copy(rows + i * stride, to + i * tiles_.channels);
  }

  // In these units the softmax is one of powers of two.
  float query_factor() const { return p_.scale * 1.44269504088896341f; }

  // (lanes, d_h) -> (d_h, lanes), times query_factor().
  void load_queries(int64_t image) {
    const In* const q = queries(image);
    for (int64_t i = 0; i < rows_; ++i) {
      copy(q + i * p_.q_stride_token, staged_ + i * tiles_.channels, query_factor());
    }
    for (int64_t i = rows_ * tiles_.channels; i < lanes_ * tiles_.channels; ++i) staged_[i] = 0.0f;
    constexpr int kSide = kTransposed<float>;
    for (int64_t l = 0; l < lanes_; l += kSide) {
      const float* rows[kSide];
      for (int64_t d = 0; d < tiles_.channels; d += kSide) {
        for (int i = 0; i < kSide; ++i) rows[i] = staged_ + (l + i) * tiles_.channels + d;
        transpose(rows, queries_ + d * lanes_ + l, lanes_);
      }
    }
  }

  // A row in fp32, times a factor, and with zeros up to the padded width. Four vectors at a time:
  // packing takes half as long as with one.
  void copy(const In* from, float* to, float factor = 1.0f) const {
    const V times = V::all(factor);
    int64_t d = 0;
    for (; d + 4 * V::width <= p_.head_dim; d += 4 * V::width) {
      V part[4];
      for (int v = 0; v < 4; ++v) part[v] = V::load(from + d + v * V::width) * times;
      for (int v = 0; v < 4; ++v) part[v].store(to + d + v * V::width);
    }
    for (; d + V::width <= p_.head_dim; d += V::width) (V::load(from + d) * times).store(to + d);
    if (d < p_.head_dim) {
      (V::load_n(from + d, static_cast<int>(p_.head_dim - d)) * times).store(to + d);
      d += V::width;
    }
    for (; d < tiles_.channels; d += V::width) V::zero().store(to + d);
  }

  // e (N, lanes) = keys (N, d_h) * queries, and the maxima down the lanes; prepare(key, count) is
  // called before each group of keys.
  template <class F>
  void scores(const float* k, float* e, const F& prepare) const {
    each_group<kRows>(p_.tokens, [&](auto rows, int64_t j) {
      prepare(j, rows.value);
      each_group<kVectors>(lanes_ / V::width, [&](auto vectors, int64_t first) {
        const int64_t l = first * V::width;
        score<rows.value, vectors.value>(k + j * tiles_.channels, queries_ + l, e + j * lanes_ + l,
                                         max_ + l);
      });
    });
  }

  template <int R, int N>
  void score(const float* k, const float* q, float* e, float* top) const {
    V sum[R][N];
    DWATTN_UNROLL
    for (int r = 0; r < R; ++r) {
      DWATTN_UNROLL
      for (int v = 0; v < N; ++v) sum[r][v] = V::zero();
    }
    const int64_t lanes = lanes_, depth = p_.head_dim, stride = tiles_.channels;
    for (int64_t d = 0; d < depth; ++d, q += lanes) {
      V right[N];
      DWATTN_UNROLL
      for (int v = 0; v < N; ++v) right[v] = V::load(q + v * V::width);
      DWATTN_UNROLL
      for (int r = 0; r < R; ++r) {
        const V left = V::all(k[r * stride + d]);
        DWATTN_UNROLL
        for (int v = 0; v < N; ++v) sum[r][v] = fma(left, right[v], sum[r][v]);
      }
    }
    DWATTN_UNROLL
    for (int v = 0; v < N; ++v) {
      V most = V::load(top + v * V::width);
      DWATTN_UNROLL
      for (int r = 0; r < R; ++r) {
        sum[r][v].store(e + r * lanes + v * V::width);
        most = max(most, sum[r][v]);
      }
      most.store(top + v * V::width);
    }
  }

  // Scores to weights relative to the maxima; adds to the sums. Sums of blocks are added to sums of
  // blocks: the error does not grow with N.
  void exponentials(int64_t count, float* e) const {
    for (int64_t l = 0; l < lanes_; l += V::width) {
      const V top = V::load(max_ + l);
      V sum = V::zero();
      for (int64_t j = 0; j < count; ++j) {
        float* const s = e + j * lanes_ + l;
        const V weight = exp2_of(V::load(s) - top);
        weight.store(s);
        sum = sum + weight;
      }
      (V::load(sum_ + l) + sum).store(sum_ + l);
    }
  }

  // output (rows, channels) = e^T * values (count, channels), or added to it.
  void multiply(const float* values, int64_t count, const float* e, bool add) const {
    each_group<kVectors>(tiles_.channels / V::width, [&](auto vectors, int64_t first) {
      const int64_t c = first * V::width;
      each_group<kRows>(rows_, [&](auto rows, int64_t i) {
        product<rows.value, vectors.value>(e + i, values + c, count,
                                           output_ + i * tiles_.channels + c, add);
      });
    });
  }

  template <int R, int N>
  void product(const float* e, const float* values, int64_t count, float* out, bool add) const {
    V sum[R][N];
    DWATTN_UNROLL
    for (int r = 0; r < R; ++r) {
      DWATTN_UNROLL
      for (int v = 0; v < N; ++v) sum[r][v] = V::zero();
    }
    const int64_t lanes = lanes_, stride = tiles_.channels;
    for (int64_t j = 0; j < count; ++j, e += lanes, values += stride) {
      V right[N];
      DWATTN_UNROLL
      for (int v = 0; v < N; ++v) right[v] = V::load(values + v * V::width);
      DWATTN_UNROLL
      for (int r = 0; r < R; ++r) {
        const V left = V::all(e[r]);
        DWATTN_UNROLL
        for (int v = 0; v < N; ++v) sum[r][v] = fma(left, right[v], sum[r][v]);
      }
    }
    DWATTN_UNROLL
    for (int r = 0; r < R; ++r) {
      DWATTN_UNROLL
      for (int v = 0; v < N; ++v) {
        float* const at = out + r * stride + v * V::width;
        (add ? V::load(at) + sum[r][v] : sum[r][v]).store(at);
      }
    }
  }

  void write(int64_t image, int64_t query, const float* from, float inverse) const {
    In* const row = at(static_cast<In*>(p_.out), image, p_.out_stride_batch, p_.out_stride_head) +
                    query * p_.out_stride_token;
    const V factor = V::all(inverse);
    int64_t d = 0;
    if (streamed_) {
      for (; d < p_.head_dim; d += V::width) stream(V::load(from + d) * factor, row + d);
      return;
    }
    for (; d + V::width <= p_.head_dim; d += V::width) {
      (V::load(from + d) * factor).store(row + d);
    }
    const int rest = static_cast<int>(p_.head_dim - d);
    if (rest > 0) (V::load(from + d) * factor).store_n(row + d, rest);
  }

  // Outputs that do not stay in the cache until they are used are written past it: no line is read
  // to be overwritten. Measured, 6 % of the whole. Rows must be made of whole cache lines.
  bool streams() const {
    constexpr int64_t kCached = 4 << 20, kLine = 64 / sizeof(In);
    const int64_t size = p_.batch * p_.heads * p_.tokens * p_.head_dim * sizeof(In);
    const int64_t strides[] = {p_.out_stride_batch, p_.out_stride_head, p_.out_stride_token,
                               p_.head_dim};
    bool whole = reinterpret_cast<uintptr_t>(p_.out) % 64 == 0;
    for (const int64_t stride : strides) whole = whole && stride % kLine == 0;
    return p_.out != nullptr && size > kCached && whole;
  }

  const AttentionVarianceParams& p_;
  const AttentionTiles& tiles_;
  float* packed_;   // (images, 2, N, channels): keys, values
  float* weights_;  // (images of a fold, N + 1, lanes): weights, and 1 / their sums
  float* queries_;  // (d_h, lanes)
  float* staged_;   // (lanes, channels)
  float* output_;   // (lanes, channels)
  float* max_;      // (lanes)
  float* sum_;      // (lanes)
  TileMoments moments_;
  const bool streamed_;
  int64_t image_ = 0, images_ = 0;  // packed ones
  int64_t head_ = 0, first_ = 0, lanes_ = 0, rows_ = 0;
};

// Where there are tiles enough, each worker gets so many tasks or more.
constexpr int64_t kTasksPerWorker = 3;

template <class In>
Status run(const AttentionVarianceParams& p, const AttentionTiles& tiles, void* workspace,
           int64_t workers, const ParallelFor& parallel) {
  // A task is some tiles of a head, which share what is packed.
  int64_t size = p.heads * tiles.per_head / (kTasksPerWorker * workers);
  size = size < 1 ? 1 : size > tiles.per_head ? tiles.per_head : size;
  const int64_t parts = (tiles.per_head + size - 1) / size, tasks = p.heads * parts;
  // They are dealt out as workers become free: which of them computes a tile changes no bit of it.
  std::atomic<int64_t> next{0};
  auto work = [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      VarianceTile<In> tile(p, tiles, static_cast<char*>(workspace) + worker * tiles.bytes());
      for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
        const int64_t head = task / parts, part = task % parts;
        for (int64_t image = 0; image < p.batch; image += tiles.images) {
          const int64_t rest = p.batch - image;
          tile.run(head, part * tiles.per_head / parts, (part + 1) * tiles.per_head / parts, image,
                   rest < tiles.images ? rest : tiles.images);
        }
      }
      finish_streams();
    }
  };
  const int64_t entries = p.batch * p.heads * p.tokens * p.tokens;
  parallel(workers < tasks ? workers : tasks, entries / workers, work);
  return Status::kOk;
}

}  // namespace

Status attention_variance(const AttentionVarianceParams& p, const AttentionTiles& tiles,
                          void* workspace, int64_t workers, const ParallelFor& parallel) {
  switch (p.dtype) {
    case DType::kFloat32:
      return run<float>(p, tiles, workspace, workers, parallel);
    case DType::kFloat16:
      return run<Float16>(p, tiles, workspace, workers, parallel);
    case DType::kBFloat16:
      return run<BFloat16>(p, tiles, workspace, workers, parallel);
    default:
      return Status::kUnsupportedDType;
  }
}

}  // namespace dwattn::cpu::DWATTN_ISA
