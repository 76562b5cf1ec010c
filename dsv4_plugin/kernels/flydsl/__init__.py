"""Kernels in FlyDSL, for gfx950: compiled when first launched, kept by FlyDSL's own cache."""
