"""Launches of sample_greedy."""

import torch
from registry import Case

from dsv4_plugin.kernels.triton.sample_greedy import sample_greedy

CASES = [
    Case(
        "64-rows/129280",
        lambda: sample_greedy(torch.empty(64, 129280, device="meta")),
        workgroups={"best_of_stretch_kernel": 2},
    )
]
