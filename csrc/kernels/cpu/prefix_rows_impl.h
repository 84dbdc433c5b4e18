// The rows of the prefix tokens, compiled once per instruction set (DWATTN_ISA names the
// namespace). See prefix_rows.h for the definition.
#pragma once

#include <cmath>

#include "kernels/cpu/exp2_impl.h"
#include "kernels/cpu/few_rows_impl.h"
#include "kernels/cpu/prefix_rows.h"

namespace dwattn::cpu::DWATTN_ISA {
namespace {

// One call, step by step. T is the accumulation type, In the stored one. A row is a prefix token of
// an image, a lane a prefix token of a head.
template <class T, class In>
class PrefixRows {
  using V = Vec<T>;

 public:
  PrefixRows(const PrefixRowsParams& p, void* workspace)
      : p_(p),
        memory_(p),
        first_(static_cast<T*>(workspace)),
        queries_(first_ + memory_.queries),
        mixed_(first_ + memory_.mixed),
        weights_(first_ + memory_.weights),
        rows_(first_ + memory_.rows) {}

  void run(const ParallelFor& parallel) const {
    load_prefix();
    queries(parallel);
    absorb_keys(parallel);
    logits(parallel);
    softmax(parallel);
    pool(parallel);
    values(parallel);
    output(parallel);
  }

 private:
  static const T* bias(const void* b) { return static_cast<const T*>(b); }
  static Matrix<In> matrix(const void* data, int64_t stride) {
    return {static_cast<const In*>(data), stride};
  }
  Matrix<In> image(int64_t b) const {
    return matrix(static_cast<const In*>(p_.x) + b * p_.x_stride_batch, p_.x_stride_token);
  }

  // f(outer, begin, end) over blocks of `size` of 0..count-1, for each `outer`; `work` is that of
  // one of the count, in multiplications.
  template <class F>
  static void each_block(const ParallelFor& parallel, int64_t outer, int64_t count, int64_t size,
                         int64_t work, const F& f) {
    constexpr int64_t kMultiplications = 8;  // that take as long as an element of another operator
    const int64_t blocks = (count + size - 1) / size;
    auto body = [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t from = task % blocks * size;
        f(task / blocks, from, count - from < size ? count : from + size);
      }
    };
    parallel(outer * blocks, size * work / kMultiplications, body);
  }

  void load_prefix() const {
    for (int64_t r = 0; r < p_.rows(); ++r) {
      const In* const from = image(r / p_.num_prefix).row(r % p_.num_prefix);
      T* const to = first_ + r * memory_.stride;
      int64_t d = 0;
      for (; d + V::width <= p_.dim; d += V::width) V::load(from + d).store(to + d);
      for (; d < p_.dim; ++d) to[d] = to_float(from[d]);
    }
  }

  // In units that make the softmax one of powers of two.
  void queries(const ParallelFor& parallel) const {
    const T factor = static_cast<T>(p_.scale * 1.44269504088896340736);
    const T* const bq = bias(p_.bq);
    const int64_t rows = p_.rows();
    const auto row = [&](int64_t r) { return first_ + r * memory_.stride; };
    const auto store = [&](int64_t c, int64_t r, T q) {
      queries_[c * rows + r] = factor * (bq == nullptr ? q : q + bq[c]);
    };
    each_block(parallel, 1, p_.channels(), kAcrossAll, rows * p_.dim,
               [&](int64_t, int64_t begin, int64_t end) {
                 dots<T>(matrix(p_.wq, p_.wq_stride), begin, end, rows, p_.dim, row, store);
               });
  }

  void absorb_keys(const ParallelFor& parallel) const {
    const int64_t rows = p_.rows();
    each_block(parallel, 1, p_.heads, 1, rows * p_.head_dim * p_.dim,
               [&](int64_t, int64_t h, int64_t) {
                 const int64_t c = h * p_.head_dim;
                 const auto row = [&](int64_t r) {
                   const int64_t b = r / p_.num_prefix, t = r % p_.num_prefix;
                   return absorbed(b, h * p_.num_prefix + t);
                 };
                 const Matrix<In> keys = matrix(p_.wk, p_.wk_stride);
                 mix<T>(Matrix<In>{keys.row(c), keys.stride}, p_.head_dim, 0, p_.dim,
                        queries_ + c * rows, rows, rows, row);
               });
  }
  T* absorbed(int64_t b, int64_t lane) const {
    return mixed_ + (b * p_.lanes() + lane) * memory_.stride;
  }

  void logits(const ParallelFor& parallel) const {
    const int64_t lanes = p_.lanes();
    each_block(parallel, p_.batch, p_.tokens, kAcrossAll, lanes * p_.dim,
               [&](int64_t b, int64_t begin, int64_t end) {
                 T* const e = weights_ + b * p_.tokens * lanes;
                 dots<T>(
                     image(b), begin, end, lanes, p_.dim,
                     [&](int64_t lane) { return absorbed(b, lane); },
                     [&](int64_t j, int64_t lane, T s) { e[j * lanes + lane] = s; });
               });
  }

