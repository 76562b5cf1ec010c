"""Small Triton kernels of kinds that the package does not have, or that are wrong on purpose."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def product(
    a, b, c, M, N, K, ak, bk, bn, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """c [M, N] = a [M, K] · b, whose element (k, n) lies at k · bk + n · bn."""
    m, n = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    a_at, b_at = a + m[:, None] * K + k[None, :] * ak, b + k[:, None] * bk + n[None, :] * bn
    total = tl.zeros([BM, BN], tl.float32)
    for _ in range(0, K, BK):
        total = tl.dot(tl.load(a_at), tl.load(b_at), total)
        a_at += BK * ak
        b_at += BK * bk
    tl.store(c + m[:, None] * N + n[None, :], total.to(c.dtype.element_ty))


@triton.jit
def scaled_product(
    a, a_scale, b, b_scale, c, N, K,
    A: tl.constexpr, B: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """c [M, N] = a [M, K] · b [N, K]ᵀ of formats A and B, with e8m0 scales of 32 elements."""
    packed_a: tl.constexpr = 2 if A == "e2m1" else 1
    packed_b: tl.constexpr = 2 if B == "e2m1" else 1
    m, n = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    scale = tl.arange(0, BK // 32)
    a_at = a + m[:, None] * (K // packed_a) + tl.arange(0, BK // packed_a)[None, :]
    b_at = b + tl.arange(0, BK // packed_b)[:, None] + n[None, :] * (K // packed_b)
    sa_at = a_scale + m[:, None] * (K // 32) + scale[None, :]
    sb_at = b_scale + n[:, None] * (K // 32) + scale[None, :]
    total = tl.zeros([BM, BN], tl.float32)
    for _ in range(0, K, BK):
        total = tl.dot_scaled(
            tl.load(a_at), tl.load(sa_at), A, tl.load(b_at), tl.load(sb_at), B, total
        )
        a_at += BK // packed_a
        b_at += BK // packed_b
        sa_at += BK // 32
        sb_at += BK // 32
    tl.store(c + m[:, None] * N + n[None, :], total)


@triton.jit
def count(x, index, counts, sums, top, lock, n, B: tl.constexpr):
    """Atomics of every kind, and a lock that waves spin on."""
    i = tl.program_id(0) * B + tl.arange(0, B)
    mask = i < n
    at = tl.load(index + i, mask=mask, other=0)
    tl.atomic_add(counts + at, 1, mask=mask)
    tl.atomic_add(sums + at, tl.load(x + i, mask=mask, other=0.0), mask=mask)
    tl.atomic_max(top + at, i, mask=mask, sem="acq_rel")
    while tl.atomic_cas(lock, 0, 1) == 1:
        pass
    tl.store(counts, tl.load(counts) + 1)
    tl.atomic_xchg(lock, 0)


@triton.jit
def sort(x, largest, C: tl.constexpr, K: tl.constexpr):
    row = tl.program_id(0)
    values = tl.load(x + row * C + tl.arange(0, C))
    tl.store(largest + row * K + tl.arange(0, K), tl.topk(values, K))
    tl.store(x + row * C + tl.arange(0, C), tl.sort(values))


@triton.jit
def scan(x, y, histogram, n, d, B: tl.constexpr):
    i = tl.arange(0, B)
    values = tl.load(x + i)
    tl.store(y + i, tl.cumsum(values, 0))
    tl.store(histogram + tl.arange(0, 64), tl.histogram(values // d, 64) + n % d)


@triton.jit
def functions(x, y, B: tl.constexpr):
    i = tl.arange(0, B)
    v = tl.load(x + i)
    y += tl.program_id(0) * 0
    tl.store(y + i, tl.sin(v) + tl.exp(v) + tl.log(v) + tl.rsqrt(v) + tl.div_rn(v, 3.7) + tl.erf(v))


@triton.jit
def grid(y):
    """Each program's number in a grid of three dimensions."""
    x = tl.program_id(0) + tl.num_programs(0) * (
        tl.program_id(1) + tl.num_programs(1) * tl.program_id(2)
    )
    tl.store(y + x, x)


@triton.jit
def unmasked(x, y, B: tl.constexpr):
    """Reads past the end of x."""
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(y + i, tl.load(x + i))


@triton.jit
def meet(y, B: tl.constexpr):
    """All programs write the same places."""
    tl.store(y + tl.arange(0, B), tl.arange(0, B) + tl.program_id(0))


@triton.jit
def last_sums(parts, arrived, y, P: tl.constexpr):
    """The last of P programs adds what all have written; the counter of arrivals orders them."""
    program = tl.program_id(0)
    tl.store(parts + program, (program + 1).to(tl.float32))
    if tl.atomic_add(arrived, 1, sem="acq_rel") == P - 1:
        tl.store(y, tl.sum(tl.load(parts + tl.arange(0, P))))


@triton.jit
def hasty_sums(parts, arrived, y, P: tl.constexpr):
    """The same, but the first adds, and nothing says that the others have written."""
    program = tl.program_id(0)
    tl.store(parts + program, (program + 1).to(tl.float32))
    if program == P - 1:
        tl.store(y, tl.sum(tl.load(parts + tl.arange(0, P))))
