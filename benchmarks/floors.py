"""What each operator must move and multiply, and what our kernels issue by construction.

A floor counts each input byte once and each output byte once, whatever shares it, and the
multiply-adds of matrix products as two operations each. Index lists of a few bytes a slot are not
in a floor, parameters are where they are more than a thousandth. Issued bytes are all that the
kernels load and store, those that caches answer included. Latency, launches and everything that is
not a byte or a product is left out: a floor is what no implementation of the operator can go below.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsv4_plugin.cache.layout import (
    INDEX_DIM,
    LATENT_DATA_BYTES,
    LATENT_DIM,
    LATENT_SCALE_BYTES,
    ROPE_DIM,
)

LATENT_BYTES = LATENT_DATA_BYTES + LATENT_SCALE_BYTES
"""Of a latent slot as it is read: 584."""
LATENT_WRITTEN = LATENT_BYTES - 1
"""Of a latent slot as it is written: the last scale byte is padding."""
INDEX_BYTES = INDEX_DIM + 4
_BF16, _FP32, _INT64 = 2, 4, 8
_ROTATION = ROPE_DIM * _FP32
"""cos and sin of a token: 32 pairs of fp32."""


@dataclass(frozen=True)
class Floor:
    """The least an operator's call can do."""

    bytes: int
    operations: int = 0
    """Of matrix products; 0 for an operator without any, which is bound by memory."""
    products: str = "bf16"
    """What the products multiply, "bf16" or "fp8": which peak bounds them."""

    def seconds(self, copy: float, peak: float) -> float:
        """Least time at `copy` bytes/s and `peak` operations/s."""
        return max(self.bytes / copy, self.operations / peak)

    def bound(self, copy: float, peak: float) -> str:
        """ "memory" or "products": which of the two takes longer."""
        return "memory" if self.bytes / copy >= self.operations / peak else "products"


def sparse_mla(tokens: int, heads: int, slots: int, distinct: int) -> Floor:
    """`slots` over all tokens, of which `distinct` are different: those are read once, all are
    multiplied.

    Query and output are 1024 bytes a head each, cos and sin are read to rotate the output back; a
    slot takes part in two products of 512 for every head.
    """
    return Floor(
        distinct * LATENT_BYTES + tokens * (heads * 2 * LATENT_DIM * _BF16 + _ROTATION),
        slots * heads * 2 * 2 * LATENT_DIM,
    )


def indexer_logits(tokens: int, heads: int, logits: int, entries: int) -> Floor:
    """`logits` that rows see, over `entries` visible in the cache: a prefill's rows share the
    entries of their request.

    A row has 128 bytes of query and 4 of weight for each head; a logit is 128 multiply-adds a head.
    """
    return Floor(
        entries * INDEX_BYTES + logits * _FP32 + tokens * heads * (INDEX_DIM + _FP32),
        logits * heads * 2 * INDEX_DIM,
        "fp8",
    )


def topk_select(tokens: int, visible: int, topk: int) -> Floor:
    """`visible` logits over all rows are read, `topk` numbers of 8 bytes a row written."""
    return Floor(visible * _FP32 + tokens * topk * _INT64)


def compress(windows: int, kept: int, ratio: int, dim: int) -> Floor:
    """`windows` completed and `kept` rows copied to the ring.

    An item of a window is a value and a score for each channel, fp32; ratio 4 pools 8 items, ratio
    128 as many as that. The position's share of the scores (`ape`) is read once a call. A kept row
    of all its columns is read and written.
    """
    items, columns = window_items(ratio), 2 * window_items(ratio) // ratio * dim
    entry = INDEX_BYTES if dim == INDEX_DIM else LATENT_WRITTEN
    ape = ratio * columns // 2 * _FP32 if windows else 0
    return Floor(
        windows * (items * 2 * dim * _FP32 + entry + _ROTATION) + ape + kept * 2 * columns * _FP32
    )


def qk_norm_rope_store(tokens: int, heads: int) -> Floor:
    """Queries read and written in bf16, a latent read in bf16 and its slot written, cos and sin."""
    return Floor(
        tokens * (heads * 2 * LATENT_DIM * _BF16 + LATENT_DIM * _BF16 + LATENT_WRITTEN + _ROTATION)
    )


