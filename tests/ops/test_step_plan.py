"""Step plans against answers given token by token (docs/model.md §3.2, §3.3, §4)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4_plugin.cache.layout import entry_slots, request_ring_row, window_ring_row
from dsv4_plugin.cache.step_plan import (
    RING_ROWS,
    SPECULATION_RING_ROWS,
    shrinkable_rows,
    static_windows,
)
from dsv4_plugin.ops import build_step_plan
from dsv4_plugin.ops.operator import HERE, enter_step

from .tables import PAGE, Request, Tables

BORDERS = (
    0,
    1,
    2,
    3,
    4,
    5,
    7,
    8,
    124,
    126,
    127,
    128,
    129,
    131,
    132,
    251,
    252,
    253,
    255,
    256,
    257,
    259,
    260,
    383,
    384,
    511,
    512,
    516,
    640,
)
lengths = st.one_of(st.sampled_from(BORDERS), st.integers(0, 700))
RINGS = ({4: 8, 128: 128}, {4: 16, 128: 256})  # the second as the host sizes them for speculation


@st.composite
def batches(draw) -> list[Request]:
    requests: list[Request] = []
    for _ in range(draw(st.integers(0, 4))):
        prefix, new = draw(lengths), draw(lengths)
        common = min(prefix, requests[0].after) // PAGE if requests else 0
        requests.append(Request(prefix, new, draw(st.integers(0, common))))
    return requests


class Answers:
    """What the plan must hold, one value at a time."""

    def __init__(self, tables: Tables, rings: dict[int, int]):
        self.tables, self.rings, self.rows = tables, rings, tables.rows()
        self.row_of = {row: index for index, row in enumerate(self.rows)}

    def window(self) -> list[list[int]]:
        """The 128 positions up to the row's own; what was given back cannot be attended to."""
        return [
            [
                self.tables.window(request, p) or -1 if p >= 0 else -1
                for p in range(position - 127, position + 1)
            ]
            for request, position in self.rows
        ]

    def ring_row(self, ratio: int, request: int, position: int) -> int:
        ring = self.rings[ratio]
        if ratio == 4:
            slot = self.tables.window(request, position)
            assert slot, "the ring of a page that was given back"
            return slot // PAGE * ring + slot % ring
        return self.tables.row[request] * ring + position % ring

    def completed(self, ratio: int) -> list[tuple[int, int]]:
        return [row for row in self.rows if (row[1] + 1) % ratio == 0]

    def items(self, ratio: int, request: int, last: int) -> list[tuple[int, int]]:
        """(step row, ring row) of each item of the window that ends at `last`, -1 for neither."""
        result = []
        for p in range(last + 1 - (8 if ratio == 4 else ratio), last + 1):
            if p < 0:
                result.append((-1, -1))
            elif p >= self.tables.requests[request].prefix:
                result.append((self.row_of[request, p], -1))
            else:
                result.append((-1, self.ring_row(ratio, request, p)))
        return result

    def kept(self, ratio: int) -> list[int]:
        """Ring row of each of the step's rows that a later step needs, else -1."""
        result = []
        for request, p in self.rows:
            after = self.tables.requests[request].after
            if ratio == 4:
                keep = p >= after - after % 4 - 4 or p % PAGE >= 252
            else:
                keep = p >= after - after % 128
            result.append(self.ring_row(ratio, request, p) if keep else -1)
        return result


