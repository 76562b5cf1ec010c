"""Kernels, one family a file and one language a directory: no policy, no flags, no host."""