def rope_hadamard_quant(tokens: int, heads: int) -> Floor:
    """Queries read in bf16 and written in FP8, weights read and written in fp32, cos and sin."""
    return Floor(tokens * (heads * (INDEX_DIM * (_BF16 + 1) + 2 * _FP32) + _ROTATION))


def build_step_plan(tokens: int, pages: int, windows: dict[int, int]) -> Floor:
    """`pages` of all requests' page tables, static `windows` by ratio.

    A row reads 128 slots (4 bytes) and their window slots (8) and writes 128 (8); its position,
    request and slot are read, its query, window slot and two ring rows written. A page is a slot
    read and a number written. A window writes three numbers and two for each of its items.
    """
    rows = tokens * (128 * (4 + 8 + 8) + 7 * _INT64)
    numbers = sum(count * (3 + 2 * window_items(ratio)) for ratio, count in windows.items())
    return Floor(rows + pages * (4 + _INT64) + numbers * _INT64)


def route(tokens: int, experts: int, hidden: int, topk: int) -> Floor:
    """The gate once, rows read, a weight and a number written for each choice."""
    return Floor(
        experts * hidden * _BF16 + tokens * (hidden * _BF16 + topk * (_FP32 + _INT64)),
        2 * tokens * experts * hidden,
    )


def moe(tokens: int, pairs: int, touched: int, hidden: int, inner: int) -> Floor:
    """The three FP4 matrices of each of the `touched` experts once, a scale a 32 inputs; rows read
    in bf16 and sums written in fp32; `pairs` of a row and an expert held here are multiplied."""
    return Floor(
        touched * 3 * fp4_bytes(hidden * inner) + tokens * hidden * (_BF16 + _FP32),
        pairs * 3 * 2 * hidden * inner,
        "fp8",
    )


def shared_expert(tokens: int, hidden: int, inner: int) -> Floor:
    """The three FP8 matrices once, rows read in bf16 and sums written in fp32."""
    return Floor(
        3 * hidden * inner + tokens * hidden * (_BF16 + _FP32),
        tokens * 3 * 2 * hidden * inner,
        "fp8",
    )


def fp4_bytes(values: int) -> int:
    """Of `values` in FP4 with a scale of a byte for 32 of them."""
    return values * 17 // 32


def mhc(tokens: int, dim: int, mixes: int, enters: bool, leaves: bool) -> Floor:
    """Hyper-connections of four bf16 streams around one sub-layer of `mixes` coefficients.

    The streams are read once. Leaving a sub-layer reads its output and its coefficients (20, fp32)
    and writes the streams; entering the next (or the head, 4 mixes) multiplies them by `fn`, which
    is read once a call, and writes a row, before a sub-layer also its FP8 and 20 coefficients.
    """
    row, fn = 4 * dim * _BF16, 0
    if leaves:
        row += dim * _BF16 + 20 * _FP32 + 4 * dim * _BF16
    if enters:
        row, fn = row + dim * _BF16, mixes * 4 * dim * _FP32
        if mixes > 4:
            row += fp8_bytes(dim) + 20 * _FP32
    return Floor(tokens * row + fn, tokens * 2 * mixes * 4 * dim if enters else 0)


def fp8_bytes(channels: int) -> int:
    """A row of e4m3 with an fp32 scale for each 128 channels."""
    return channels + channels // 128 * _FP32


def rms_norm_quant(tokens: int, channels: int) -> Floor:
    """A row read in bf16, written in bf16 and FP8."""
    return Floor(tokens * (channels * 2 * _BF16 + fp8_bytes(channels)))