def check(requests: list[Request], seed: int, rings: dict[int, int]) -> None:
    tables = Tables(requests, seed)
    plan = build_step_plan.reference(**tables.arguments(), rings=rings)
    answers = Answers(tables, rings)
    assert plan.position.tolist() == [p for _, p in answers.rows]
    assert plan.request.tolist() == [request for request, _ in answers.rows]
    assert plan.query.tolist() == [p - requests[request].prefix for request, p in answers.rows]
    assert plan.window_write.tolist() == [tables.window(*row) for row in answers.rows]
    assert plan.window.view(-1, 128).tolist() == answers.window()
    for ratio in (4, 128):
        assert plan.visible(ratio).tolist() == [(p + 1) // ratio for _, p in answers.rows]
        slots = plan.request_slots(ratio).tolist()
        for index, request in enumerate(requests):
            entries = request.after // ratio
            # All tokens of a window lie in one slot of the compressed cache.
            assert slots[index][:entries] == [
                tables.full(index, ratio * w) // ratio for w in range(entries)
            ]
        check_compression(plan.compression[ratio], answers)
    for (request, p), seen in zip(answers.rows, plan.dense_slots.tolist()):
        want = [tables.full(request, 128 * w) // 128 for w in range((p + 1) // 128)]
        assert seen == want + [-1] * (len(seen) - len(want))


def check_compression(compression, answers: Answers) -> None:
    ratio = compression.ratio
    completed = answers.completed(ratio)
    assert compression.token.tolist() == [answers.row_of[row] for row in completed]
    assert compression.position.tolist() == [p + 1 - ratio for _, p in completed]
    assert compression.slots.tolist() == [answers.tables.full(*row) // ratio for row in completed]
    items = [answers.items(ratio, *row) for row in completed]
    assert compression.step_row.tolist() == [[step for step, _ in row] for row in items]
    assert compression.ring_row.tolist() == [[ring for _, ring in row] for row in items]
    kept = answers.kept(ratio)
    assert compression.ring_write_row.tolist() == kept
    written = [row for row in kept if row >= 0]
    assert len(set(written)) == len(written)  # a parallel scatter may write them in any order


@settings(deadline=None, max_examples=80, derandomize=True)
@given(batches(), st.integers(0, 2**20), st.sampled_from(RINGS))
def test_any_batch(requests, seed, rings):
    check(requests, seed, rings)


@pytest.mark.parametrize("prefix", [0, 1, 3, 4, 127, 128, 129, 252, 255, 256, 257, 512])
@pytest.mark.parametrize("new", [1, 4, 128, 256])
def test_borders(prefix, new):
    check([Request(prefix, new)], prefix, RINGS[0])


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    st.lists(st.tuples(lengths, st.integers(1, 10)), min_size=1, max_size=3),
    st.integers(0, 2**20),
    st.data(),
)
def test_a_step_that_may_be_taken_back_keeps_what_any_shorter_length_needs(batch, seed, data):
    """Played through: rows that the rings hold, by position, over a step, a cut and the next."""
    tables = Tables([Request(prefix, new) for prefix, new in batch], seed)
    lens = [data.draw(st.integers(prefix + 1, prefix + new)) for prefix, new in batch]
    plan = build_step_plan.reference(
        **tables.arguments(), rings=SPECULATION_RING_ROWS, may_shrink=True
    )
    answers = Answers(tables, dict(SPECULATION_RING_ROWS))
    for ratio in (4, 128):
        width, ring = (8 if ratio == 4 else ratio), {}
        for request, (prefix, _) in enumerate(batch):  # as the steps before left it
            for p in range(max(0, prefix // ratio * ratio - (4 if ratio == 4 else 0)), prefix):
                ring[answers.ring_row(ratio, request, p)] = request, p
        kept = plan.compression[ratio].ring_write_row.tolist()
        for row, written in zip(answers.rows, kept):
            if written >= 0:
                ring[written] = row
        for request, length in enumerate(lens):
            # the first window that the next step completes, of any number of rows
            last = length // ratio * ratio + ratio - 1
            for p in range(max(0, last + 1 - width), length):
                assert ring.get(answers.ring_row(ratio, request, p)) == (request, p), (ratio, p)


def test_how_many_rows_may_be_taken_back():
    """The bound is the ring less the items that stay: docs/model.md §4."""
    assert [shrinkable_rows(ratio, SPECULATION_RING_ROWS[ratio]) for ratio in (4, 128)] == [10, 130]
    # One row is never taken back, so the small rings serve decode.
    assert [shrinkable_rows(ratio, RING_ROWS[ratio]) for ratio in (4, 128)] == [2, 2]


def test_pages_given_back_are_not_attended_to():
    tables = Tables([Request(1000, 3)])
    assert tables.window(0, 0) == 0 and tables.window(0, 999) > 0
    plan = build_step_plan.reference(**tables.arguments())
    # compressed entries outlive the window
    assert (plan.window > 0).all() and plan.page_table.min() > 0
    check([Request(1000, 3)], 0, RINGS[0])


def test_a_position_without_a_window_slot_is_skipped():
    """The host writes 0 where it gave a page back: that is nobody's slot, not slot 0."""
    arguments = Tables([Request(300, 3)]).arguments()
    arguments["full_to_window"][arguments["slot_table"][arguments["slot_row"][0], :256].long()] = 0
    plan = build_step_plan.reference(**arguments)
    for row, position in enumerate(range(300, 303)):
        gone = [p < 256 for p in range(position - 127, position + 1)]
        assert (plan.window[row] == -1).tolist() == gone and (plan.window[row] != 0).all()


@settings(deadline=None, max_examples=30, derandomize=True)
@given(batches(), st.integers(0, 2**20))
def test_static_rows_only_add_padding(requests, seed):
    arguments = Tables(requests, seed).arguments()
    plan = build_step_plan.reference(**arguments)
    static = build_step_plan.reference(**arguments, static_rows=True)
    for ratio in (4, 128):
        got, want = static.compression[ratio], plan.compression[ratio]
        count = len(want.token)
        assert len(got.token) == static_windows(len(plan.position), len(requests), ratio) >= count
        for name in ("token", "position", "slots", "step_row", "ring_row"):
            value = getattr(got, name)
            assert torch.equal(value[:count], getattr(want, name)) and (value[count:] == -1).all()
        assert torch.equal(got.ring_write_row, want.ring_write_row)


def test_no_requests_and_no_rows():
    for requests in ([], [Request(0, 0)], [Request(300, 0), Request(7, 0)]):
        check(requests, 0, RINGS[0])


@pytest.mark.parametrize(
    "rows, phase", [(1, "decode"), (6, "decode"), (8, "decode"), (9, "prefill")]
)
def test_a_verified_step_counts_as_decode(rows, phase):
    """Up to eight rows a request: a token and its drafts."""
    plan = build_step_plan.reference(
        **Tables([Request(5, 1), Request(300, rows)]).arguments(), may_shrink=True
    )
    assert plan.phase == phase
    before = HERE.phase, HERE.static
    enter_step(plan.max_queries, plan.static)
    entered, (HERE.phase, HERE.static) = HERE.phase, before
    assert entered == phase


def test_slots_do_not_wrap_at_32_bits():
    """Slot 2^31 - 256 of a table of int32, and byte offsets far over 2 GiB: all arithmetic is
    64-bit."""
    page = 2**31 // PAGE - 1
    table = torch.arange(page * PAGE, (page + 1) * PAGE).to(torch.int32).unsqueeze(0)
    window = 2**33
    # every slot maps to one value
    mapping = torch.tensor([window + 251, window + 255]).as_strided((2**31,), (0,))
    plan = build_step_plan.reference(
        position=torch.tensor([255]),
        request=torch.tensor([0]),
        out_slot=table[0, 255:].to(torch.int64),
        prefix_lens=torch.tensor([255]),
        seq_lens=torch.tensor([256]),
        slot_table=table,
        slot_row=torch.tensor([0]),
        full_to_window=mapping,
        max_queries=1,
        max_seq_len=256,
    )
    assert plan.page_table.tolist() == [[page]]
    assert plan.window_write.tolist() == [window + 251] and (plan.window == window + 251).all()
    assert plan.compression[4].slots.tolist() == [(2**31 - 1) // 4]
    assert plan.request_slots(4)[0, -1].item() == (2**31 - 1) // 4
    assert plan.compression[4].ring_row[0, 0].item() == window // PAGE * 8 + 251 % 8
    assert plan.dense_slots[0].tolist() == [page * 2, page * 2 + 1]


@pytest.mark.parametrize("slot", [2**31 - 1, 2**31, 2**33 + 5])
def test_slot_arithmetic_beyond_32_bits(slot):
    slots = torch.tensor([slot])
    assert window_ring_row(slots, 8).tolist() == [slot // 256 * 8 + slot % 8]
    assert request_ring_row(torch.tensor([2**25]), torch.tensor([130]), 128).tolist() == [
        2**25 * 128 + 2
    ]
    assert entry_slots(torch.tensor([[slot]]), torch.tensor([[63]]), 4).tolist() == [
        [slot * 64 + 63]
    ]
