"""The words of `--what-if`: fractions of peak and the cost of a launch that a user wants to try."""

from __future__ import annotations

import dataclasses

from ..spelling import suggestion
from .step import Efficiency

FACTORS = tuple(field.name for field in dataclasses.fields(Efficiency) if field.name != "launch")


class AssumptionError(ValueError):
    """A what-if that names no assumption, or a value it cannot take."""


def parse(text: str) -> Efficiency:
    """From "bandwidth=0.6,launch_us=5": factors of a peak above 0 (2 asks for twice the peak),
    launch in microseconds.

    Raises AssumptionError naming the word.
    """
    values: dict[str, float] = {}
    for word in filter(None, text.split(",")):
        name, _, value = word.partition("=")
        if name not in (*FACTORS, "launch_us"):
            hint = suggestion(name, [*FACTORS, "launch_us"])
            raise AssumptionError(f"--what-if {word!r}: there is no {name!r}; {hint}")
        try:
            number = float(value)
        except ValueError:
            raise AssumptionError(f"--what-if {word!r}: {value!r} is not a number") from None
        if not 0 <= number < float("inf") or (number == 0 and name != "launch_us"):
            raise AssumptionError(f"--what-if {word!r}: give a finite number above 0")
        if name == "launch_us":
            values["launch"] = number / 1e6
        else:
            values[name] = number
    return Efficiency(**values)
