"""What an operator is: one signature, a torch reference that defines it, and implementations of the same signature."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


class Operator:
    """A callable operator. Calling it runs the implementation in use; `reference` is its definition."""

    def __init__(self, reference: Callable[..., Any]):
        self.name = reference.__name__
        self.reference = reference
        functools.update_wrapper(self, reference)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.reference(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<operator {self.name}>"


def operator(reference: Callable[..., Any]) -> Operator:
    """Makes an Operator of its torch reference."""
    return Operator(reference)
