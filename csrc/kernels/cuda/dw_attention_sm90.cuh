// The work of dw_attention_sm90.cu: Y = aggregation of x Wv^T + bv in one kernel. The definition
// and the window of a piece of work are those of dw_attention.cu; here a window has whole rows.
//
// A block stays on its multiprocessor and takes pieces: 128 channels of a band of rows of an image.
// It walks the tokens of a piece 192 at a time (a tile). Its warps have three roles, which meet at
// barriers in shared memory only:
// - load: one thread keeps three stages of x (192 x 64) and Wv (128 x 64) filled by tensor copies.
// - multiply: each of three warpgroups makes V (64 x 128) of its 64 tokens in registers, rounds it
//   and puts it into the lines.
// - aggregate: six warps compute the stencil over the lines and write the outputs.
// The products of the next tile, or of the next piece, run while a tile is aggregated.
//
// The floor. A multiprocessor does 4096 fp16 flops a cycle: 768 cycles for a tile over 64 of D. In
// these it reads 40 KB from L2, 53 bytes a cycle; x is read C / 128 times, from device memory once.
// Products read 6 KB in 64 cycles from shared memory and the copies write 53 bytes a cycle, 149 of
// the 128 that it can: so 0.86 of the tensor cores' peak is the bound. A tile wider than 128 would
// read less and needs more accumulators than 19 warps have registers for (96 a thread).
// Aggregating a tile takes about 3000 issue slots per scheduler against 12000 cycles of products at
// D = 1024. What is not hidden: the first stages, putting V into the lines, and the aggregation of
// the last tile of the last piece. One block per multiprocessor, up to 224 KB of shared memory.
#pragma once

#include "kernels/cuda/device_sm90.cuh"
#include "kernels/cuda/dw_lines.cuh"

namespace dwattn::cuda::hopper {

constexpr int kGroups = 3;  // warpgroups that multiply
constexpr int kGroupRows = 64;
constexpr int kTileRows = kGroups * kGroupRows;
constexpr int kColumns = kProductColumns;  // channels of a piece
constexpr int kDepth = kBoxColumns;        // of D, in a stage
constexpr int kStages = 3;

constexpr int kGroupBytes = kGroupRows * kOperandRowBytes;
constexpr int kWeightBytes = kColumns * kOperandRowBytes;
constexpr int kWeightsOfStage = kGroups * kGroupBytes;  // where Wv starts
constexpr int kStageBytes = kWeightsOfStage + kWeightBytes;

constexpr int kMultiplyWarps = kGroups * 4;
constexpr int kAggregateWarps = 6;
constexpr int kAggregateThreads = kAggregateWarps * kWarp;
constexpr int kThreads = (kMultiplyWarps + kAggregateWarps + 1) * kWarp;

// Lines of V are padded so that the eight rows of a fragment meet all banks.
constexpr int kLineStride = kColumns + 8;

struct alignas(16) Barriers {
  Barrier full[kStages], empty[kStages];  // a stage was filled; was read
  Barrier tile_full, tile_empty;          // the lines of the tile were written; may be
  Barrier aggregated;                     // no warp reads the history any more
};

constexpr size_t shared_bytes(int width) {
  return kOperandAlignment + kStages * kStageBytes + sizeof(Barriers) +
         size_t{2} * (1 + history(width) + kTileRows) * kLineStride;
}

constexpr size_t kMostShared = 227 << 10;  // of a block on compute capability 9.0

// The history must also fit into one tile, out of which it is copied.
constexpr int widest_image() {
  int width = 1;
  while (shared_bytes(width + 1) <= kMostShared && history(width + 1) <= kTileRows) ++width;
  return width;
}
static_assert(widest_image() == 95, "dw_attention_sm90.h states it");

// What a block is given besides the parameters of the operator.
struct Work {
  DwPlan plan;
  unsigned pieces;
};

DWATTN_DEVICE int groups_of(int rows) { return min((rows + kGroupRows - 1) / kGroupRows, kGroups); }

// Runs visit(window) for every piece of this block, in the same order for every role.
template <class Visit>
DWATTN_DEVICE void for_each_piece(const DwAttentionParams& p, const Work& work, Visit&& visit) {
  for (unsigned piece = blockIdx.x; piece < work.pieces; piece += gridDim.x) {
    visit(Window(p, work.plan, piece, kColumns));
  }
}

// A position in the ring of stages. `parity` is that of the barriers' phases in this round.
struct Ring {
  int stage = 0;
  unsigned parity = 0;

  DWATTN_DEVICE void next() {
    if (++stage < kStages) return;
    stage = 0;
    parity ^= 1;
  }
};

struct Shared {
  unsigned char* stages;
  Barriers* barriers;
  unsigned char* lines;

