"""docs/flags.md, made from the table of switches."""

from __future__ import annotations

from . import flags

_HEAD = """<!-- Made by `dsv4 flags --markdown > docs/flags.md`; a test keeps it true. -->
# Switches

Nothing needs to be set: the defaults are the best settings. `dsv4 flags` prints this table with the
values in force.

A switch has, in this order, the value of

1. its own variable,
2. a variable of SGLang's side branch, of SGLang or of the InferenceX recipes that means the same
   (last table),
3. `DSV4_PROFILE`,
4. its default.

A profile is meant to be overridden in single switches. Everything else that disagrees is an error
at start, and so are an unknown `DSV4_*` variable, a value that a switch does not take, layers
chosen for an operator that runs its reference anyway, and an implementation that is named but
cannot run. There is no silent fall-back: `auto` alone may pass over an implementation, and the
report says why it did.
"""


def markdown() -> str:
    """The document. It depends on the table and on the operators, which must be imported, not on
    the environment."""
    general = [flag for flag in flags.FLAGS if flag.name not in _operator_flags()]
    lines = [
        _HEAD,
        "## General",
        "",
        "| variable | values | default | meaning |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| `{flag.name}` | {_values(flag)} | {_code(flag.default)} | {_cell(flag.meaning)} |"
        for flag in general
    ]
    lines += [
        "",
        "## Operators",
        "",
        (
            f"Each operator has two: `DSV4_<OPERATOR>` is `{flags.AUTO}` (the default),"
            f" `{flags.REFERENCE}` or one of the implementations that the operator has, in the"
            " order that auto tries them (kernels of others, `aiter` and `host`, not before `dsv4"
            " verify --time` has measured them); and `DSV4_LAYERS_<OPERATOR>` lists the layers, as"
            " `0-3,7`, that take it; all other layers then take the reference, which is how a wrong"
            " implementation is found by bisection."
        ),
        "",
        "| variable | operator | implementations | asked for by |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| `{flag.name}` | {flags.OPERATORS[flag.operator]} | {_implementations(flag)} |"
        f" {_mirrors(flag.operator)} |"
        for flag in flags.FLAGS
        if flag.operator
    ]
    lines += [
        "",
        "## Profiles",
        "",
        (
            "`auto` leaves every operator at `auto`, `safe` gives all of them the reference. The "
            "dated ones are the milestones of the published MI355X curves; `auto` stands where the "
            "side branch ran what this package has no implementation of:"
        ),
        "",
        *_profiles(),
        "",
        "## Variables of others",
        "",
        (
            "A variable that asks for an implementation that the operator does not have has no"
            " effect; the start says so, and the operator is chosen as if it were not set."
        ),
        "",
        "| variable | taken as |",
        "|---|---|",
    ]
    lines += [
        f"| `{name}` | {_cell(_meaning(row))} |" for name, row in flags.foreign_flags().items()
    ]
    return "\n".join(lines) + "\n"


def _operator_flags() -> set[str]:
    return {
        name(operator)
        for operator in flags.OPERATORS
        for name in (flags.operator_flag, flags.layers_flag)
    }


def _profiles() -> list[str]:
    dated = [name for name in flags.profiles() if name[0].isdigit()]
    rows = ["| operator | " + " | ".join(dated) + " |", "|---|" + "---|" * len(dated)]
    for operator in flags.OPERATORS:
        chosen = [flags.profiles()[name]["operators"].get(operator, flags.AUTO) for name in dated]
        rows.append(f"| {operator} | " + " | ".join(chosen) + " |")
    return rows + [""] + [f"* {name}: {flags.profiles()[name]['meaning']}." for name in dated]


def _values(flag: flags.Flag) -> str:
    return _cell(flag.form) if flag.form else ", ".join(f"`{value}`" for value in flag.values)


def _implementations(flag: flags.Flag) -> str:
    names = [name for name in flag.values if name not in (flags.AUTO, flags.REFERENCE)]
    return ", ".join(f"`{name}`" for name in names) or "–"


def _mirrors(operator: str) -> str:
    return ", ".join(f"`{name}`" for name in flags.mirrors(flags.operator_flag(operator))) or "–"


def _meaning(row: dict) -> str:
    parts = []
    for value, meaning in {
        **row.get("values", {}),
        **{s: row[s] for s in ("enabled", "disabled") if s in row},
    }.items():
        asked = (
            meaning
            if isinstance(meaning, str)
            else ", ".join(_asked(operator, wanted) for operator, wanted in meaning.items())
            or "nothing"
        )
        parts.append(f"{value}: {asked}")
    parts += [f"{value}: refused, {why}" for value, why in row.get("refuse", {}).items()]
    return "; ".join(parts + ([row["note"]] if "note" in row else []))


def _asked(operator: str, wanted: str) -> str:
    legal = flags.ForeignChoice("", operator, wanted, weak=False).legal
    return f"`{flags.operator_flag(operator)}={wanted}`" + ("" if legal else " (not there)")


def _code(text: str) -> str:
    return f"`{text}`" if text else "–"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
