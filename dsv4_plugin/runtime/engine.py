"""Ragged batches over paged caches: any mix of prefill chunks and decode rows in one step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from ..cache import PAGE_TOKENS
from ..cache.step_plan import (
    RING_ROWS,
    SPECULATION_RING_ROWS,
    context_bucket,
    shrinkable_rows,
)
from ..model import DeepseekV4
from ..ops import build_draft_plan, build_step_plan, sample_greedy
from ..ops.operator import enter_step
from ..ops.step_plan import StepPlan
from .pool import Pages, PoolFull, make_caches
from .speculate import Continuation, Draft, Sampling, Speculation


@dataclass
class Sequence:
    """One request of an engine: its row of the slot table, its pages and the tokens computed so
    far."""

    row: int
    length: int = 0
    pages: list[int] = field(default_factory=list)
    window_pages: list[int] = field(default_factory=list)


class Engine:
    """Runs a DeepseekV4 on ragged batches; holds pages for `max_tokens` tokens and `max_requests`
    sequences.

    `page_seed` shuffles the order of full and window pages, which must not change any result.
    `verify_rows` is the most rows of a sequence in a step that may be taken back. Raises ValueError
    when the compressors' rings cannot hold that many.
    """

    def __init__(
        self,
        model: DeepseekV4,
        max_tokens: int = 16384,
        max_requests: int = 32,
        page_seed: int | None = None,
        verify_rows: int = 1,
    ):
        self.model, self.verify_rows = model, verify_rows
        self.rings = RING_ROWS if verify_rows <= 1 else SPECULATION_RING_ROWS
        most = min(shrinkable_rows(ratio, rows) for ratio, rows in self.rings.items())
        if verify_rows > most:
            raise ValueError(
                f"verify_rows is {verify_rows}; rings of {dict(self.rings)} rows serve up to {most}"
            )
        self.device = model.embed.weight.device
        pages = -(-max_tokens // PAGE_TOKENS) + max_requests + 1
        self.caches = make_caches(
            model.geometry, model.precision, pages, max_requests + 1, self.device, self.rings
        )
        self._pages = Pages(pages, page_seed)
        self._window_pages = Pages(pages, None if page_seed is None else page_seed + 1)
        self._rows = list(range(max_requests, 0, -1))
        self._slots = torch.zeros(
            max_requests + 1, pages * PAGE_TOKENS, dtype=torch.int32, device=self.device
        )
        self._full_to_window = torch.zeros(
            pages * PAGE_TOKENS, dtype=torch.int64, device=self.device
        )

    def open(self) -> Sequence:
        """A new empty sequence. Raises PoolFull when all rows are taken."""
        if not self._rows:
            raise PoolFull(
                "all request rows are taken; close a sequence or give the engine more requests"
            )
        return Sequence(self._rows.pop())

    def close(self, sequence: Sequence) -> None:
        """Frees the sequence's row and pages."""
        self._rows.append(sequence.row)
        self._pages.give_back(sequence.pages)
        self._window_pages.give_back(sequence.window_pages)
        sequence.pages, sequence.window_pages = [], []

    def _grow(self, batch: list[tuple[Sequence, int]]) -> None:
        """Takes the pages that the batch needs, all of them or, with PoolFull, none."""
        needed = [
            max(0, -(-(sequence.length + count) // PAGE_TOKENS) - len(sequence.pages))
            for sequence, count in batch
        ]
        pages = zip(self._pages.take(sum(needed)), self._window_pages.take(sum(needed)))
        within = torch.arange(PAGE_TOKENS, device=self.device)
        for (sequence, _), count in zip(batch, needed):
            for page, window_page in islice(pages, count):
                start = len(sequence.pages) * PAGE_TOKENS
                self._slots[sequence.row, start : start + PAGE_TOKENS] = page * PAGE_TOKENS + within
                self._full_to_window[page * PAGE_TOKENS + within] = (
                    window_page * PAGE_TOKENS + within
                )
                sequence.pages.append(page)
                sequence.window_pages.append(window_page)

    def reserve(self, sequences: list[Sequence], count: int) -> None:
        """Takes the pages that `count` more tokens of each sequence need. Raises PoolFull."""
        self._grow([(sequence, count) for sequence in sequences])

    def cut(self, sequence: Sequence, length: int) -> None:
        """Takes back the tokens past `length`: nothing moves, the next step writes over them.

        Only the tokens but the first of a step planned with `may_shrink` may be taken back.
        """
        sequence.length = length

    def plan(
        self,
        batch: list[tuple[Sequence, int]],
        may_shrink: bool = False,
        static: bool = False,
        out: StepPlan | None = None,
    ) -> StepPlan:
        """The step plan that adds that many tokens to each sequence; pages are taken, lengths
        advance. `static` and `out` are for steps that are captured, see build_step_plan.

        With `may_shrink` they may be cut back to all but the first of these tokens. Raises
        PoolFull, with nothing taken, when there are too few pages for all of the batch.
        """
        prefix = torch.tensor([sequence.length for sequence, _ in batch], dtype=torch.int64)
        counts = torch.tensor([count for _, count in batch], dtype=torch.int64)
        self._grow(batch)
        for sequence, count in batch:
            sequence.length += count
        seq_lens = prefix + counts
        request = torch.arange(len(batch)).repeat_interleave(counts)
        first = (counts.cumsum(0) - counts)[request]
        position = prefix[request] + torch.arange(request.shape[0]) - first
        row = torch.tensor([sequence.row for sequence, _ in batch], dtype=torch.int64)
        position, request, prefix, lens, row = (
            t.to(self.device) for t in (position, request, prefix, seq_lens, row)
        )
        max_queries, longest = max(counts.tolist(), default=0), max(seq_lens.tolist(), default=0)
        if max_queries <= 1:  # decode, as a captured graph sees it
            longest = context_bucket(longest, self._slots.shape[1])
        enter_step(max_queries, static)
        return build_step_plan(
            position,
            request,
            self._slots[row[request], position].to(torch.int64),
            prefix,
            lens,
            self._slots,
            row,
            self._full_to_window,
            max_queries,
            longest,
            rings=self.rings,
            static_rows=static or out is not None,
            may_shrink=may_shrink,
            out=out,
        )

    def draft_plan(self, sequences: list[Sequence], block: int) -> StepPlan:
        """The plan of a DSpark draft's pass for tokens past the end of each sequence, whose pages
        are taken already (`reserve`)."""
        lengths = self.ids([sequence.length for sequence in sequences])
        rows = self.ids([sequence.row for sequence in sequences])
        return build_draft_plan(lengths, block, self._slots, rows, self._full_to_window)

    @torch.inference_mode()
    def forward(self, batch: list[tuple[Sequence, list[int]]]) -> Tensor:
        """Streams [T, 4, d] of the new tokens of all sequences, in the order given."""
        plan = self.plan([(sequence, len(tokens)) for sequence, tokens in batch])
        return self.model(
            self.ids([token for _, tokens in batch for token in tokens]), plan, self.caches
        )

    @torch.inference_mode()
    def logits(self, streams: Tensor) -> Tensor:
        """fp32 logits [T, vocab] of backbone streams."""
        return self.model.logits(self.model.collapse(streams))

    @torch.inference_mode()
    def score(self, prompt: list[int], chunks: Iterable[int] | None = None) -> Tensor:
        """fp32 logits [len(prompt), vocab], prefilled in one chunk or in chunks of the given
        lengths."""
        return torch.cat([self.logits(streams) for _, _, streams in self._chunks(prompt, chunks)])

    @torch.inference_mode()
    def score_draft(self, prompt: list[int], chunks: Iterable[int] | None = None) -> Tensor:
        """fp32 logits [len(prompt), vocab] of the MTP block, prefilled like `score`.

        Row t predicts token t + 2 from the backbone's streams at t and token t + 1, which after the
        last is 0.
        """
        shifted, parts = [*prompt[1:], 0], []
        for part, plan, streams in self._chunks(prompt, chunks):
            streams = self.model.draft(self.ids(shifted[part]), streams, plan, self.caches)
            parts.append(self.model.logits(self.model.mtp[0].collapse(streams)))
        return torch.cat(parts)

    def _chunks(
        self, prompt: list[int], sizes: Iterable[int] | None
    ) -> Iterator[tuple[slice, StepPlan, Tensor]]:
        """Prefills `prompt` as a sequence of its own: the part of each chunk, its plan and the
        backbone's streams."""
        sequence, start = self.open(), 0
        try:
            for size in sizes or [len(prompt)]:
                part = slice(start, start + size)
                plan = self.plan([(sequence, len(prompt[part]))])
                yield part, plan, self.model(self.ids(prompt[part]), plan, self.caches)
                start += size
        finally:
            self.close(sequence)

    def ids(self, tokens: list[int]) -> Tensor:
        """int64 [n] on the engine's device."""
        return torch.tensor(tokens, dtype=torch.int64, device=self.device)

    @torch.inference_mode()
    def speculate(
        self,
        prompts: list[list[int]],
        max_new_tokens: int,
        draft: Draft,
        sampling: Sampling = Sampling(),
        chunk: int = 2048,
    ) -> list[Continuation]:
        """Continuations as `generate` gives them, with a draft; greedy ones have the same tokens.

        The engine must have been made with `verify_rows` of at least `draft.width + 1`. Raises
        ValueError when it was not.
        """
        if draft.width + 1 > self.verify_rows:
            raise ValueError(
                f"a draft of {draft.width} tokens is verified in steps of {draft.width + 1} rows,"
                f" and this engine has verify_rows {self.verify_rows}"
            )
        return Speculation(self, draft, sampling).run(prompts, max_new_tokens, chunk)

    @torch.inference_mode()
    def generate(
        self,
        prompts: list[list[int]],
        max_new_tokens: int,
        chunk: int = 2048,
        draft: Draft | None = None,
    ) -> list[list[int]]:
        """Greedy continuations of all prompts, decoded as one batch; no token ends a sequence
        early. A `draft` changes the number of steps and no token (`speculate`)."""
        if draft is not None:
            out = self.speculate(prompts, max_new_tokens, draft, chunk=chunk)
            return [each.tokens for each in out]
        sequences = [self.open() for _ in prompts]
        try:
            last = [
                self._prefill(sequence, prompt, chunk)
                for sequence, prompt in zip(sequences, prompts)
            ]
            out = [[token] for token in last]
            for _ in range(max_new_tokens - 1):
                streams = self.forward([(s, [tokens[-1]]) for s, tokens in zip(sequences, out)])
                for tokens, token in zip(out, self._best(streams).tolist()):
                    tokens.append(token)
            return out
        finally:
            for sequence in sequences:
                self.close(sequence)

    def _prefill(self, sequence: Sequence, prompt: list[int], chunk: int) -> int:
        for start in range(0, len(prompt), chunk):
            streams = self.forward([(sequence, prompt[start : start + chunk])])
        return int(self._best(streams[-1:]))

    def _best(self, streams: Tensor) -> Tensor:
        """Token ids int64 [T] of the largest logits of backbone streams, whoever holds their
        share."""
        return sample_greedy(self.logits(streams), self.model.parallel.vocab)
