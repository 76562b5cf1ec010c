"""What to say about a name that does not exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def suggestion(
    name: str, known: Iterable[str], otherwise: str | None = None, prefix: str = ""
) -> str:
    """ "did you mean X?" when a known name is near, `otherwise` (by default all known names) when
    none is. A name that goes on where a known one ends is near it; a `prefix` that all names share
    does not make them nearer."""
    known = list(known)
    bare = [each.removeprefix(prefix) for each in known]
    asked = name.removeprefix(prefix)
    near = difflib.get_close_matches(asked, bare, n=1)
    near = near or [each for each in bare if each and asked.startswith(f"{each}_")]
    if near:
        return f"did you mean {prefix}{near[0]}?"
    return f"there are {', '.join(known)}" if otherwise is None else otherwise
