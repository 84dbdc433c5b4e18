// What the kernel tests share: tensors with guarded gaps, random numbers, the error rule, the
// schedules.
#pragma once

#include <cinttypes>
#include <cstdio>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "kernels/cuda/device.cuh"

namespace harness {

using dwattn::cuda::from_float;
using dwattn::cuda::to_float;

inline int failures = 0;

inline void expect(bool condition, const std::string& sentence) {
  if (condition) return;
  ++failures;
  std::printf("FAIL %s\n", sentence.c_str());
}

template <class T>
inline const char* const kTypeName = "float32";
template <>
inline const char* const kTypeName<dwattn::cuda::Tf32> = "tf32";
template <>
inline const char* const kTypeName<__half> = "float16";
template <>
inline const char* const kTypeName<__nv_bfloat16> = "bfloat16";

template <class T>
inline constexpr dwattn::DType kType = dwattn::DType::kFloat32;
template <>
inline constexpr dwattn::DType kType<__half> = dwattn::DType::kFloat16;
template <>
inline constexpr dwattn::DType kType<__nv_bfloat16> = dwattn::DType::kBFloat16;

// fp32 tensors whose products the kernel takes in TF32.
template <class T>
inline constexpr bool kTf32 = std::is_same<T, dwattn::cuda::Tf32>::value;

inline std::mt19937& generator() {
  static std::mt19937 random(20240229);
  return random;
}

inline std::vector<float> normal(int64_t count, float scale = 1.0f) {
  std::normal_distribution<float> distribution(0.0f, scale);
  std::vector<float> values(count);
  for (float& v : values) v = distribution(generator());
  return values;
}

template <class T>
float rounded(float v) {
  return to_float(from_float<T>(v));
}

// What a product of elements of type T is taken of.
template <class T>
float multiplied(double element) {
  float v = static_cast<float>(element);
  if (!kTf32<T>) return v;
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  bits = simt::round_tf32(bits);
  std::memcpy(&v, &bits, 4);
  return v;
}

// Layout of a (batch, tokens, channels) tensor: distance of the rows and what lies before them.
struct Layout {
  int64_t row_gap = 0, batch_gap = 0, offset = 0;  // elements
};

// A strided tensor that ends with its last element, so that the address sanitizer sees the first
// element behind it. The gaps are NaN: reading them shows in a result, writing them shows in
// gaps_untouched().
template <class T>
class Tensor {
 public:
  Tensor(int64_t batch, int64_t tokens, int64_t channels, Layout layout = {})
      : batch_(batch), tokens_(tokens), channels_(channels), offset_(layout.offset) {
    stride_token = channels + layout.row_gap;
    stride_batch = tokens * stride_token + layout.batch_gap;
    const int64_t last = (batch - 1) * stride_batch + (tokens - 1) * stride_token + channels;
    bytes_ = static_cast<size_t>(offset_ + last) * sizeof(T);
    void* memory = nullptr;
    if (posix_memalign(&memory, 256, bytes_)) simt::die("out of memory");
    memory_.reset(static_cast<unsigned char*>(memory));
    std::memset(memory, 0xFF, bytes_);
  }

  static Tensor random(int64_t batch, int64_t tokens, int64_t channels, Layout layout = {},
                       float scale = 1.0f) {
    Tensor t(batch, tokens, channels, layout);
    std::normal_distribution<float> distribution(0.0f, scale);
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t n = 0; n < tokens; ++n) {
        for (int64_t c = 0; c < channels; ++c) {
          *t.at(b, n, c) = from_float<T>(distribution(generator()));
        }
      }
    }
    return t;
  }

  T* data() const { return reinterpret_cast<T*>(memory_.get()) + offset_; }
  T* at(int64_t b, int64_t n, int64_t c) const {
    return data() + b * stride_batch + n * stride_token + c;
  }
  double operator()(int64_t b, int64_t n, int64_t c) const { return to_float(*at(b, n, c)); }

  bool gaps_untouched() const {
    std::vector<bool> inside(bytes_ / sizeof(T));
    for (int64_t b = 0; b < batch_; ++b) {
      for (int64_t n = 0; n < tokens_; ++n) {
        const int64_t row = offset_ + b * stride_batch + n * stride_token;
        for (int64_t c = 0; c < channels_; ++c) inside[row + c] = true;
      }
    }
    for (size_t i = 0; i < bytes_; ++i) {
      if (!inside[i / sizeof(T)] && memory_.get()[i] != 0xFF) return false;
    }
    return true;
  }

  int64_t stride_batch, stride_token;

 private:
  struct Free {
    void operator()(unsigned char* p) const { std::free(p); }
  };
  int64_t batch_, tokens_, channels_, offset_;
  size_t bytes_;
  std::unique_ptr<unsigned char, Free> memory_;
};

// Device memory that starts as NaN and ends where it should.
inline std::vector<float> poisoned(int64_t bytes) {
  return std::vector<float>(bytes / sizeof(float), std::numeric_limits<float>::quiet_NaN());
}

// Largest deviation from the fp64 result, infinite where a value is not finite.
struct Deviation {
  double largest = 0, scale = 0;

  void add(double value, double exact) {
    const double error = std::fabs(value - exact);
    if (!(error <= largest)) {
      largest = std::isfinite(error) ? error : std::numeric_limits<double>::infinity();
    }
    scale = std::max(scale, std::fabs(exact));
  }
};

// The rule for every kernel: at most twice the error of the plain computation in the same dtype. A
// small part of a unit in the last place of the largest value is added, for tensors of a few
// elements, on which the plain computation may be lucky.
template <class T>
void expect_accurate(const Deviation& kernel, const Deviation& plain, const std::string& what) {
  constexpr bool kHalf = std::is_same<T, __half>::value;
  constexpr double kRoom = kTf32<T> || kHalf ? 0x1p-12 : sizeof(T) == 4 ? 0x1p-21 : 0x1p-9;
  const double allowed = 2 * plain.largest + kRoom * plain.scale;
  char numbers[80];
  std::snprintf(numbers, sizeof numbers, ": error %.3g, allowed %.3g", kernel.largest, allowed);
  expect(kernel.largest <= allowed, what + numbers);
}

// That products are taken in TF32 where they should be: the plain computation of a few numbers may
// be lucky, but where it is not, neither is the kernel.
template <class T>
void expect_tf32(const Deviation& kernel, const Deviation& plain, const std::string& what) {
  if (!kTf32<T> || plain.largest < 0x1p-14 * plain.scale) return;
  expect(kernel.largest > 0x1p-18 * kernel.scale, what + ": more accurate than TF32 can be");
}

// Runs `test` under every schedule until one fails; the exit status of the program.
template <class Test>
int run_schedules(const Test& test) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  for (simt::Order order : simt::kOrders) {
    simt::machine.order = order;
    test();
    if (failures > 0) break;
  }
  std::printf("%d failure(s)\n", failures);
  return failures == 0 ? 0 : 1;
}

}  // namespace harness
