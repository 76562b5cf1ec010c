"""How the GPUs of a node share a model."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import Geometry
from ..parallel import ParallelError, layout


class LayoutError(ValueError):
    """A layout that is not understood or that the model's sizes do not allow, or a step that is
    none."""


@dataclass(frozen=True)
class Layout:
    """How `gpus` ranks share the model: attention is data-parallel over `dp` groups and
    tensor-parallel inside one; the experts are split over all ranks, by intermediate size or over
    `ep` groups by expert. Embedding and head are split over all ranks."""

    gpus: int
    dp: int = 1
    ep: int = 1

    @property
    def attention_tp(self) -> int:
        return self.gpus // self.dp

    @property
    def shares(self) -> dict[str, int]:
        """Ways that each group of tensors is split; a group that is not named is held whole."""
        return {
            "attention": self.attention_tp,
            "expert": self.gpus,
            "shared": self.gpus,
            "vocab": self.gpus,
        }

    @property
    def held(self) -> dict[str, int]:
        """The same as this package serves it: each attention group holds its own shared expert,
        embedding and head (docs/parallelism.md)."""
        return {**self.shares, "shared": self.attention_tp, "vocab": self.attention_tp}

    @property
    def name(self) -> str:
        attention = f"dp{self.dp}" if self.dp > 1 else f"tp{self.gpus}"
        return attention + (f"-ep{self.ep}" if self.ep > 1 else "")

    @classmethod
    def parse(cls, text: str) -> Layout:
        """From a name: tp8, dp8, dp8-ep8, tp4; "dp4/8" is four attention groups over eight GPUs.
        Raises LayoutError."""
        attention, dash, expert = text.partition("-")
        kind, sizes = attention[:2], attention[2:]
        groups, _, gpus = sizes.partition("/")
        numbers = (groups, gpus or groups, expert[2:] if dash else "1")
        if (
            kind not in ("tp", "dp")
            or (dash and expert[:2] != "ep")
            or not all(n.isdigit() and int(n) for n in numbers)
            or (kind == "tp" and gpus)
        ):
            raise LayoutError(
                f"layout {text!r} is not understood; write tp8, dp8, dp8-ep8 or dp4/8 (4 attention"
                " groups on 8 GPUs)"
            )
        return cls(int(numbers[1]), int(groups) if kind == "dp" else 1, int(numbers[2]))

    def check(self, geometry: Geometry) -> None:
        """Raises LayoutError naming the size that the layout does not divide."""
        if self.gpus % self.dp:
            raise LayoutError(
                f"layout {self.name}: {self.dp} attention groups do not divide {self.gpus} GPUs"
            )
        if self.gpus % self.ep:
            raise LayoutError(
                f"layout {self.name}: {self.ep} expert groups do not divide {self.gpus} GPUs"
            )
        try:
            layout(self.gpus, self.ep, self.dp).check(geometry)
        except ParallelError as error:
            raise LayoutError(f"layout {self.name}: {error}") from None