  DWATTN_DEVICE explicit Shared(unsigned char* shared) {
    // Operands repeat after 1024 bytes of the shared window, wherever dynamic memory begins in it.
    stages = shared + (0u - shared_address(shared)) % kOperandAlignment;
    barriers = reinterpret_cast<Barriers*>(stages + kStages * kStageBytes);
    lines = reinterpret_cast<unsigned char*>(barriers + 1);
  }
};

// The same in all lanes, also in the eyes of the compiler, which otherwise gives up on asynchronous
// products.
DWATTN_DEVICE int warp_index() {
  return __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / kWarp, 0);
}

DWATTN_DEVICE int depth_steps(const DwAttentionParams& p) {
  return (static_cast<int>(p.dim) + kDepth - 1) / kDepth;
}

// ---- Load

DWATTN_DEVICE void load(const DwAttentionParams& p, const Work& work, const TensorMap& x,
                        const TensorMap& wv, const Shared& shared) {
  const int steps = depth_steps(p);
  Ring ring;
  for_each_piece(p, work, [&](const Window& window) {
    const int tokens = window.tokens(), image = static_cast<int>(window.image);
    const int first = static_cast<int>(p.num_prefix + window.patch(p, 0, 0));
    for (int tile = 0; tile < tokens; tile += kTileRows) {
      const int groups = groups_of(tokens - tile);
      for (int step = 0; step < steps; ++step, ring.next()) {
        unsigned char* const stage = shared.stages + ring.stage * kStageBytes;
        Barrier& full = shared.barriers->full[ring.stage];
        shared.barriers->empty[ring.stage].wait(ring.parity ^ 1);
        full.arrive_expecting(groups * kGroupBytes + kWeightBytes);
        copy_box(stage + kWeightsOfStage, wv, full, step * kDepth, static_cast<int>(window.channel),
                 0);
        for (int group = 0; group < groups; ++group) {
          copy_box(stage + group * kGroupBytes, x, full, step * kDepth,
                   first + tile + group * kGroupRows, image);
        }
      }
    }
  });
}

// ---- Multiply

// The bias of the columns that a warp's fragments hold: a lane keeps 4 of them and others fetch.
struct WarpBias {
  float v[4];

  // Lane l keeps columns 8 (l / 4) + 2 (l % 4) and the next, and those 64 further.
  DWATTN_DEVICE void load(const DwAttentionParams& p, int64_t channel) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int64_t c = channel + e / 2 * 64 + lane * 2 + e % 2;
      v[e] = p.bv != nullptr && c < p.channels ? p.bv[c] : 0.0f;
    }
  }

  // Of this lane's pair in the j-th eight columns.
  DWATTN_DEVICE float2 of(int j) const {
    const int source = j % 8 * 4 + static_cast<int>(threadIdx.x) % 4;
    return make_float2(__shfl_sync(0xffffffffu, v[j / 8 * 2], source),
                       __shfl_sync(0xffffffffu, v[j / 8 * 2 + 1], source));
  }
};

// The products of one stage: 64 of D in steps of 16, which are 32 bytes apart in a row.
template <class T>
DWATTN_DEVICE void multiply_stage(float (&sums)[64], uint32_t x, uint32_t wv, bool first) {
  constexpr int kStepBytes = kProductDepth * static_cast<int>(sizeof(T));
  products_begin();
#pragma unroll
  for (int k = 0; k < kDepth / kProductDepth; ++k) {
    multiply_64x128<T>(sums, operand(x + k * kStepBytes), operand(wv + k * kStepBytes),
                       !first || k > 0);
  }
  products_commit();
}

// A warp of the role.
template <class T>
class Multiplier {
 public:
  DWATTN_DEVICE Multiplier(const DwAttentionParams& p, const Shared& shared)
      : p_(p),
        shared_(shared),
        steps_(depth_steps(p)),
        lane_(threadIdx.x % kWarp),
        group_row_(warp_index() / 4 * kGroupRows),
        row_(group_row_ + warp_index() % 4 * 16 + lane_ / 4) {}

  DWATTN_DEVICE void operator()(const Window& window) {
    WarpBias bias;
    bias.load(p_, window.channel);
    const Lines<T, kLineStride> lines{reinterpret_cast<T*>(shared_.lines), history(window.width)};
    T* const to = lines.at(lines.history + row_) + lane_ % 4 * 2;
    const int tokens = window.tokens();
    for (int tile = 0; tile < tokens; tile += kTileRows) {
      // Apart from each other: the compiler has to see that sums are only touched after the wait.
      if (group_row_ < tokens - tile) {
        float sums[64];
        make_tile(sums);
        wait_for_lines();
        put_tile(sums, bias, to);
      } else {
        for (int step = 0; step < steps_; ++step, ring_.next()) {
          shared_.barriers->full[ring_.stage].wait(ring_.parity);
          release(ring_.stage);
        }
        wait_for_lines();
      }
      __syncwarp();
      if (lane_ == 0) shared_.barriers->tile_full.arrive();
    }
  }

