// The part of Hopper that csrc/kernels/cuda/device_sm90.cuh uses, for the machine in
// simt_machine.h: barriers in shared memory, tensor copies and products of warpgroups, written from
// the PTX manual and independent of what the kernels assume about layouts.
//   - a tensor copy makes its destination NaN at once and lands when nothing else can run (in the
//     shuffled order also earlier); the oldest first, the newest first, or any;
//   - products read their operands, and give back their sums, only at the wait that ends them;
//     until then the sums are NaN. So an operand that is overwritten too early shows;
//   - each warp of a warpgroup goes its own way, as far as its barriers let it.
// What it cannot show: the order of the generic and the asynchronous proxy, and time.
#pragma once

#include <array>

#include "simt_host.h"

namespace simt {

// ---- Addresses in the shared window

// Not a multiple of the 1024 bytes that swizzling repeats after, so that alignment has to be made.
constexpr uint32_t kWindow = 3 * 128;

inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(p) - machine.shared) + kWindow;
}
inline unsigned char* at_shared_address(uint32_t address) {
  return machine.shared + (address - kWindow);
}
// The exchange of 16-byte chunks within 1024 bytes: bits 4..6 of the address with bits 7..9.
inline uint32_t exchanged_128(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

// ---- Barriers

inline Machine::Barrier& barrier_at(const void* state) {
  const auto found = machine.barriers.find(state);
  if (found == machine.barriers.end()) die("a barrier in shared memory was not initialised");
  return found->second;
}

inline void barrier_init(const void* state, int count) {
  if (reinterpret_cast<uintptr_t>(state) % 8) die("a barrier is not 8-byte aligned");
  if (count < 1 || !machine.barriers.emplace(state, Machine::Barrier{count, count, 0, 0}).second) {
    die("a barrier of no threads, or initialised twice");
  }
}

inline void end_phase_if_complete(const void* state) {
  Machine::Barrier& barrier = barrier_at(state);
  if (barrier.pending > 0 || barrier.bytes != 0) return;
  barrier.parity ^= 1;
  barrier.pending = barrier.count;
  for (Fiber& fiber : machine.fibers) {
    if (fiber.state == State::kAtSharedBarrier && fiber.waits_for == state) {
      fiber.state = State::kReady;
    }
  }
}

inline void barrier_arrive(const void* state, int bytes) {
  Machine::Barrier& barrier = barrier_at(state);
  if (barrier.pending < 1) die("more arrivals at a barrier than its phase has");
  barrier.bytes += bytes;
  --barrier.pending;
  end_phase_if_complete(state);
}

inline void barrier_wait(const void* state, unsigned parity) {
  // A thread that is two phases late would wait for ever; the scheduler reports that.
  while (barrier_at(state).parity == parity) {
    machine.current->waits_for = state;
    machine.current->state = State::kAtSharedBarrier;
    to_scheduler();
  }
}

// ---- Tensor copies

struct TensorMap {
  const unsigned char* data;
  std::array<int64_t, 3> sizes, box;
  std::array<int64_t, 2> strides;  // bytes
};

inline bool make_tensor_map(uint64_t (&words)[16], const void* data, std::array<int64_t, 3> sizes,
                            std::array<int64_t, 2> strides, std::array<int64_t, 3> box) {
  const TensorMap map{static_cast<const unsigned char*>(data), sizes, box, strides};
  static_assert(sizeof map <= sizeof words, "it must fit");
  bool allowed = reinterpret_cast<uintptr_t>(data) % 16 == 0 && 2 * box[0] == 128;
  for (int64_t stride : strides) {
    allowed = allowed && stride > 0 && stride % 16 == 0 && stride < int64_t{1} << 40;
  }
  for (int i = 0; i < 3; ++i) {
    allowed = allowed && sizes[i] >= 1 && sizes[i] <= int64_t{1} << 32 && box[i] >= 1;
    allowed = allowed && box[i] <= 256;
  }
  std::memcpy(words, &map, sizeof map);
  return allowed;
}

inline void copy_box(void* shared, const uint64_t (&words)[16], const void* full, int c0, int c1,
                     int c2) {
  TensorMap map;
  std::memcpy(&map, words, sizeof map);
  const uint32_t to = shared_address(shared);
  if (to % 128) die("a tensor copy to an address that is not 128-byte aligned");
  barrier_at(full);
  const int64_t row_bytes = 2 * map.box[0], rows = map.box[1] * map.box[2];
  for (int64_t i = 0; i < rows * row_bytes; ++i) *at_shared_address(to + i) = 0xFF;
  machine.tensor_copies.push_back([=] {
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t i1 = c1 + row % map.box[1], i2 = c2 + row / map.box[1];
      for (int64_t i = 0; i < map.box[0]; ++i) {
        const int64_t i0 = c0 + i;
        const bool inside = i0 >= 0 && i0 < map.sizes[0] && i1 >= 0 && i1 < map.sizes[1] &&
                            i2 >= 0 && i2 < map.sizes[2];
        uint16_t value = 0;
        if (inside) {
          std::memcpy(&value, map.data + 2 * i0 + i1 * map.strides[0] + i2 * map.strides[1], 2);
        }
        const uint32_t place = to + static_cast<uint32_t>(row * row_bytes + 2 * i);
        std::memcpy(at_shared_address(exchanged_128(place)), &value, 2);
      }
    }
    barrier_at(full).bytes -= static_cast<int>(rows * row_bytes);
    end_phase_if_complete(full);
  });
}

