"""Weights of experts in every form, and experts computed with the roundings that kernels make."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dsv4_plugin.formats import (
    dequantize_weight,
    quantize_weight_fp4,
    quantize_weight_fp8,
    round_to_fp8,
    ue8m0_to_float,
)

FORMS = ("fp4", "fp8", "fp8, fp32 scales", "bf16")
LIMIT = 10.0
TWO_CODES = 6e-3
"""Sums in another order put a hidden value of a row on the next e4m3 now and then: 2^-4 of one of
some hundred terms, of which a few may be large; on the next bf16 more often, which is less."""


def stack(experts: int, outputs: int, inputs: int, form: str) -> tuple[Tensor, Tensor | None]:
    """Random weights [experts, outputs, inputs] as released, or dense bf16, and their scales."""
    dense = torch.randn(experts, outputs, inputs) * inputs**-0.5
    dense *= 2.0 ** torch.randint(-1, 2, (experts, 1, 1))
    if form == "bf16":
        return dense.bfloat16(), None
    quantize = quantize_weight_fp4 if form == "fp4" else quantize_weight_fp8
    pairs = [quantize(matrix) for matrix in dense]
    scale = torch.stack([scale.view(torch.uint8) for _, scale in pairs])
    scale = scale.view(torch.float8_e8m0fnu)
    if "fp32" in form:
        scale = ue8m0_to_float(scale) * 1.3
    return torch.stack([weight for weight, _ in pairs]), scale


def matrices(experts: int, inner: int, hidden: int, form: str) -> list[Tensor | None]:
    """w1, its scale, w2, w3 alike, as the operators take them."""
    shapes = (inner, hidden), (hidden, inner), (inner, hidden)
    return [part for shape in shapes for part in stack(experts, *shape, form)]


def any_matrix(
    experts: int, outputs: int, inputs: int, form: str, device: str
) -> list[Tensor | None]:
    """Random codes, made on the device, that mean weights near 1/sqrt(inputs), and their scales."""
    middle = 127 - (inputs.bit_length() - 1) // 2
    if form == "bf16":
        return [
            torch.randn(experts, outputs, inputs, device=device).bfloat16() * inputs**-0.5,
            None,
        ]
    if form == "fp4":
        shape = (experts, outputs, inputs // 2)
        codes = torch.randint(-128, 128, shape, dtype=torch.int8, device=device)
        shape, below = (experts, outputs, inputs // 32), 2
    else:
        codes = torch.randn(experts, outputs, inputs, device=device).mul_(32)
        codes = codes.to(torch.float8_e4m3fn)
        shape, below = (experts, -(-outputs // 128), -(-inputs // 128)), 5
    scale = torch.randint(middle - below - 1, middle - below + 2, shape, device=device)
    scale = scale.to(torch.uint8).view(torch.float8_e8m0fnu)
    return [codes, ue8m0_to_float(scale) * 1.3 if "fp32" in form else scale]


def one(parts: list[Tensor | None], expert: int) -> list[Tensor | None]:
    """The matrices of one expert."""
    return [None if part is None else part[expert] for part in parts]


def decoded(parts: list[Tensor | None], expert: int) -> list[Tensor]:
    """fp32 w1, w2, w3 of one expert."""
    w1, s1, w2, s2, w3, s3 = one(parts, expert)
    return [
        w.float() if s is None else dequantize_weight(w, s)
        for w, s in ((w1, s1), (w2, s2), (w3, s3))
    ]


def expert(
    x: Tensor, weight: Tensor | float, w1: Tensor, w2: Tensor, w3: Tensor, rounded: bool
) -> Tensor:
    """fp32 [n, d] of rows `x` bf16 through one expert, hidden values rounded to bf16 and, with
    inputs, to e4m3 in blocks of 128 if `rounded`."""
    x = (round_to_fp8(x, 128) if rounded else x).float()
    gate, up = (x @ w1.T).clamp(max=LIMIT), (x @ w3.T).clamp(-LIMIT, LIMIT)
    hidden = (F.silu(gate) * up * weight).bfloat16()
    if rounded:
        whole = F.pad(hidden, (0, -hidden.shape[1] % 128))
        hidden = round_to_fp8(whole, 128)[:, : hidden.shape[1]]
    return hidden.float() @ w2.T


def row_error(got: Tensor, want: Tensor) -> float:
    """The largest |got - want| / |want| of a row."""
    return float(((got - want).norm(dim=-1) / want.norm(dim=-1).clamp_min(1e-30)).max())
