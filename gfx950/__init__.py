"""Executes code objects for AMD's gfx950 and gfx942 on a CPU and finds hazards in them."""
