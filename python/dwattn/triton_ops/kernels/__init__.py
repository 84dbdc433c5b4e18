"""The kernels alone: no torch, no launch parameters. Importing this needs Triton.

All of them take any strides, in elements. Where a stride is 1 or divisible by 16 Triton compiles a
version that uses it (16-byte accesses), otherwise one that is merely correct. Sums are fp32.
"""