  // Down the lanes.
  void softmax(const ParallelFor& parallel) const {
    const int64_t lanes = p_.lanes();
    each_block(parallel, p_.batch, lanes, V::width, 64 * p_.tokens,
               [&](int64_t b, int64_t begin, int64_t end) {
                 normalise(weights_ + b * p_.tokens * lanes + begin, static_cast<int>(end - begin));
               });
  }

  void normalise(T* e, int count) const {
    const int64_t lanes = p_.lanes(), size = p_.tokens * lanes;
    if constexpr (std::is_same_v<T, float>) {
      V top = V::load_n(e, count), sum = V::zero();
      for (int64_t j = lanes; j < size; j += lanes) top = max(top, V::load_n(e + j, count));
      for (int64_t j = 0; j < size; j += lanes) {
        const V weight = exp2_of(V::load_n(e + j, count) - top);
        weight.store_n(e + j, count);
        sum = sum + weight;
      }
      float inverse[V::width];
      sum.store(inverse);
      for (float& one : inverse) one = 1.0f / one;
      const V factor = V::load(inverse);
      for (int64_t j = 0; j < size; j += lanes) {
        (V::load_n(e + j, count) * factor).store_n(e + j, count);
      }
    } else {
      for (int lane = 0; lane < count; ++lane) {
        T* const at = e + lane;
        T top = at[0], sum = 0;
        for (int64_t j = lanes; j < size; j += lanes) top = at[j] > top ? at[j] : top;
        for (int64_t j = 0; j < size; j += lanes) sum += at[j] = std::exp2(at[j] - top);
        for (int64_t j = 0; j < size; j += lanes) at[j] /= sum;
      }
    }
  }

  void pool(const ParallelFor& parallel) const {
    const int64_t lanes = p_.lanes();
    each_block(parallel, p_.batch, p_.dim, kAcrossAll * V::width, lanes * p_.tokens,
               [&](int64_t b, int64_t begin, int64_t end) {
                 const auto row = [&](int64_t lane) {
                   return pooled(lane / p_.num_prefix, b * p_.num_prefix + lane % p_.num_prefix);
                 };
                 mix<T>(image(b), p_.tokens, begin, end, weights_ + b * p_.tokens * lanes, lanes,
                        lanes, row);
               });
  }
  T* pooled(int64_t h, int64_t r) const { return mixed_ + (h * p_.rows() + r) * memory_.stride; }

  void values(const ParallelFor& parallel) const {
    const T* const bv = bias(p_.bv);
    const int64_t rows = p_.rows(), channels = p_.channels();
    const auto store = [&](int64_t c, int64_t r, T v) {
      rows_[r * channels + c] = bv == nullptr ? v : v + bv[c];
    };
    each_block(parallel, p_.heads, p_.head_dim, kAcrossAll, rows * p_.dim,
               [&](int64_t h, int64_t begin, int64_t end) {
                 const int64_t c = h * p_.head_dim;
                 dots<T>(
                     matrix(p_.wv, p_.wv_stride), c + begin, c + end, rows, p_.dim,
                     [&](int64_t r) { return pooled(h, r); }, store);
               });
  }

  void output(const ParallelFor& parallel) const {
    const T* const bo = bias(p_.bo);
    In* const out = static_cast<In*>(p_.out);
    const int64_t rows = p_.rows(), channels = p_.channels();
    const auto store = [&](int64_t o, int64_t r, T y) {
      from_float(bo == nullptr ? y : y + bo[o], out + r * p_.dim_out + o);
    };
    each_block(parallel, 1, p_.dim_out, kAcrossAll, rows * channels,
               [&](int64_t, int64_t begin, int64_t end) {
                 dots<T>(
                     matrix(p_.wo, p_.wo_stride), begin, end, rows, channels,
                     [&](int64_t r) { return rows_ + r * channels; }, store);
               });
  }

  const PrefixRowsParams& p_;
  const PrefixRowsMemory memory_;
  T *const first_, *const queries_, *const mixed_, *const weights_, *const rows_;
};

}  // namespace

Status prefix_rows(const PrefixRowsParams& p, void* workspace, const ParallelFor& parallel) {
  switch (p.dtype) {
    case DType::kFloat32:
      PrefixRows<float, float>(p, workspace).run(parallel);
      return Status::kOk;
    case DType::kFloat64:
      PrefixRows<double, double>(p, workspace).run(parallel);
      return Status::kOk;
    case DType::kFloat16:
      PrefixRows<float, Float16>(p, workspace).run(parallel);
      return Status::kOk;
    case DType::kBFloat16:
      PrefixRows<float, BFloat16>(p, workspace).run(parallel);
      return Status::kOk;
  }
  return Status::kUnsupportedDType;
}

}  // namespace dwattn::cpu::DWATTN_ISA
