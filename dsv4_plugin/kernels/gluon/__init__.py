"""Kernels in Gluon, Triton's language with explicit layouts, for one architecture each."""
