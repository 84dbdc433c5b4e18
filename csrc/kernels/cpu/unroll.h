// DWATTN_UNROLL stands before a loop of constant length over an array of vectors. GCC then unrolls
// it before it decides what lives in registers. Left to itself it writes such arrays to the stack
// around the loops between them, which took 6 % of a product 64 numbers deep.
#pragma once

#if defined(__GNUC__) && !defined(__clang__)
#define DWATTN_UNROLL _Pragma("GCC unroll 16")
#else
#define DWATTN_UNROLL
#endif
