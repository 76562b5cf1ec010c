"""Instructions a second that the executor does, of each kernel.

python tests/isa/rates.py        # CPU seconds of one core, so that other work does not count
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[n]) for n in (0, 2)]
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import executions

from gfx950.machine import Options

WAYS = {
    "lockstep": Options(),
    "watched": executions.WATCHED,
    "alone": Options(together=False, late=True),
}


def main() -> None:
    """Prints thousands of wave instructions a CPU second for the last call of each kernel that it
    takes, and for all together."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    last = {(case.operator, case.implementation): case for case in executions.all_cases()}
    print(f"{'':32}{'instructions':>14}" + "".join(f"{way:>12}" for way in WAYS))
    total = dict.fromkeys(WAYS, 0.0)
    instructions = 0
    for case in last.values():
        rates = []
        for way, options in WAYS.items():
            found = executions.execute(case, options)
            if isinstance(found, str):
                break
            count = sum(each.told.instructions for each in found.launches)
            seconds = sum(each.seconds for each in found.launches)
            total[way] += seconds
            rates.append(f"{count / seconds / 1e3:12,.0f}")
        if rates:
            instructions += count
            print(f"{case.operator + '/' + case.implementation:32}{count:14,}" + "".join(rates))
    rates = "".join(f"{instructions / seconds / 1e3:12,.0f}" for seconds in total.values())
    print(f"{'all':32}{instructions:14,}{rates}")


if __name__ == "__main__":
    main()
