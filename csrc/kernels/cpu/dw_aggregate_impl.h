// The aggregation kernel, compiled once per instruction set (DWATTN_ISA names the namespace).
//
// Work is cut into output rows. A task walks a run of rows in blocks of up to four, and for each
// vector of channels slides along the columns: every value of V is loaded once per block and feeds
// the nine taps of the three columns it belongs to, whose partial sums stay in registers.
// Columns 1..W-2 see no bounds test; rows outside the grid read a vector of zeros.
#pragma once

#include "kernels/cpu/dw_aggregate.h"
#include "kernels/cpu/simd.h"
#include "kernels/cpu/unroll.h"

// Left to itself the compiler outlines the column step and keeps its partial sums in memory.
#define DWATTN_INLINE __attribute__((always_inline))

namespace dwattn::cpu::DWATTN_ISA {
namespace {

template <class T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};

template <class In, class Out>
class Aggregate {
 public:
  using Acc = typename AccOf<In>::type;
  using V = Vec<Acc>;

  Aggregate(const DwAggregateParams& params, void* workspace)
      : p_(params),
        padded_(padded_channels(params.channels)),
        taps_(static_cast<Acc*>(workspace)),
        ctx_(taps_ + 9 * padded_) {}

  void run(const ParallelFor& parallel) {
    pack_taps();
    constexpr int64_t slice = 4 * V::width;
    const int64_t slices = (p_.channels + slice - 1) / slice;
    auto contexts = [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t c = task % slices * slice;
        context(task / slices, c, c + slice < p_.channels ? c + slice : p_.channels);
      }
    };
    parallel(p_.batch * slices, p_.mu != nullptr ? slice * p_.height * p_.width : slice, contexts);
    auto rows = [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t b = begin / p_.height, first = begin - b * p_.height;
        const int64_t rest = end - b * p_.height;
        const int64_t last = rest < p_.height ? rest : p_.height;
        image_rows(b, first, last);
        begin = b * p_.height + last;
      }
    };
    parallel(p_.batch * p_.height, p_.width * p_.channels, rows);
  }

 private:
  // (C, 3, 3) -> (9, padded C), so that one load gives a tap for a vector of channels.
  void pack_taps() {
    const Acc* kernel = static_cast<const Acc*>(p_.kernel);
    for (int64_t tap = 0; tap < 9; ++tap) {
      Acc* out = taps_ + tap * padded_;
      for (int64_t c = 0; c < p_.channels; ++c) out[c] = kernel[c * 9 + tap];
      for (int64_t c = p_.channels; c < padded_; ++c) out[c] = Acc(0);
    }
  }

  const In* token(int64_t b, int64_t t) const {
    return static_cast<const In*>(p_.v) + b * p_.v_stride_batch + t * p_.v_stride_token;
  }

  static V load(const In* v, int n) { return n == V::width ? V::load(v) : V::load_n(v, n); }

  static V coefficient(const void* values, int64_t c, int n) {
    if (values == nullptr) return V::zero();
    const Acc* at = static_cast<const Acc*>(values) + c;
    return n == V::width ? V::load(at) : V::load_n(at, n);
  }

  int lanes(int64_t c, int64_t end) const {
    return end - c < V::width ? static_cast<int>(end - c) : V::width;
  }

  // ctx[b, c0:c1]
  void context(int64_t b, int64_t c0, int64_t c1) {
    V mean[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
    if (p_.mu != nullptr) patch_mean(b, c0, c1, mean);
    for (int64_t c = c0; c < c1; c += V::width) {
      const int n = lanes(c, c1);
      const V bias = coefficient(p_.v_bias, c, n);
      V sum = coefficient(p_.beta, c, n);
      for (int64_t t = 0; p_.kappa != nullptr && t < p_.num_prefix; ++t) {
        const Acc* kappa = static_cast<const Acc*>(p_.kappa) + t * p_.channels;
        sum = fma(coefficient(kappa, c, n), load(token(b, t) + c, n) + bias, sum);
      }
      if (p_.mu != nullptr) {
        sum = fma(coefficient(p_.mu, c, n), mean[(c - c0) / V::width] + bias, sum);
      }
      sum.store(ctx_ + b * padded_ + c);
    }
  }

  // Sums over runs of patches first, then over the runs, which are as many as a run has patches:
  // the error grows with the root of their number, however long a side of the grid is.
  void patch_mean(int64_t b, int64_t c0, int64_t c1, V (&mean)[4]) {
    const int64_t step = p_.v_stride_token, patches = p_.height * p_.width;
    const bool full = c1 - c0 == 4 * V::width;
    int64_t run = 1;
    while (run * run < patches) ++run;
    for (int64_t i = 0; i < patches; i += run) {
      const In* v = token(b, p_.num_prefix + i) + c0;
      const int64_t count = patches - i < run ? patches - i : run;
      V sum[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
      if (full) {
        for (int64_t j = 0; j < count; ++j, v += step) {
          for (int u = 0; u < 4; ++u) sum[u] = sum[u] + V::load(v + u * V::width);
        }
      } else {
        for (int64_t j = 0; j < count; ++j, v += step) {
          for (int u = 0; c0 + u * V::width < c1; ++u) {
            sum[u] = sum[u] + load(v + u * V::width, lanes(c0 + u * V::width, c1));
          }
        }
      }
      for (int u = 0; u < 4; ++u) mean[u] = mean[u] + sum[u];
    }
    const V scale = V::all(Acc(1) / static_cast<Acc>(patches));
    for (int u = 0; u < 4; ++u) mean[u] = mean[u] * scale;
  }

  // Output rows first..last-1 of one image: the two border rows alone, the others in blocks.
  void image_rows(int64_t b, int64_t first, int64_t last) {
    int64_t i = first;
    while (i < last) {
      const int64_t inside = i == 0 ? 1 : (last < p_.height ? last : p_.height - 1) - i;
      if (i > 0 && inside >= 4) {
        row_block<4>(b, i);
        i += 4;
      } else if (i > 0 && inside >= 2) {
        row_block<2>(b, i);
        i += 2;
      } else {
        row_block<1>(b, i);
        i += 1;
      }
    }
  }

  template <int R>
  void row_block(int64_t b, int64_t i) {
    int64_t c = 0;
    for (; c + V::width <= p_.channels; c += V::width) columns<R, false>(b, i, c, V::width);
    if (c < p_.channels) columns<R, true>(b, i, c, static_cast<int>(p_.channels - c));
  }

  // What a column's partial sum starts from: ctx plus the bias of the taps that lie inside the
  // grid.
  struct Start {
    V left, middle, right;
  };
  Start start(int64_t b, int64_t i, int64_t c, int n, const V (&w)[9]) const {
    const V ctx = V::load(ctx_ + b * padded_ + c);
    if (p_.v_bias == nullptr) return {ctx, ctx, ctx};
    const V bias = coefficient(p_.v_bias, c, n);
    V column[3];
    for (int s = 0; s < 3; ++s) {
      column[s] = w[3 + s];
      if (i > 0) column[s] = column[s] + w[s];
      if (i + 1 < p_.height) column[s] = column[s] + w[6 + s];
    }
    if (p_.width == 1) {
      const V only = fma(bias, column[1], ctx);
      return {only, only, only};
    }
    return {fma(bias, column[1] + column[2], ctx),
            fma(bias, column[0] + column[1] + column[2], ctx),
            fma(bias, column[0] + column[1], ctx)};
  }

  // Rows i..i+R-1, all columns, channels c..c+n-1. For R > 1 no row of the block is a border row.
  template <int R, bool Tail>
  void columns(int64_t b, int64_t i, int64_t c, int n) {
    static const In zeros[V::width] = {};
    const In* v[R + 2];
    int64_t step[R + 2];
    DWATTN_UNROLL
    for (int r = 0; r < R + 2; ++r) {
      const int64_t row = i + r - 1;
      const bool inside = row >= 0 && row < p_.height;
      v[r] = inside ? token(b, p_.num_prefix + row * p_.width) + c : zeros;
      step[r] = inside ? p_.v_stride_token : 0;
    }
    Out* y = static_cast<Out*>(p_.y) + b * p_.y_stride_batch + i * p_.width * p_.y_stride_token + c;
    const int64_t y_step = p_.y_stride_token, y_row = p_.width * y_step;

    V w[9];
    DWATTN_UNROLL
    for (int tap = 0; tap < 9; ++tap) w[tap] = V::load(taps_ + tap * padded_ + c);
    const Start from = start(b, i, c, n, w);
    V done[R], open[R];  // partial sums of the columns left of and at the current one
    DWATTN_UNROLL
    for (int r = 0; r < R; ++r) open[r] = from.left;

    auto store = [&](int64_t j) DWATTN_INLINE {
      DWATTN_UNROLL
      for (int r = 0; r < R; ++r) {
        Out* at = y + r * y_row + j * y_step;
        if (Tail) {
          done[r].store_n(at, n);
        } else {
          done[r].store(at);
        }
      }
    };
    // Column j of V: last taps of column j-1, middle taps of j, first taps of j+1.
    auto visit = [&](int64_t j, bool has_left, bool has_right, const V& next) DWATTN_INLINE {
      V x[R + 2];
      DWATTN_UNROLL
      for (int r = 0; r < R + 2; ++r) {
        x[r] = Tail ? V::load_n(v[r] + j * step[r], n) : V::load(v[r] + j * step[r]);
      }
      if (has_left) {
        DWATTN_UNROLL
        for (int r = 0; r < R; ++r) done[r] = taps<2>(w, x + r, done[r]);
        store(j - 1);
      }
      DWATTN_UNROLL
      for (int r = 0; r < R; ++r) done[r] = taps<1>(w, x + r, open[r]);
      if (has_right) {
        DWATTN_UNROLL
        for (int r = 0; r < R; ++r) open[r] = taps<0>(w, x + r, next);
      }
    };
    const int64_t width = p_.width;
    if (width == 1) {
      visit(0, false, false, from.right);
    } else {
      visit(0, false, true, width == 2 ? from.right : from.middle);
      for (int64_t j = 1; j + 2 < width; ++j) visit(j, true, true, from.middle);
      if (width > 2) visit(width - 2, true, true, from.right);
      visit(width - 1, true, false, from.right);
    }
    store(width - 1);
  }

  // The three taps of kernel column S, over three rows of V.
  template <int S>
  static V taps(const V (&w)[9], const V* x, V sum) {
    DWATTN_UNROLL
    for (int r = 0; r < 3; ++r) sum = fma(w[3 * r + S], x[r], sum);
    return sum;
  }

  const DwAggregateParams& p_;
  const int64_t padded_;
  Acc* const taps_;  // (9, padded C)
  Acc* const ctx_;   // (B, padded C)
};

template <class In, class Out>
Status run(const DwAggregateParams& params, void* workspace, const ParallelFor& parallel) {
  Aggregate<In, Out>(params, workspace).run(parallel);
  return Status::kOk;
}

}  // namespace

Status dw_aggregate(const DwAggregateParams& p, void* workspace, const ParallelFor& parallel) {
  if (p.v_dtype == p.y_dtype) {
    switch (p.v_dtype) {
      case DType::kFloat32:
        return run<float, float>(p, workspace, parallel);
      case DType::kFloat64:
        return run<double, double>(p, workspace, parallel);
      case DType::kFloat16:
        return run<Float16, Float16>(p, workspace, parallel);
      case DType::kBFloat16:
        return run<BFloat16, BFloat16>(p, workspace, parallel);
    }
  }
  if (p.v_dtype == DType::kFloat32 && p.y_dtype == DType::kFloat16) {
    return run<float, Float16>(p, workspace, parallel);
  }
  if (p.v_dtype == DType::kFloat32 && p.y_dtype == DType::kBFloat16) {
    return run<float, BFloat16>(p, workspace, parallel);
  }
  return Status::kUnsupportedDType;
}

}  // namespace dwattn::cpu::DWATTN_ISA
