"""A launch recipe as data: its arms, what they set, and what was published for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..report.curves import Point


class RecipeError(ValueError):
    """A recipe that does not exist or says something recipes cannot say."""


@dataclass(frozen=True)
class Arm:
    """One way to launch a recipe: alternatives of one another, or, with roles, the parts of one
    disaggregated server."""

    name: str
    role: str
    concurrency: tuple[int, ...]
    environment: Mapping[str, str]
    arguments: Mapping[str, Any]
    not_served: str = ""
    """Why this version of the plugin refuses to start it; `dsv4 recipe check` verifies that it
    does, and only then."""


@dataclass(frozen=True)
class Original:
    """How the published figure was launched then, on a host that is not the one installed now."""

    image: str
    source: str
    environment: Mapping[str, str]
    arms: tuple[Arm, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """One file of recipes/. Environment and arguments of an arm already include the recipe's common
    ones."""

    name: str
    title: str
    model: str
    gpu: str
    gpus: int
    host: str
    image: str
    arms: tuple[Arm, ...]
    workload: Mapping[str, float]
    accuracy: Mapping[str, Any]
    published: tuple[Point, ...]
    published_note: str
    measured: str | Mapping[str, Any]
    serve: tuple[str, ...] = ()
    """Options of `dsv4 serve` itself, such as --cpu."""
    original: Original | None = None
    notes: tuple[str, ...] = ()

    @property
    def not_served(self) -> str:
        """What of it this version refuses to start: "" for nothing, a reason alone when no arm
        starts, otherwise by arm."""
        marked = [arm for arm in self.arms if arm.not_served]
        if len(marked) == len([arm for arm in self.arms if arm.role != "router"]):
            return "; ".join(dict.fromkeys(arm.not_served for arm in marked))
        return "; ".join(f"arm {arm.name}: {arm.not_served}" for arm in marked)

    @property
    def group(self) -> tuple[Arm, ...]:
        """The arms that run together as one disaggregated server; none where arms are
        alternatives."""
        return tuple(arm for arm in self.arms if arm.role != "server")

    def arm(self, name: str | None) -> Arm:
        """The arm of that name, or the only one. Raises RecipeError naming the arms."""
        names = [arm.name for arm in self.arms]
        if name is None and len(names) == 1:
            return self.arms[0]
        for arm in self.arms:
            if arm.name == name:
                return arm
        raise RecipeError(
            f"recipe {self.name} has the arms {', '.join(names)}; "
            + ("give one with --arm" if name is None else f"{name!r} is none of them")
        )
