"""Variants of Triton kernels that a short life of one Pro server on eight gfx950 meets.

The steps of that life run on torch's meta device as in launches.py. A launch is reduced to the key
by which Triton finds a compiled kernel: types, what it specialises on, and compile-time constants.
Nothing is compiled.

    PYTHONPATH=. python tests/compile/variants.py     # prints variants by kernel
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from unittest import mock

import launches
from chips import CHIPS
from pretend import pretend
from triton.runtime.jit import JITFunction

from dsv4_plugin.runtime.precompile import Load, step_plan, variant_key


def life() -> Iterator[tuple[int, int, int]]:
    """(rows, requests, longest context) of each step."""
    yield 8192, 1, 8192
    yield 1, 1, 1 << 20  # a decode plan is made for the longest context there is
    for requests in (1, 2, 3, 5, 8, 13, 16, 21, 32, 48, 63, 64):
        yield 1024 + requests, 1 + requests, 9216
        yield requests, requests, 1 << 20
    yield from ((17, 1, 17), (777, 1, 777), (2048, 3, 1000), (5001, 4, 3001), (8192, 16, 9000))
    for context in (300, 4096, 32768, 65536 + 300, 131072, 262145, 1 << 20):
        yield 2048, 1, context


def variants() -> Counter[str]:
    """How many variants of each kernel the life meets."""
    found: dict[str, set[str]] = {}

    def key_alone(self, *args, grid, warmup, **kwargs):
        name = f"{self.__module__.rsplit('.', 1)[1]}.{self.__name__}"
        found.setdefault(name, set()).add(variant_key(self, args, kwargs))

    with (
        pretend(CHIPS["gfx950"]),
        launches.counting(),
        mock.patch.object(JITFunction, "run", key_alone),
    ):
        model = launches.small_model()
        for rows, requests, context in life():
            launches.advance(model, step_plan(rows, requests, context, Load()))
    return Counter({name: len(keys) for name, keys in found.items()})


if __name__ == "__main__":
    counts = variants()
    for name, count in counts.most_common():
        print(f"{count:4} {name}")
    print(f"{counts.total():4} in all")
