"""Launches of the hyper-connection operators."""

import torch
from registry import Case

from dsv4_plugin.kernels.triton import mhc


def _fp32(*shape: int):
    return torch.empty(*shape, device="meta")


def _bf16(*shape: int):
    return torch.empty(*shape, dtype=torch.bfloat16, device="meta")


def _site(dim: int, mixes: int = 24):
    return (
        _fp32(mixes, 4 * dim),
        _fp32(mixes),
        _fp32(3 if mixes == 24 else 1),
        _bf16(dim),
    )


def _between(rows: int, dim: int):
    mhc.mhc_post_pre(
        _bf16(rows, dim),
        _bf16(rows, 4, dim),
        _fp32(rows, 4),
        _fp32(rows, 4, 4),
        *_site(dim),
        20,
        1e-6,
        1e-6,
        True,
    )


def _post(rows: int, dim: int):
    mhc.mhc_post(_bf16(rows, dim), _bf16(rows, 4, dim), _fp32(rows, 4), _fp32(rows, 4, 4))


PRODUCT = {"mhc_project_kernel": "16-bit"}
CASES = [
    Case(
        "post-pre/pro/64-tokens",
        lambda: _between(64, 7168),
        matrix=PRODUCT,
        workgroups={"mhc_project_kernel": 2, "mhc_finish_kernel": 2},
    ),
    Case("post/pro/64-tokens", lambda: _post(64, 7168), workgroups={"mhc_post_kernel": 8}),
    Case(
        "head/pro/64-tokens",
        lambda: mhc.mhc_head(_bf16(64, 4, 7168), *_site(7168, 4), 1e-6, 1e-6),
        matrix=PRODUCT,
    ),
]