 private:
  DWATTN_DEVICE void release(int stage) {
    if (lane_ == 0) shared_.barriers->empty[stage].arrive();
  }

  // Also where this warp writes nothing: no warp may be a tile ahead of the others.
  DWATTN_DEVICE void wait_for_lines() {
    shared_.barriers->tile_empty.wait(tile_parity_);
    tile_parity_ ^= 1;
  }

  DWATTN_DEVICE void make_tile(float (&sums)[64]) {
    const uint32_t stages = shared_address(shared_.stages);
    int previous = 0;
    for (int step = 0; step < steps_; ++step, ring_.next()) {
      shared_.barriers->full[ring_.stage].wait(ring_.parity);
      const uint32_t stage = stages + ring_.stage * kStageBytes;
      multiply_stage<T>(sums, stage + group_row_ * kOperandRowBytes, stage + kWeightsOfStage,
                        step == 0);
      products_wait<1>();
      if (step > 0) release(previous);
      previous = ring_.stage;
    }
    products_end(sums);
    release(previous);
  }

  static DWATTN_DEVICE void put_tile(const float (&sums)[64], const WarpBias& bias, T* upper) {
    T* const lower = upper + 8 * kLineStride;
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
      const float2 b = bias.of(j);
      store_whole_pair(upper + 8 * j, add2(make_float2(sums[4 * j], sums[4 * j + 1]), b));
      store_whole_pair(lower + 8 * j, add2(make_float2(sums[4 * j + 2], sums[4 * j + 3]), b));
    }
  }

  const DwAttentionParams& p_;
  const Shared& shared_;
  const int steps_, lane_;
  const int group_row_, row_;  // in a tile: of the warpgroup's first row, of this lane's upper row
  Ring ring_;
  unsigned tile_parity_ = 0;
};

// ---- Aggregate

DWATTN_DEVICE PairCoefficients load_coefficients(const DwAttentionParams& p, const float* ctx,
                                                 const Window& window, int pair) {
  PairCoefficients k;
  float* const values = reinterpret_cast<float*>(&k);  // ten pairs, one for each of two channels
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int64_t channel = window.channel + pair + e;
    const bool exists = channel < p.channels;
#pragma unroll
    for (int tap = 0; tap < 9; ++tap) {
      values[2 * tap + e] = exists ? p.kernel[channel * 9 + tap] : 0.0f;
    }
    values[18 + e] = exists && ctx != nullptr ? ctx[window.image * p.channels + channel] : 0.0f;
  }
  return k;
}

// Two halves of the channels, and for each of them three runs of tokens.
template <class T>
DWATTN_DEVICE void aggregate_pieces(const DwAttentionParams& p, const Work& work, const float* ctx,
                                    const Shared& shared) {
  constexpr int kHalves = kColumns / kSlice, kRuns = kAggregateWarps / kHalves;
  const int thread = static_cast<int>(threadIdx.x) - kMultiplyWarps * kWarp;
  const int warp = thread / kWarp, lane = thread % kWarp;
  const int pair = warp % kHalves * kSlice + lane * 2, run = warp / kHalves;
  Barriers& barriers = *shared.barriers;
  unsigned parity = 0;
  for_each_piece(p, work, [&](const Window& window) {
    const Lines<T, kLineStride> lines{reinterpret_cast<T*>(shared.lines), history(window.width)};
    const PairCoefficients k = load_coefficients(p, ctx, window, pair);
    const int tokens = window.tokens(), end_output = window.end_row * window.width;
    int written = window.first_row * window.width;  // outputs before this token are done
    for (int tile = 0; tile < tokens; tile += kTileRows, parity ^= 1) {
      // The history of this tile, which the last one's readers have left.
      if (tile == 0) {
        lines.clear(thread, kAggregateThreads);
      } else {
        lines.advance(kTileRows, thread, kAggregateThreads);
      }
      __syncwarp();
      if (lane == 0) barriers.tile_empty.arrive();
      barriers.tile_full.wait(parity);
      const int complete =
          tile + kTileRows >= tokens ? tokens : tile + kTileRows - window.width - 1;
      const int end = min(complete, end_output), share = (end - written + kRuns - 1) / kRuns;
      if (end > written) {
        const int begin = written + run * share;
        aggregate<T, true>(p, window, lines, k, pair, tile, begin, min(begin + share, end));
        written = end;
      }
      __syncwarp();
      if (lane == 0) barriers.aggregated.arrive();
      barriers.aggregated.wait(parity);
    }
  });
}

}  // namespace dwattn::cuda::hopper
