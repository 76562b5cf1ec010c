"""List, check, apply or revert the source patches of SGLang that no hook can replace.

None is needed to serve. Nothing is written without --write; a patch is applied and reverted byte
for byte, and refused where SGLang's files are not as released.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("list", "check", "apply", "revert"))
    parser.add_argument("names", nargs="*", metavar="NAME", help="patches to act on (default: all)")
    parser.add_argument(
        "--write",
        action="store_true",
        help="apply and revert: change the files (default: show what would change)",
    )
    parser.add_argument(
        "--root", type=Path, help="directory of the sglang package (default: the installed one)"
    )


def run(arguments: argparse.Namespace) -> int:
    from ..host import patches

    if arguments.write and arguments.action in ("list", "check"):
        raise patches.PatchError(
            f"--write means nothing to {arguments.action}; it belongs to apply and revert"
        )
    selected = list(patches.chosen(arguments.names, patches.patches()))
    root = arguments.root or patches.host_root()
    if not (root / "srt").is_dir():
        raise patches.PatchError(f"{root} is not the directory of an sglang package")
    if arguments.action == "list":
        return _list(selected, root)
    if arguments.action == "check":
        return _check(selected, root)
    return _change(selected, root, arguments.action == "revert", arguments.write)


def _list(selected: list, root: Path) -> int:
    import textwrap

    for patch in selected:
        said = {
            f"for sglang {patch.versions}": ", ".join(patch.files),
            "why": patch.why,
            "without it": patch.without,
            "upstream": patch.upstream,
            "goes": patch.removal,
            "test": patch.test,
        }
        lines = [f"{patch.name}: {patch.title} ({patch.state(root)})"]
        for line in lines + [f"  {what}: {text}" for what, text in said.items()]:
            print(
                textwrap.fill(
                    line,
                    80,
                    subsequent_indent="    ",
                    break_on_hyphens=False,
                    break_long_words=False,
                )
            )
    return 0


def _check(selected: list, root: Path) -> int:
    """Whether each can be applied or reverted; status 1 when one cannot."""
    from ..host.patches import APPLIED, PatchError

    failed = False
    for patch in selected:
        try:
            state = patch.state(root)
            patch.apply(root, revert=state == APPLIED)
            print(f"{patch.name}: {state}, can be {'reverted' if state == APPLIED else 'applied'}")
        except PatchError as error:
            failed = True
            print(error)
    return 1 if failed else 0


def _change(selected: list, root: Path, revert: bool, really: bool) -> int:
    from ..host import patches

    done = "reverted" if revert else "applied"
    # all are checked before one is written
    changes = [(patch, patch.apply(root, revert)) for patch in selected]
    for patch, files in changes:
        if not files:
            print(f"{patch.name}: nothing to do, it is {'not applied' if revert else 'applied'}")
        elif really:
            patches.write(root, files)
            print(f"{patch.name}: {done}, {', '.join(files)} in {root}")
        else:
            print(f"{patch.name}: would be {done}\n{patch.diff}")
    if not really and any(files for _, files in changes):
        print("nothing was written; add --write to change the files")
    return 0
