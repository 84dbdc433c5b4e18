// The matrix product of bf16 by AMX tiles, with sums in fp32.
//
// A tile register holds 16 rows of 64 bytes. Tiles of the left factor are 16 rows by 32 numbers as
// they lie; those of the right one want pairs of numbers of a column side by side. Two by two tiles
// of sums, 32 x 32 outputs, stay in registers over the whole depth.
//
// A task is some bands of 32 rows times some bands of 32 columns. It packs a group of bands of the
// weight that stays in the second-level cache, and passes its rows by them, so that an input is
// read as often as there are groups, and the weight once.
#include "kernels/cpu/gemm_amx.h"

#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "kernels/cpu/half.h"
#include "kernels/cpu/pairs_impl.h"
#include "kernels/cpu/scratch.h"

namespace dwattn::cpu::amx {
namespace {

constexpr int64_t kTile = 16, kDepth = 32;  // rows of a tile, and numbers in one
constexpr int64_t kTileBytes = 1024;
constexpr int64_t kBand = 2 * kTile;
constexpr int64_t kSumsBytes = kBand * kBand * 4;

constexpr int64_t pieces(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

// The tile registers of a thread while it computes: all eight with 16 rows of 64 bytes.
class Tiles {
 public:
  Tiles() {
    struct alignas(64) Configuration {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } configuration;
    static_assert(sizeof configuration == 64);
    for (int tile = 0; tile < 8; ++tile) {
      configuration.row_bytes[tile] = 64;
      configuration.rows[tile] = 16;
    }
    _tile_loadconfig(&configuration);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// Bytes of two tiles side by side over the whole depth.
int64_t band_bytes(int64_t k) { return pieces(k, kDepth) * 2 * kTileBytes; }

// 32 rows, `stride` bytes apart.
struct Rows {
  const char* from;
  int64_t stride;
};

// What happens between the instructions of a product, which leave most of the core idle.
struct Meanwhile {
  // Lines first..last-1 of the next band of rows, `stride` bytes apart, and at each step those
  // behind them are fetched: the hardware does not foresee the loads of tiles.
  const char* ahead;
  int64_t stride, first, last;

  void fetch() {
    for (int64_t line = first; line < last; ++line) {
      _mm_prefetch(ahead + line * stride, _MM_HINT_T1);
    }
    ahead += 2 * kDepth;
  }
};

// Finished sums (rows, 32) on their way to the output, with the bias.
struct Results {
  const float* sums;
  BFloat16* out;
  int64_t stride, rows;
  __m512 left, right;  // the bias
  __mmask32 columns;   // that exist

  void store(int64_t count) {
    for (count = std::min(count, rows); count > 0; --count, --rows) {
      const __m512 a = _mm512_add_ps(_mm512_loadu_ps(sums), left);
      const __m512 b = _mm512_add_ps(_mm512_loadu_ps(sums + kTile), right);
      const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(b, a);
      _mm512_mask_storeu_epi16(out, columns, rounded);
      sums += kBand;
      out += stride;
    }
  }
};

// sums (32, 32) = rows times columns. Meanwhile the results of an earlier product are stored,
// before its sums are overwritten.
void multiply(Rows rows, const char* columns, int64_t steps, Meanwhile meanwhile, Results& results,
              float* sums) {
  // The intrinsics are assembly that does not tell the compiler what memory it reads.
  __asm__ volatile("" ::: "memory");
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const int64_t per_step = steps > 0 ? pieces(results.rows, steps) : 0;
  for (int64_t step = 0; step < steps; ++step) {
    _tile_loadd(4, rows.from, rows.stride);
    _tile_loadd(6, columns, 64);
    _tile_loadd(7, columns + kTileBytes, 64);
    _tile_loadd(5, rows.from + kTile * rows.stride, rows.stride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    rows.from += 2 * kDepth;
    columns += 2 * kTileBytes;
    meanwhile.fetch();
    results.store(per_step);
  }
  results.store(kBand);  // those of a product without depth
  constexpr int64_t kRow = kBand * sizeof(float);
  _tile_stored(0, sums, kRow);
  _tile_stored(1, sums + kTile, kRow);
  _tile_stored(2, sums + kTile * kBand, kRow);
  _tile_stored(3, sums + kTile * kBand + kTile, kRow);
}

// How a product is cut into tasks, and the memory of each.
struct Plan {
  Plan(const GemmParams& p, int64_t threads) : images(p.batch), rows(p.m) {
    // Images whose rows follow each other are one.
    if (p.a_stride_batch == p.m * p.a_stride_row && p.out_stride_batch == p.m * p.out_stride_row) {
      images = 1;
      rows = p.batch * p.m;
    }
    // Tiles are read whole: rows that end within one, or are fewer than a band has, are copied
    // first.
    copied = p.k % kDepth != 0 || rows < kBand;
    image_bands = pieces(rows, kBand);
    row_bands = images * image_bands;
    column_bands = pieces(p.n, kBand);
    // The split with the least work of a task, fetching of its rows and columns included.
    int64_t least = 0;
    for (int64_t high = 1; high <= threads; ++high) {
      if (threads % high != 0) continue;
      const int64_t tall = pieces(row_bands, high), wide = pieces(column_bands, threads / high);
      const int64_t work = (tall + 1) * (wide + 1);
      if (least != 0 && work >= least) continue;
      least = work;
      task_rows = tall;
      task_columns = wide;
    }
    ranges = pieces(column_bands, task_columns);
    tasks = pieces(row_bands, task_rows) * ranges;
    constexpr int64_t kCachedBytes = 1 << 20;
    const int64_t most = kCachedBytes / (band_bytes(p.k) + 1);
    group = pieces(task_columns, pieces(task_columns, most < 1 ? 1 : most));
    packed_bytes = group * band_bytes(p.k);
    copy_bytes = copied ? kBand * copied_stride(p.k) * 2 : 0;
  }

  static int64_t copied_stride(int64_t k) { return spaced_row(k, 2); }

  int64_t task_bytes() const { return packed_bytes + kSumsBytes + copy_bytes; }

  int64_t images, rows;  // of each image
  bool copied;
  int64_t image_bands, row_bands, column_bands;
  int64_t task_rows = 1, task_columns = 1;  // bands
  int64_t ranges, tasks;
  int64_t group;  // bands of columns that are packed together
  int64_t packed_bytes, copy_bytes;
};

class Gemm {
 public:
  Gemm(const GemmParams& p, const Plan& plan, void* workspace)
      : p_(p), plan_(plan), steps_(pieces(p.k, kDepth)), memory_(static_cast<char*>(workspace)) {}

  void run(const ParallelFor& parallel) const {
    auto body = [&](int64_t begin, int64_t end) {
      const Tiles tiles;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t rows = task / plan_.ranges * plan_.task_rows;
        const int64_t columns = task % plan_.ranges * plan_.task_columns;
        compute(rows, std::min(rows + plan_.task_rows, plan_.row_bands), columns,
                std::min(columns + plan_.task_columns, plan_.column_bands),
                memory_ + task * plan_.task_bytes());
      }
    };
    parallel(plan_.tasks, plan_.task_rows * kBand * (p_.n + p_.k), body);
  }

 private:
  static const char* bytes(const BFloat16* at) { return reinterpret_cast<const char*>(at); }

  // Bands of rows and of columns.
  void compute(int64_t first, int64_t last, int64_t begin, int64_t end, char* memory) const {
    for (int64_t columns = begin; columns < end; columns += plan_.group) {
      const int64_t group = std::min(plan_.group, end - columns);
      for (int64_t c = 0; c < group; ++c) {
        pack_columns((columns + c) * kBand, memory + c * band_bytes(p_.k));
      }
      Results results{};
      for (int64_t band = first; band < last; ++band) {
        multiply_band(band, band + 1 < last, columns, group, results, memory);
      }
      results.store(kBand);
    }
  }

  // A band of rows times a packed group of bands of columns. Meanwhile the next band of rows is
  // fetched, if there is one.
  void multiply_band(int64_t band, bool another, int64_t columns, int64_t group, Results& results,
                     char* memory) const {
    const int64_t image = band / plan_.image_bands, i = band % plan_.image_bands * kBand;
    const int64_t count = std::min(kBand, plan_.rows - i);
    // The last band of an image overlaps the one before rather than exceed the image.
    const int64_t skipped = plan_.copied ? 0 : kBand - count;
    const BFloat16* a = row_of(image, i - skipped);
    int64_t stride = p_.a_stride_row;
    if (plan_.copied) {
      BFloat16* const copy = reinterpret_cast<BFloat16*>(memory + plan_.packed_bytes + kSumsBytes);
      copy_rows(a, count, copy);
      a = copy;
      stride = Plan::copied_stride(p_.k);
    }
    const BFloat16* next = a;
    int64_t next_rows = 0;
    if (another) {
      const int64_t below = (band + 1) % plan_.image_bands * kBand;
      next = row_of((band + 1) / plan_.image_bands, below);
      next_rows = std::min(kBand, plan_.rows - below);
    }
    BFloat16* const out = static_cast<BFloat16*>(p_.out) + image * p_.out_stride_batch +
                          i * p_.out_stride_row + columns * kBand;
    float* const sums = reinterpret_cast<float*>(memory + plan_.packed_bytes);
    for (int64_t c = 0; c < group; ++c) {
      multiply(
          {bytes(a), 2 * stride}, memory + c * band_bytes(p_.k), steps_,
          {bytes(next), 2 * p_.a_stride_row, c * next_rows / group, (c + 1) * next_rows / group},
          results, sums);
      results = results_of(sums + skipped * kBand, out + c * kBand, count, (columns + c) * kBand);
    }
  }

  Results results_of(const float* sums, BFloat16* out, int64_t rows, int64_t j) const {
    const int64_t columns = std::min(p_.n - j, kBand);
    const __mmask32 there = static_cast<__mmask32>((uint64_t{1} << columns) - 1);
    __m512 left = _mm512_setzero_ps(), right = left;
    if (p_.bias != nullptr) {
      const float* const bias = static_cast<const float*>(p_.bias) + j;
      left = _mm512_maskz_loadu_ps(static_cast<__mmask16>(there), bias);
      right = _mm512_maskz_loadu_ps(static_cast<__mmask16>(there >> kTile), bias + kTile);
    }
    for (int64_t row = 0; row < rows; ++row) {
      __builtin_prefetch(out + row * p_.out_stride_row, 1);
    }
    return {sums, out, p_.out_stride_row, rows, left, right, there};
  }

  const BFloat16* row_of(int64_t image, int64_t row) const {
    return static_cast<const BFloat16*>(p_.a) + image * p_.a_stride_batch + row * p_.a_stride_row;
  }
  const BFloat16* weight_row(int64_t j) const {
    return static_cast<const BFloat16*>(p_.weight->weight) + j * p_.weight->stride;
  }

  // The same rows with zeros up to a whole tile. What lies behind the last row does not matter: no
  // output that depends on it is stored.
  void copy_rows(const BFloat16* from, int64_t rows, BFloat16* to) const {
    const size_t given = static_cast<size_t>(p_.k), whole = static_cast<size_t>(steps_ * kDepth);
    for (; rows > 0; --rows, from += p_.a_stride_row, to += Plan::copied_stride(p_.k)) {
      std::memcpy(to, from, 2 * given);
      std::memset(to + given, 0, 2 * (whole - given));
    }
  }

  // Columns j..j+31 of the product are rows of the weight; zeros behind the last one and behind the
  // last number of each.
  void pack_columns(int64_t j, char* to) const {
    const int64_t stride = p_.weight->stride;
    for (int64_t half = j; half < j + kBand; half += kTile, to += kTileBytes) {
      const int64_t rows = p_.n - half < kTile ? p_.n - half : kTile;
      char* at = to;
      for (int64_t k = 0; k < p_.k; k += kDepth, at += 2 * kTileBytes) {
        const int64_t depth = p_.k - k < kDepth ? p_.k - k : kDepth;
        if (rows == kTile && depth == kDepth) {
          transpose_pairs(bytes(weight_row(half) + k), 2 * stride, at);
          continue;
        }
        alignas(64) BFloat16 padded[kTile][kDepth] = {};
        for (int64_t row = 0; row < rows; ++row) {
          std::memcpy(padded[row], weight_row(half + row) + k, static_cast<size_t>(2 * depth));
        }
        transpose_pairs(bytes(padded[0]), sizeof padded[0], at);
      }
    }
  }

  const GemmParams& p_;
  const Plan& plan_;
  const int64_t steps_;
  char* const memory_;
};

}  // namespace

int64_t gemm_workspace(const GemmParams& p, int64_t threads) {
  const Plan plan(p, std::max(threads, int64_t{1}));
  return plan.tasks * plan.task_bytes();
}

Status gemm(const GemmParams& p, void* workspace, const ParallelFor& parallel) {
  const Plan plan(p, std::max(parallel.threads, int64_t{1}));
  Gemm(p, plan, workspace).run(parallel);
  return Status::kOk;
}

}  // namespace dwattn::cpu::amx
