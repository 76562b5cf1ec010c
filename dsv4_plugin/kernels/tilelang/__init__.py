"""Kernels in TileLang (pip install tilelang==0.1.12); `build` compiles and launches them."""
