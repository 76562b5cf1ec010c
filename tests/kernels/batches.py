"""Random ragged batches over paged tables, as the host's scheduler makes them, for kernels that
read a plan."""

from __future__ import annotations

import torch
from torch import Tensor

PAGE = 256


class Tables:
    """Slot tables of some requests: pages in random order, window pages in another, nothing on page
    0 and row 0."""

    def __init__(self, requests: int, max_tokens: int, seed: int = 0):
        random = torch.Generator().manual_seed(seed)
        pages = -(-max_tokens // PAGE)
        self.pages = requests * pages + 1
        full = (torch.randperm(self.pages - 1, generator=random) + 1).view(requests, pages)
        window = torch.randperm(self.pages - 1, generator=random) + 1
        within = torch.arange(PAGE)
        self.slot_table = torch.zeros(requests + 1, pages * PAGE, dtype=torch.int32)
        self.slot_table[1:] = (full.unsqueeze(-1) * PAGE + within).flatten(1)
        self.full_to_window = torch.zeros(self.pages * PAGE + 1, dtype=torch.int64)
        self.full_to_window[PAGE:-1] = (window.unsqueeze(-1) * PAGE + within).flatten()
        self.full_to_window[-1] = -1
        self.rows = torch.randperm(requests, generator=random) + 1

    def arguments(self, prefix_lens: list[int], counts: list[int]) -> dict[str, Tensor | int]:
        """What build_step_plan takes when request i, which has prefix_lens[i] tokens, gets
        counts[i] more."""
        prefix, count = (
            torch.tensor(prefix_lens, dtype=torch.int64),
            torch.tensor(counts, dtype=torch.int64),
        )
        request = torch.arange(len(counts)).repeat_interleave(count)
        first = (count.cumsum(0) - count)[request]
        position = prefix[request] + torch.arange(request.shape[0]) - first
        rows = self.rows[: len(counts)]
        return {
            "position": position,
            "request": request,
            "out_slot": self.slot_table[rows[request], position].to(torch.int64),
            "prefix_lens": prefix,
            "seq_lens": prefix + count,
            "slot_table": self.slot_table,
            "slot_row": rows,
            "full_to_window": self.full_to_window,
            "max_queries": max(counts, default=0),
            "max_seq_len": max((prefix + count).tolist(), default=0),
        }
