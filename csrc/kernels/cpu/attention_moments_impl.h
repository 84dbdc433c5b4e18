// The moments of a tile over a batch, compiled once per instruction set.
#pragma once

#include "kernels/cpu/attention_variance.h"
#include "kernels/cpu/simd.h"

namespace dwattn::cpu::DWATTN_ISA {
namespace {

template <class T>
static T* take(char*& memory, int64_t bytes) {
  T* at = reinterpret_cast<T*>(memory);
  memory += bytes;
  return at;
}

// Sums over the images of a batch, laid out like the weights they are made of: (N keys, lanes of
// queries). They meet the state, whose rows are queries, once per call.
class TileMoments {
  using V = Vec<float>;
  using W = Vec<double>;
  static constexpr int64_t kColumns = 32;  // of the state, that are merged at a time

 public:
  TileMoments(const AttentionVarianceParams& params, const AttentionTiles& tiles, char*& memory)
      : p_(params),
        shift_(take<float>(memory, tiles.shift_bytes)),
        s1_(take<double>(memory, tiles.sums_bytes)),
        s2_(take<double>(memory, tiles.sums_bytes)) {}

  // Adds E of `count` images to the sums of deviations from E of the first image, and of their
  // squares. E is fp32, its deviations are exact in fp64.
  // `weights` holds, for each image, E times the sum of its row, (N, lanes), and 1 / these sums.
  void fold(const float* weights, int64_t count, int64_t lanes, bool first) {
    lanes_ = lanes;
    if (first) {
      fold<true>(weights, count);
    } else {
      fold<false>(weights, count);
    }
  }

  // Joins the moments of `images` to those of queries first ... first + rows of a head, in which
  // `count` images are.
  void merge(int64_t head, int64_t first, int64_t rows, int64_t lanes, int64_t images,
             int64_t count) {
    images_ = images;
    count_ = count;
    head_ = head;
    first_ = first;
    rows_ = rows;
    lanes_ = lanes;
    Moments moments;
    for (int64_t l = 0; l < rows_; l += W::width) {
      merge_columns(l, 0, p_.prefix_mean != nullptr ? p_.skip : 0, moments);
      merge_columns(l, p_.skip, p_.tokens, moments);
    }
  }

 private:
  // The moments of the batch, W::width queries by up to kColumns keys, transposed.
  struct Moments {
    alignas(64) double mean[W::width][kColumns];
    alignas(64) double m2[W::width][kColumns];
  };

  template <bool kFirst>
  void fold(const float* weights, int64_t count) {
    const int64_t image_size = (p_.tokens + 1) * lanes_;
    const float* const inverses = weights + p_.tokens * lanes_;
    const auto entry_of = [&](int64_t i, int64_t entry, int64_t l) {
      const float* const image = weights + i * image_size;
      return V::load(image + entry) * V::load(inverses + i * image_size + l);
    };
    for (int64_t j = 0; j < p_.tokens; ++j) {
      for (int64_t l = 0; l < lanes_; l += V::width) {
        const int64_t entry = j * lanes_ + l;
        W low[2] = {W::zero(), W::zero()}, high[2] = {W::zero(), W::zero()};
        if (kFirst) {
          entry_of(0, entry, l).store(shift_ + entry);
        } else {
          low[0] = W::load(s1_ + entry);
          low[1] = W::load(s2_ + entry);
          high[0] = W::load(s1_ + entry + W::width);
          high[1] = W::load(s2_ + entry + W::width);
        }
        const V shift = V::load(shift_ + entry);
        const W shift_low = low_half(shift), shift_high = high_half(shift);
        for (int64_t i = kFirst ? 1 : 0; i < count; ++i) {
          const V e = entry_of(i, entry, l);
          add(low_half(e) - shift_low, low);
          add(high_half(e) - shift_high, high);
        }
        low[0].store(s1_ + entry);
        low[1].store(s2_ + entry);
        high[0].store(s1_ + entry + W::width);
        high[1].store(s2_ + entry + W::width);
      }
    }
  }

  static void add(W deviation, W (&sums)[2]) {
    sums[0] = sums[0] + deviation;
    sums[1] = fma(deviation, deviation, sums[1]);
  }

  void merge_columns(int64_t l, int64_t first, int64_t last, Moments& moments) const {
    for (int64_t j = first; j < last; j += kColumns) {
      const int64_t count = last - j < kColumns ? last - j : kColumns;
      batch_moments(l, j, count, moments);
      for (int64_t r = 0; r < W::width && l + r < rows_; ++r) {
        const int64_t row = first_ + l + r - p_.skip, size = p_.tokens - p_.skip;
        if (j < p_.skip) {
          double* const prefix = static_cast<double*>(p_.prefix_mean);
          join_means(moments.mean[r], count, prefix + (head_ * size + row) * p_.skip + j);
        } else {
          const int64_t entry = (head_ * size + row) * size + j - p_.skip;
          join(moments.mean[r], moments.m2[r], count, static_cast<double*>(p_.mean) + entry,
               static_cast<double*>(p_.m2) + entry);
        }
      }
    }
  }

  void batch_moments(int64_t l, int64_t j, int64_t count, Moments& moments) const {
    const W share = W::all(1.0 / static_cast<double>(images_));
    for (int64_t c = 0; c < count; ++c) {
      const int64_t entry = (j + c) * lanes_ + l;
      const W s1 = W::load(s1_ + entry), offset = s1 * share;
      alignas(64) double mean[W::width], m2[W::width];
      (W::load(shift_ + entry) + offset).store(mean);
      (W::load(s2_ + entry) - s1 * offset).store(m2);
      for (int r = 0; r < W::width; ++r) {
        moments.mean[r][c] = mean[r];
        moments.m2[r][c] = m2[r];
      }
    }
  }

  // Chan's formula along a row of the state.
  void join(const double* batch_mean, const double* batch_m2, int64_t count, double* mean,
            double* m2) const {
    const double total = static_cast<double>(count_ + images_);
    const double part = static_cast<double>(images_) / total;
    const W share = W::all(part), cross = W::all(static_cast<double>(count_) * part);
    for (int64_t c = 0; c < count; c += W::width) {
      const int n = count - c < W::width ? static_cast<int>(count - c) : W::width;
      W joined_mean = W::load(batch_mean + c), joined_m2 = W::load(batch_m2 + c);
      if (count_ > 0) {
        const W old = W::load_n(mean + c, n), delta = joined_mean - old;
        joined_mean = fma(delta, share, old);
        joined_m2 = W::load_n(m2 + c, n) + joined_m2 + delta * delta * cross;
      }
      joined_mean.store_n(mean + c, n);
      joined_m2.store_n(m2 + c, n);
    }
  }

  void join_means(const double* batch_mean, int64_t count, double* mean) const {
    const double share = static_cast<double>(images_) / static_cast<double>(count_ + images_);
    for (int64_t c = 0; c < count; ++c) {
      mean[c] = count_ > 0 ? mean[c] + (batch_mean[c] - mean[c]) * share : batch_mean[c];
    }
  }

  const AttentionVarianceParams& p_;
  float* const shift_;  // (N, lanes): E of the first image
  double* const s1_;    // (N, lanes): sums of deviations from it
  double* const s2_;    // (N, lanes): sums of their squares
  int64_t images_ = 0, count_ = 0;
  int64_t head_ = 0, first_ = 0, rows_ = 0, lanes_ = 0;
};

}  // namespace
}  // namespace dwattn::cpu::DWATTN_ISA
