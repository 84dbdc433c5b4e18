// Drawn cases beside the listed ones: a test program that is given a seed and a count draws that
// many. Case i of seed s is case 0 of seed s + i, which is what a failure prints.
#pragma once

#include "harness.h"

namespace harness {

inline int64_t pick(std::initializer_list<int64_t> values) {
  return values.begin()[generator()() % values.size()];
}
inline int64_t between(int64_t least, int64_t most) {
  return least + static_cast<int64_t>(generator()() % static_cast<uint32_t>(most - least + 1));
}
inline bool coin() { return generator()() % 2 == 0; }

struct Grid {
  int64_t height, width;
};

// Up to about `most` patches: one row, one column, primes, anything; H and W differ.
inline Grid drawn_grid(int64_t most) {
  const int64_t side = static_cast<int64_t>(std::sqrt(static_cast<double>(most)));
  switch (between(0, 3)) {
    case 0:
      return {1, between(1, most)};
    case 1:
      return {between(1, most), 1};
    case 2:
      return {pick({2, 3, 5, 7, 11}), pick({2, 3, 7, 13, 17})};
    default:
      return {between(1, side), between(1, side)};
  }
}

// Sizes around those of vectors, warps' slices and tiles.
inline int64_t drawn_size(int64_t most) {
  const int64_t size = pick({1,  2,  7,  8,  15,  16,  24,  31,  32,  33,  40,  63, 64,
                             65, 72, 80, 96, 127, 128, 129, 130, 136, 192, 200, 257});
  return size <= most ? size : between(1, most);
}

// Packed, or with gaps; rows aligned to 16 bytes, to 8 or 4 only, or to the element.
inline Layout drawn_layout() {
  const Layout layouts[] = {{},        {16, 64, 8}, {3, 5, 1}, {4, 4, 4}, {2, 2, 2}, {8, 8, 0},
                            {0, 0, 1}, {1, 0, 0},   {0, 4, 0}, {0, 0, 4}, {24, 1, 8}};
  return layouts[between(0, static_cast<int64_t>(std::size(layouts)) - 1)];
}

inline int drawn_multiprocessors() { return static_cast<int>(pick({1, 2, 4, 16, 132})); }

// Calls `check(which)` on `count` cases from `seed` on; `which` counts up, so that types take
// turns.
template <class Check>
int run_drawn(char** arguments, const Check& check) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  const auto seed = static_cast<uint32_t>(std::strtoul(arguments[1], nullptr, 10));
  const int count = std::atoi(arguments[2]);
  for (int i = 0; i < count; ++i) {
    const uint32_t own = seed + static_cast<uint32_t>(i);
    generator().seed(own);
    simt::machine.random.seed(own);
    simt::machine.order = simt::kOrders[own % 3];
    const int before = failures;
    check(own / 3);
    if (failures > before) std::printf("  which is %" PRIu32 " 1\n", own);
  }
  std::printf("%d case(s), %d failure(s)\n", count, failures);
  return failures == 0 ? 0 : 1;
}

// `check` for the element type of turn `which`.
template <class Check>
void check_typed(uint32_t which, const Check& check) {
  switch (which % 4) {
    case 0:
      return check(__half{});
    case 1:
      return check(float{});
    case 2:
      return check(__nv_bfloat16{});
    default:
      return check(dwattn::cuda::Tf32{});
  }
}

}  // namespace harness
