"""Draws loss of text and recall by distance over the tokens read.

python examples/train_tiny/curves.py LOG.jsonl CURVES.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402
from train import LOG_STEPS, stage_of  # noqa: E402


def draw(log: Path, picture: Path) -> None:
    """One panel for the loss, one for recall, stages marked by their sequence length."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    stages = [stage_of(line["step"] - 1) for line in lines]
    tokens, read = [], 0
    for stage in stages:
        read += LOG_STEPS * stage.batch * stage.length
        tokens.append(read / 1e6)
    figure, (above, below) = pyplot.subplots(
        2, 1, figsize=(7, 6), sharex=True, layout="constrained"
    )
    above.plot(tokens, [line["text"] for line in lines], label="next token")
    drafted = [(at, line["draft"]) for at, line in zip(tokens, lines) if "draft" in line]
    if drafted:
        above.plot(*zip(*drafted), label="MTP block, the token after next (facts included)")
    above.set_ylabel("nats per token")
    for limit in sorted(
        {
            int(name.removeprefix("recall<"))
            for line in lines
            for name in line
            if name.startswith("recall<")
        }
    ):
        points = [
            (at, line[f"recall<{limit}"])
            for at, line in zip(tokens, lines)
            if f"recall<{limit}" in line
        ]
        below.plot(*zip(*points), label=f"distance < {limit}")
    below.set_ylabel("recall, greedy")
    below.set_xlabel("million tokens read")
    for axes in (above, below):
        for at, stage, before in zip(tokens, stages, [None, *stages]):
            if before is not stage:
                axes.axvline(at, color="0.85", zorder=0)
        axes.legend(fontsize=8)
    for at, stage, before in zip(tokens, stages, [None, *stages]):
        if before is not stage:
            above.annotate(f"{stage.length}", (at, above.get_ylim()[1]), fontsize=8, va="bottom")
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("log", type=Path)
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    draw(arguments.log, arguments.picture)
