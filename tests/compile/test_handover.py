"""The parts of a split product are in the cache before the arrival of their program counts."""

from __future__ import annotations

import pytest
from assembly import instructions
from chips import CHIPS
from pretend import pretend
from registry import operators


@pytest.mark.parametrize("arch", ["gfx950", "gfx942"])
def test_every_wave_waits_for_its_stores(arch):
    """The compiler's barrier does not, and the release of one wave waits for its own stores alone
    (docs/kernels.md): after the last store and before the barrier stands a wait for all of them."""
    case = next(case for case in operators()["products"] if case.name == "grouped/16-tokens")
    with pretend(CHIPS[arch]) as launches:
        case.launch()
    body = instructions(launches[0].compiled.asm["amdgcn"])
    arrival = next(at for at, text in enumerate(body) if text.startswith("global_atomic_add"))
    stores = [at for at, text in enumerate(body[:arrival]) if "_store_dword" in text]
    barrier = max(at for at, text in enumerate(body[:arrival]) if text.startswith("s_barrier"))
    assert stores[-1] < barrier
    waits = [text for text in body[stores[-1] : barrier] if text.startswith("s_waitcnt")]
    assert any("vmcnt(0)" in text for text in waits), body[stores[-1] : barrier]
    # what the release writes back and the acquire drops
    assert any(text.startswith("buffer_wbl2") for text in body[barrier:arrival])
    assert any(text.startswith("buffer_inv") for text in body[arrival : arrival + 4])
