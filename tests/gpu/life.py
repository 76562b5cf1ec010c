"""A short life of one rank of Pro on the GPU that is here, with one layer of each kind: prefills of
ragged lengths, then decode steps up to the longest context. Prints the kernels that were found in
Triton's cache and, by name, those that had to be compiled.

    python tests/gpu/life.py '{"chunk": 2048, "requests": 64, "context": 1048576}'
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from triton import knobs

from dsv4_plugin.checkpoint.released import load_geometry
from dsv4_plugin.config import Precision
from dsv4_plugin.model import DeepseekV4
from dsv4_plugin.model.feed_forward import FeedForward
from dsv4_plugin.runtime import Engine, precompile

PREFILLS = [(1,), (2,), (5, 3), (17, 1, 40), (64, 64), (100,), (257, 3, 9, 120), (600,), (2048,)]
BATCHES = [1, 2, 3, 5, 8, 17, 24, 48, 64]


def rank(name: str, device: str) -> DeepseekV4:
    """One of eight processes of a released model; weights as memory has them."""
    geometry = load_geometry(name)
    share = precompile.share(geometry, 8, 1)
    made = DeepseekV4(
        precompile.shortened(geometry), Precision.SERVING, share, device, parts="backbone"
    )
    for module in made.modules():
        if isinstance(module, FeedForward):
            module.prepare()
    return made


@torch.inference_mode()
def live(model: DeepseekV4, load: precompile.Load) -> None:
    engine = Engine(model, 4 * load.context, load.requests)
    engine._slots = engine._slots[:, : load.context + 4].contiguous()  # the host's table
    for lengths in PREFILLS:
        batch = [(engine.open(), [7] * length) for length in lengths]
        engine.logits(engine.forward(batch))
        for sequence, _ in batch:
            engine.close(sequence)
    for requests in BATCHES:
        sequences = [engine.open() for _ in range(requests)]
        for context in (300, load.context // requests - 1):
            for sequence in sequences:
                engine.reserve([sequence], context + 1 - sequence.length)
                sequence.length = context
            plan = engine.plan([(each, 1) for each in sequences], static=True)
            engine.logits(model(engine.ids([7] * requests), plan, engine.caches))
        for sequence in sequences:
            engine.close(sequence)


def main() -> None:
    found, compiled = [], []

    def listen(*, metadata: dict[str, Any], cache_hit: bool, **rest: Any) -> None:
        (found if cache_hit else compiled).append(metadata["name"])

    knobs.compilation.listener = listen
    model = rank("pro", "cuda")
    for parameter in model.parameters():  # whose values only must not lead out of a table
        parameter.data.view(torch.uint8).zero_()
    live(model, precompile.Load(**json.loads(sys.argv[1])))
    torch.cuda.synchronize()
    print(json.dumps({"found": len(found), "compiled": compiled}))


if __name__ == "__main__":
    main()
