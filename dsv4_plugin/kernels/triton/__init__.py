"""Kernels in Triton, for every architecture it compiles for, and for the CPU under
TRITON_INTERPRET=1."""

from . import cache_key

cache_key.settle()
