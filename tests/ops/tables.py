"""Slot tables of a few requests, as the host's scheduler leaves them, with every question answered
in plain Python."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass

import torch

PAGE = 256


@dataclass(frozen=True)
class Request:
    """`prefix` tokens are cached, `new` ones are added by the step; `shared` leading pages are
    request 0's."""

    prefix: int
    new: int
    shared: int = 0

    @property
    def after(self) -> int:
        return self.prefix + self.new


class Tables:
    """Pages of requests in random order, window pages in another order; page 0 and row 0 belong to
    nobody.

    Window pages that lie wholly before the 128 tokens ahead of the step are given back and read as
    0, as the host leaves them.
    """

    def __init__(self, requests: list[Request], seed: int = 0):
        chance = random.Random(seed)
        self.requests = requests
        needed = [-(-request.after // PAGE) for request in requests]
        self.pages = sum(needed) + 5
        free, free_window = (chance.sample(range(1, self.pages), self.pages - 1) for _ in range(2))
        self.row = chance.sample(range(1, len(requests) + 4), len(requests))
        self._pages: list[list[int]] = []
        self._window = [0] * self.pages
        for request, count in zip(requests, needed):
            shared = self._pages[0][: request.shared] if request.shared else []
            self._pages.append(shared + [free.pop() for _ in range(count - len(shared))])
        live = {
            page
            for request, pages in zip(requests, self._pages)
            for index, page in enumerate(pages)
            if (index + 1) * PAGE > request.prefix - 128
        }
        for page in live:
            self._window[page] = free_window.pop()

    def at(self, requests: list[Request]) -> Tables:
        """The same pages at another step."""
        other = copy.copy(self)
        other.requests = requests
        return other

    def full(self, request: int, position: int) -> int:
        """Full slot of a position."""
        return self._pages[request][position // PAGE] * PAGE + position % PAGE

    def window(self, request: int, position: int) -> int:
        """Window slot of a position, 0 where it was given back."""
        full = self.full(request, position)
        page = self._window[full // PAGE]
        return page * PAGE + full % PAGE if page else 0

    def rows(self) -> list[tuple[int, int]]:
        """(request, position) of each of the step's rows."""
        return [
            (index, position)
            for index, request in enumerate(self.requests)
            for position in range(request.prefix, request.after)
        ]

    def arguments(self) -> dict:
        """What build_step_plan takes."""
        longest = max((request.after for request in self.requests), default=0)
        # The host's table is int32 and as wide as the context; what nobody wrote is 0.
        table = torch.zeros(len(self.requests) + 4, longest + PAGE, dtype=torch.int32)
        for index, request in enumerate(self.requests):
            table[self.row[index], : request.after] = torch.tensor(
                [self.full(index, p) for p in range(request.after)], dtype=torch.int32
            )
        mapping = torch.zeros(self.pages * PAGE + 1, dtype=torch.int64)
        for page, window in enumerate(self._window):
            if window:
                mapping[page * PAGE : (page + 1) * PAGE] = window * PAGE + torch.arange(PAGE)
        mapping[-1] = -1
        rows = self.rows()
        return {
            "position": _int64(position for _, position in rows),
            "request": _int64(request for request, _ in rows),
            "out_slot": _int64(self.full(*row) for row in rows),
            "prefix_lens": _int64(request.prefix for request in self.requests),
            "seq_lens": _int64(request.after for request in self.requests),
            "slot_table": table,
            "slot_row": _int64(self.row),
            "full_to_window": mapping,
            "max_queries": max((request.new for request in self.requests), default=0),
            "max_seq_len": longest,
        }


def _int64(values) -> torch.Tensor:
    return torch.tensor(list(values), dtype=torch.int64)