// ---- Products of warpgroups

constexpr int kProductSums = 64;

inline void products_begin() { machine.current->products_may_begin = true; }

template <class T>
float product_element(uint64_t descriptor, int row, int k) {
  const auto field = [&](int bit) {
    return static_cast<uint32_t>(descriptor >> bit & 0x3FFF) * 16;
  };
  if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) != 0) {
    die("a descriptor of an operand is not of the kind that is modelled");
  }
  // Steps in depth begin inside the first row; the base offset for other starts is not modelled.
  if (field(0) % 1024 >= 128) die("an operand does not start at a multiple of 1024 bytes");
  const uint32_t address = field(0) + row / 8 * field(32) + row % 8 * 128 + k * 2;
  T value;
  std::memcpy(&value, at_shared_address(exchanged_128(address)), 2);
  return static_cast<float>(value);
}

// The 16 rows of one warp: its sums += rows 16w... of a times the 128 rows of b.
template <class T>
void multiply_rows(Fiber* lanes, size_t index) {
  const Product& product = lanes[0].products[index];
  const int first = lanes[0].warp % 4 * 16;
  float a[16][16], b[128][16];
  for (int k = 0; k < 16; ++k) {
    for (int i = 0; i < 16; ++i) a[i][k] = product_element<T>(product.a, first + i, k);
    for (int j = 0; j < 128; ++j) b[j][k] = product_element<T>(product.b, j, k);
  }
  for (int l = 0; l < kLanes; ++l) {
    const Product& own = lanes[l].products[index];
    if (own.a != product.a || own.b != product.b || own.sums != lanes[l].products[0].sums) {
      die("lanes of a warp multiply different operands, or into different sums at a time");
    }
    for (int e = 0; e < kProductSums; ++e) {
      const int row = l / 4 + e / 2 % 2 * 8, column = e / 4 * 8 + l % 4 * 2 + e % 2;
      float sum = 0;
      for (int k = 0; k < 16; ++k) sum += a[row][k] * b[column][k];
      lanes[l].sums[e] = own.add ? lanes[l].sums[e] + sum : sum;
    }
  }
}

template <class T>
void multiply_async(float (&sums)[kProductSums], uint64_t a, uint64_t b, bool add) {
  Fiber& self = *machine.current;
  if (!self.products_may_begin) die("a product without wgmma.fence before it");
  if (self.products.empty()) {
    std::copy(sums, sums + kProductSums, self.sums);
    std::memset(sums, 0xFF, sizeof sums);
  }
  self.products.push_back({sums, a, b, add, &multiply_rows<T>});
}

inline void products_commit() {
  Fiber& self = *machine.current;
  size_t committed = 0;
  for (size_t size : self.product_groups) committed += size;
  self.product_groups.push_back(self.products.size() - committed);
}

// A warp collective, so that all lanes see their products end at the same place.
inline void products_wait(size_t in_flight) {
  Fiber& self = *machine.current;
  self.products_left = in_flight;
  together(Collective::kEndProducts, [](Warp::Slot*) {
    Fiber* const lanes = &machine.fibers[static_cast<size_t>(machine.current->warp) * kLanes];
    while (lanes[0].product_groups.size() > lanes[0].products_left) {
      for (int l = 1; l < kLanes; ++l) {
        if (lanes[l].product_groups != lanes[0].product_groups) {
          die("lanes of a warp have different products in flight");
        }
      }
      const size_t ending = lanes[0].product_groups.front();
      for (size_t i = 0; i < ending; ++i) lanes[0].products[i].multiply(lanes, i);
      for (int l = 0; l < kLanes; ++l) {
        Fiber& lane = lanes[l];
        float* const sums = ending > 0 ? lane.products[0].sums : nullptr;
        lane.products.erase(lane.products.begin(), lane.products.begin() + ending);
        lane.product_groups.erase(lane.product_groups.begin());
        if (!lane.products.empty() || sums == nullptr) continue;
        std::copy(lane.sums, lane.sums + kProductSums, sums);
        lane.products_may_begin = false;
      }
    }
  });
}

}  // namespace simt