def product(
    tokens: int, outputs: int, inputs: int, groups: int = 1, fp8: bool = True, out: int = 2
) -> Floor:
    """The weight [outputs, inputs] once, `groups` times `inputs` channels of each row, results of
    `out` bytes (with 1 their scales too). bf16 where it is not FP8."""
    weight = outputs * inputs + (outputs // 128) * (inputs // 128) if fp8 else outputs * inputs * 2
    row = fp8_bytes(groups * inputs) if fp8 else groups * inputs * _BF16
    row += fp8_bytes(outputs) if out == 1 else outputs * out
    return Floor(weight + tokens * row, tokens * 2 * outputs * inputs, "fp8" if fp8 else "bf16")


def sample_greedy(tokens: int, vocab: int) -> Floor:
    """Logits of 4 bytes read, ids of 8 written."""
    return Floor(tokens * (vocab * _FP32 + _INT64))


def window_items(ratio: int) -> int:
    """Items of a compression window: ratio 4 overlaps the window before it."""
    return 8 if ratio == 4 else ratio


def sparse_mla_issued(tokens: int, heads: int, slots: int, head_block: int, splits: int) -> int:
    """Bytes of `slots` a token for every block of `head_block` heads, its list of slots, and split
    parts written and read.

    cos and sin are read for every block, or for every head where parts are combined.
    """
    blocks = -(-heads // head_block)
    rotations = heads if splits > 1 else blocks
    parts = 2 * splits * heads * (LATENT_DIM + 1) * _FP32 if splits > 1 else 0
    return tokens * (
        blocks * slots * (LATENT_BYTES + _INT64)
        + heads * 2 * LATENT_DIM * _BF16
        + parts
        + rotations * _ROTATION
    )


def topk_select_issued(visible: int, topk: int, chunk: int) -> int:
    """Bytes of one row: every selection but the last keeps `topk` values and numbers of each
    `chunk`; the next reads the values, and the numbers of what it keeps."""
    issued, length, number = 0, visible, 0
    while length > chunk:
        before = (length - 1) // chunk
        kept = before * topk + min(length - before * chunk, topk)
        issued += length * _FP32 + kept * (number + 2 * _FP32)
        length, number = kept, _FP32
    return issued + length * _FP32 + min(length, topk) * number + topk * _INT64


def compress_issued(windows: int, kept: int, tokens: int, ratio: int, dim: int, stripe: int) -> int:
    """Bytes of a call whose windows are pooled by dim / `stripe` programs each.

    Each program reads the position and the two row numbers of every item; `ape` is read for every
    item of every window; a window that several programs pool is handed over through memory. Every
    row's ring row is looked at.
    """
    items, columns, programs = (
        window_items(ratio),
        2 * window_items(ratio) // ratio * dim,
        dim // stripe,
    )
    entry = INDEX_BYTES if dim == INDEX_DIM else LATENT_WRITTEN
    pooled = programs * (_INT64 + items * 2 * _INT64) + items * 3 * dim * _FP32
    handed = 2 * dim * _FP32 + _INT64 if programs > 1 else 0
    finished = dim * _BF16 + _ROTATION + _INT64 + entry
    return windows * (pooled + handed + finished) + tokens * _INT64 + kept * 2 * columns * _FP32


def moe_issued(
    counts: list[int],
    tokens: int,
    hidden: int,
    inner: int,
    rows: int,
    gate_up_columns: int,
    down_columns: int,
) -> int:
    """Bytes of a call whose experts have `counts` pairs each, in blocks of `rows`.

    Every expert's program reads all choices. Every block reads its expert's matrices, and for each
    program along their columns its real rows: inputs in FP8 with a scale byte for 32, hidden values
    in bf16 where a program has less than 128 of them, else in FP8.
    """
    pairs, blocks = sum(counts), sum(-(-count // rows) for count in counts)
    whole = gate_up_columns % 128 == 0
    grouped = (len(counts) + 1) * pairs * _INT64 * 2 + blocks * (rows + 1) * 4
    rounded = tokens * (hidden * _BF16 + hidden + hidden // 128)
    hidden_row = inner + inner // 32 if whole else inner * _BF16
    first = blocks * 2 * fp4_bytes(hidden * inner) + pairs * (
        -(-inner // gate_up_columns) * (hidden + hidden // 32) + hidden_row
    )
    second = blocks * fp4_bytes(hidden * inner) + pairs * (
        -(-hidden // down_columns) * hidden_row + hidden * _BF16
    )
    summed = pairs * (hidden * _BF16 + _INT64) + tokens * hidden * _FP32
    return grouped + rounded + first + second + summed
