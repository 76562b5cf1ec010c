"""Files of recipes/: finding them, reading them and what they may say (docs/recipes.md)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from .. import installation
from ..report.curves import Point, load_published
from ..spelling import suggestion
from .recipe import Arm, Original, Recipe, RecipeError

ROLES = ("server", "prefill", "decode", "router")
Scalar = str | int | float


def list_recipes(directory: Path | None = None) -> list[Recipe]:
    """All recipes by name. Raises RecipeError for the first wrong one."""
    return [read_recipe(path) for path in _files(directory)]


def find_recipe(name: str, directory: Path | None = None) -> Recipe:
    """A recipe by name, or by the path of its file. Raises RecipeError naming the nearest one."""
    if name.endswith((".yaml", ".yml")):
        return read_recipe(Path(name))
    files = {path.stem: path for path in _files(directory)}
    if name not in files:
        raise RecipeError(f"no recipe {name!r}; {suggestion(name, files)}")
    return read_recipe(files[name])


def _files(directory: Path | None) -> list[Path]:
    """The recipes of `directory`, the shipped ones for None. Raises RecipeError for a directory
    that is none or holds none."""
    where = directory or installation.directory("recipes")
    found = sorted(where.glob("*.yaml"))
    if not found:
        what = "holds no recipe (NAME.yaml)" if where.is_dir() else "is no directory"
        raise RecipeError(f"{where} {what}")
    return found


def read_recipe(path: Path) -> Recipe:
    """Reads and checks one file. Raises RecipeError with the file, the field and what it takes."""
    try:
        document = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise RecipeError(f"recipe {path}: {error}") from None
    return _Reader(path, document).recipe()


class _Reader:
    """Takes fields out of one document; every complaint names the file and the field."""

    def __init__(self, path: Path, document: Any):
        self.path = path
        if not isinstance(document, dict):
            raise RecipeError(f"recipe {path}: is not a mapping of fields")
        self.document = document

    def fail(self, where: str, what: str) -> RecipeError:
        return RecipeError(f"recipe {self.path}: {where} {what}")

    def fields(
        self,
        mapping: Any,
        where: str,
        required: Mapping[str, type | tuple[type, ...]],
        optional: Mapping[str, type | tuple[type, ...]],
    ) -> dict[str, Any]:
        if not isinstance(mapping, dict):
            raise self.fail(where, f"is {mapping!r}; it must be a mapping")
        known = {**required, **optional}
        for name, value in mapping.items():
            if name not in known:
                raise self.fail(where, f"has no field {name!r}; {suggestion(str(name), known)}")
            if not isinstance(value, known[name]) or isinstance(value, bool):
                kinds = known[name] if isinstance(known[name], tuple) else (known[name],)
                raise self.fail(
                    where,
                    f"{name} is {value!r}; it must be"
                    f" {' or '.join(_KINDS[kind] for kind in kinds)}",
                )
        missing = [name for name in required if name not in mapping]
        if missing:
            raise self.fail(where, f"lacks {', '.join(missing)}")
        return mapping

    def recipe(self) -> Recipe:
        d = self.fields(
            self.document,
            "the recipe",
            {
                "title": str,
                "model": str,
                "gpu": str,
                "gpus": int,
                "host": str,
                "image": str,
                "arms": dict,
                "workload": dict,
                "accuracy": (dict, str),
                "published": (dict, str),
                "measured": (dict, str),
            },
            {
                "environment": dict,
                "arguments": dict,
                "serve": list,
                "original": dict,
                "notes": list,
            },
        )
        published, note = self.published(d["published"])
        return Recipe(
            name=self.path.stem,
            title=d["title"],
            model=d["model"],
            gpu=d["gpu"],
            gpus=d["gpus"],
            host=d["host"],
            image=d["image"],
            arms=self.arms(d["arms"], d.get("environment", {}), d.get("arguments", {}), "arms"),
            workload=self.fields(
                d["workload"], "workload", {"isl": int, "osl": int}, {"range_ratio": (float, int)}
            ),
            accuracy=self.accuracy(d["accuracy"]),
            published=published,
            published_note=note,
            measured=self.measured(d["measured"]),
            serve=tuple(map(str, d.get("serve", ()))),
            original=self.original(d.get("original")),
            notes=tuple(d.get("notes", ())),
        )

    def arms(self, arms: dict, environment: Any, arguments: Any, where: str) -> tuple[Arm, ...]:
        common_environment = self.environment(environment, "environment")
        common_arguments = self.arguments(arguments, "arguments")
        if not arms:
            raise self.fail(where, "is empty; a recipe has at least one arm")
        made = []
        for name, arm in arms.items():
            place = f"{where}.{name}"
            self.fields(
                arm,
                place,
                {"concurrency": list},
                {"environment": dict, "arguments": dict, "role": str, "not_served": str},
            )
            role = arm.get("role", "server")
            if role not in ROLES:
                raise self.fail(place, f"role is {role!r}; it must be {', '.join(ROLES)}")
            if not all(type(count) is int and count > 0 for count in arm["concurrency"]):
                raise self.fail(
                    place, f"concurrency is {arm['concurrency']}; it must be counts above 0"
                )
            own = self.arguments(arm.get("arguments", {}), place)
            made.append(
                Arm(
                    name,
                    role,
                    tuple(arm["concurrency"]),
                    {
                        **({} if role == "router" else common_environment),
                        **self.environment(arm.get("environment", {}), place),
                    },
                    {**({} if role == "router" else common_arguments), **own},
                    arm.get("not_served", ""),
                )
            )
        return tuple(made)

    def environment(self, mapping: Any, where: str) -> dict[str, str]:
        if not isinstance(mapping, dict):
            raise self.fail(where, f"is {mapping!r}; it must map names to values")
        for name, value in mapping.items():
            if not isinstance(value, (str, int, float)) or isinstance(value, bool):
                raise self.fail(
                    where, f"{name} is {value!r}; quote the text that the variable must hold"
                )
        return {str(name): str(value) for name, value in mapping.items()}

    def arguments(self, mapping: Any, where: str) -> dict[str, Any]:
        if not isinstance(mapping, dict):
            raise self.fail(where, f"is {mapping!r}; it must map option names to values")
        for name, value in mapping.items():
            if str(name).startswith("-"):
                raise self.fail(where, f"{name}: write the option without its dashes")
            if value is None or value is False:
                raise self.fail(
                    where,
                    f"{name} is {value!r}; give its value, true for an option without one, or leave"
                    " it out",
                )
            if not isinstance(value, (str, int, float, list)):
                raise self.fail(
                    where, f"{name} is {value!r}; an option takes text, a number, true or a list"
                )
        return mapping

    def published(self, said: dict | str) -> tuple[tuple[Point, ...], str]:
        if isinstance(said, str):
            return (), said
        self.fields(
            said, "published", {}, {"curve": str, "layouts": list, "points": list, "source": str}
        )
        if "curve" in said:
            curves = {curve.date: curve for curve in load_published().curves}
            if said["curve"] not in curves:
                raise self.fail(
                    "published",
                    f"curve is {said['curve']!r}; the shipped ones are {', '.join(curves)}",
                )
            layouts = said.get("layouts")
            points = tuple(
                p for p in curves[said["curve"]].points if layouts is None or p.layout in layouts
            )
            return points, points[0].source
        if "points" not in said or "source" not in said:
            raise self.fail("published", "needs a curve, or points with their source")
        made = []
        for row in said["points"]:
            self.fields(
                row,
                "published.points",
                {"concurrency": int, "tput_per_gpu": (int, float)},
                {"intvty": (int, float)},
            )
            made.append(
                Point(
                    row["concurrency"],
                    row["tput_per_gpu"],
                    row.get("intvty", 0.0),
                    0.0,
                    0.0,
                    source=said["source"],
                )
            )
        return tuple(made), said["source"]

    def accuracy(self, said: dict | str) -> Mapping[str, Any]:
        if isinstance(said, str):
            return {"none": said}
        return self.fields(
            said,
            "accuracy",
            {"task": str, "threshold": (float, int), "source": str},
            {"reported": str},
        )

    def measured(self, said: dict | str) -> str | Mapping[str, Any]:
        if isinstance(said, str):
            if not said.startswith("not measured"):
                raise self.fail(
                    "measured",
                    f"is {said!r}; write 'not measured', with the reason, or a mapping with commit"
                    " and points",
                )
            return said
        return self.fields(
            said,
            "measured",
            {"commit": str, "date": str, "machine": str, "points": list},
            {"note": str},
        )

    def original(self, said: dict | None) -> Original | None:
        if said is None:
            return None
        self.fields(
            said,
            "original",
            {"image": str, "source": str, "arms": dict},
            {"environment": dict, "arguments": dict, "notes": list},
        )
        environment = self.environment(said.get("environment", {}), "original.environment")
        return Original(
            said["image"],
            said["source"],
            environment,
            self.arms(said["arms"], environment, said.get("arguments", {}), "original.arms"),
            tuple(said.get("notes", ())),
        )


_KINDS = {str: "text", int: "a whole number", float: "a number", dict: "a mapping", list: "a list"}
